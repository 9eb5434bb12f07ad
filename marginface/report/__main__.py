"""Pictures of more than one run.

    marginface report losses [--out docs/figures] [--only NAME ...] [--seed 0]
    marginface report separability RUN RUN ... [--out separability.png]

The first draws each loss and trains what docs/losses.md shows; the second draws Sep_i of several
runs. Also `python -m marginface.report`.

Exit codes: 0 done; 2 a mistake in the options or the input.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from marginface import command, runtime
from marginface.command import Parser
from marginface.runs import folder as run_folder


def run(argv: Sequence[str]) -> None:
    """Draws what `argv` (without the program's name) asks for.

    Raises:
        ValueError: an option or a value that does not exist.
    """
    runtime.tune_cpu()
    from marginface.evaluators import pictures
    from marginface.report import loss_pictures as losses

    parser = Parser("marginface report", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("losses", help="the pictures of docs/losses.md").add_argument
    add("--out", type=pathlib.Path, default="docs/figures", help="folder for the pictures")
    add(
        "--only",
        nargs="+",
        default=losses.NAMES,
        choices=losses.NAMES,
        metavar="NAME",
        help=f"some of {', '.join(losses.NAMES)}",
    )
    add("--seed", type=int, default=0, help="of the training runs")
    add = commands.add_parser("separability", help="Sep_i of several runs").add_argument
    add("runs", type=pathlib.Path, nargs="+", metavar="RUN", help="run folders that are complete")
    add("--out", type=pathlib.Path, default="separability.png", help="the picture")
    options = parser.parse_args(argv)
    if options.command == "separability":
        pictures.separabilities({run.name: _separability(run) for run in options.runs}, options.out)
        print(options.out, flush=True)
        return
    for path in losses.draw(options.out, only=options.only, seed=options.seed):
        print(path, flush=True)


def _separability(run: pathlib.Path) -> np.ndarray:
    path = run / run_folder.SEPARABILITY
    if not path.is_file():
        raise ValueError(f"{run} has no {path.name}: give run folders that are complete")
    found = np.load(path, allow_pickle=False)
    if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.floating):
        raise ValueError(
            f"{path} holds {found.dtype} of shape {found.shape}, not one float a class"
        )
    return found


def main() -> None:
    """The command."""
    command.main(run, "marginface")


if __name__ == "__main__":
    main()
