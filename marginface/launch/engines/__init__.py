"""Where the units of a sweep run: one module a backend, and the board that shows how they do."""
