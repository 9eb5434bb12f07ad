"""marginface figures: marginface.launch.figures."""

from collections.abc import Sequence
from typing import NoReturn

from marginface import command
from marginface.launch import figures


def main(argv: Sequence[str]) -> NoReturn:
    """The command."""
    command.main(figures.run, "marginface", argv)
