"""marginface sweep: marginface.launch.sweep."""

from collections.abc import Sequence
from typing import NoReturn

from marginface import command, runtime
from marginface.launch import sweep


def main(argv: Sequence[str]) -> NoReturn:
    """The command."""
    runtime.restart_with_huge_pages()
    runtime.tune_cpu()
    runtime.tune_gpu()
    command.main(sweep.run, "marginface", argv)
