"""marginface clean: marginface.clean."""

from collections.abc import Sequence
from typing import NoReturn

from marginface import command
from marginface.clean.__main__ import run


def main(argv: Sequence[str]) -> NoReturn:
    """The command."""
    command.main(run, "marginface", argv)
