"""marginface COMMAND ...: compare large-margin losses for face recognition.

    marginface train --config experiments/arcface_regular.py:data=small

Exit codes: 0 done; 2 a mistake in the options or the input; each command lists its own.
"""

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

from marginface import __version__, command, lookup

# Subcommand, a module of this folder with main(argv) → its line in the list.
COMMANDS = {
    "train": "train, evaluate and report one experiment; the same command resumes it",
    "sweep": "run an experiment's grid over values, here or on a cluster",
    "search": "tune experiments with equal budgets, validated on people held out",
    "results": "run folders as a CSV and a table: means, intervals, fair comparisons",
    "figures": "pictures of what runs have left: lines, heat maps, intervals",
    "report": "pictures of the losses themselves, and of several runs",
    "clean": "find wrong labels with a run of sub-center ArcFace",
    "init": "copy the experiments that come with marginface, for editing",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the subcommand that `argv`, or else the process's arguments, begins with."""
    if argv is None:
        sys.path.append("")  # as with python -m, modules of one's own lie in the working directory
        argv = sys.argv[1:]
    name, *rest = argv or ["--help"]
    if name in COMMANDS:
        importlib.import_module(f"marginface.commands.{name}").main(rest)
    elif name in ("-h", "--help"):
        lines = [f"    {name:8} {line}" for name, line in COMMANDS.items()]
        print(f"{__doc__}\n" + "\n".join([*lines, "", "marginface COMMAND --help says more."]))
    elif name == "--version":
        jax = importlib.metadata.version("jax")
        print(f"marginface {__version__} (Python {platform.python_version()}, jax {jax})")
    else:
        hint = lookup.nearest(name, [*COMMANDS, "--help", "--version"])
        print(f"marginface: no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(command.INPUT_ERROR)


if __name__ == "__main__":
    main()
