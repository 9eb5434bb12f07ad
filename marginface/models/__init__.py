"""Networks from images to embeddings: one module per family, each with a class `Model`."""
