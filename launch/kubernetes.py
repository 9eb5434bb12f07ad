"""Soon."""


def add_arguments(parser):
    """None yet."""
