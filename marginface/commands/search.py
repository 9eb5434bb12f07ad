"""marginface search: marginface.launch.search."""

from collections.abc import Sequence
from typing import NoReturn

from marginface import command, runtime
from marginface.launch import search


def main(argv: Sequence[str]) -> NoReturn:
    """The command."""
    runtime.restart_with_huge_pages()
    runtime.tune_cpu()
    runtime.tune_gpu()
    command.main(search.run, "marginface", argv)
