"""marginface train: marginface.main."""

from collections.abc import Sequence
from typing import NoReturn

from marginface import main as trainer
from marginface import runtime


def main(argv: Sequence[str]) -> NoReturn:
    """The command."""
    runtime.restart_with_huge_pages()
    trainer.main(argv)
