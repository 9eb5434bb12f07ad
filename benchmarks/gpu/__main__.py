"""Asks one GPU what is worth knowing, the most valuable first: python -m benchmarks.gpu.

The same command again goes on where the last one ended. Exit codes: 0 everything is answered or
skipped, 1 something failed, 2 there is no GPU or no such question, 75 the time was up before the
end: run it again.
"""

import argparse
import pathlib
import sys

from benchmarks import common
from benchmarks.gpu import queue
from marginface.command import RUN_AGAIN

RUNS = common.ROOT / "runs"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="for everything together; default 8")
    add("--out", type=pathlib.Path, metavar="DIR", help="for answers and rows; default runs/gpu")
    add("--only", nargs="+", default=[], metavar="NAME", help="only these questions")
    add("--smoke", action="store_true", help="everything at tiny sizes, on any device")
    options = parser.parse_args()
    folder = options.out or RUNS / ("gpu-smoke" if options.smoke else "gpu")
    rows = None if options.out or options.smoke else common.RESULTS
    try:
        code = queue.ask(
            "benchmarks.gpu.questions",
            names=options.only,
            folder=folder.resolve(),
            rows=rows,
            known=() if options.smoke else (common.RESULTS,),
            minutes=options.minutes,
            smoke=options.smoke,
        )
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        code = RUN_AGAIN
    sys.exit(code)


if __name__ == "__main__":
    main()
