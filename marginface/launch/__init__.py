"""Commands that run many experiments and gather what they left."""
