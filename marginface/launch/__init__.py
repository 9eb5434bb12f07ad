"""Commands that run many experiments and gather what they left."""

from marginface import config as configs


def typed(name: str) -> str:
    """How a command of this folder is typed, in a clone and where marginface is installed."""
    return f"python -m launch.{name}" if configs.CLONE else f"marginface {name}"
