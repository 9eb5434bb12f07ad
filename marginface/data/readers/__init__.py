"""Data sets by name (`config.data.name`): one module each, with a function `load`."""
