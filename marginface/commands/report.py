"""marginface report: marginface.report."""

from collections.abc import Sequence
from typing import NoReturn

from marginface import command
from marginface.report.__main__ import run


def main(argv: Sequence[str]) -> NoReturn:
    """The command."""
    command.main(run, "marginface", argv)
