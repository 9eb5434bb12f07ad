"""marginface results: marginface.launch.results."""

from collections.abc import Sequence
from typing import NoReturn

from marginface import command
from marginface.launch import results


def main(argv: Sequence[str]) -> NoReturn:
    """The command."""
    command.main(results.run, "marginface", argv)
