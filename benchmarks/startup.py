"""Seconds from a command to the end of its first step: python -m benchmarks.startup [--rounds 3].

Each round runs the README's main job twice with a cache folder that is empty at first, each time in
a new run folder: Python's imports, data, network, the evaluation before training, compilation, and
the first step, whose figures are printed once the device has computed them. Processor seconds
tell what is saved; those of the clock depend on how many cores compile side by side, and on what
else they do.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPERIMENT = "experiments/arcface_regular.py"
_TICKS = os.sysconf("SC_CLK_TCK")


class Seconds(NamedTuple):
    """Until the first step was done."""

    wall: float
    processor: float


def until_first_step(experiment: str, folder: pathlib.Path, flags: Sequence[str] = ()) -> Seconds:
    """Runs the command to its end, in a new run folder, with the cache in `folder`.

    Raises:
        RuntimeError: it did not finish; with its last words.
    """
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    environment["XDG_CACHE_HOME"] = str(folder)
    with tempfile.TemporaryDirectory() as runs, tempfile.TemporaryFile("w+") as errors:
        words = [f"--config={experiment}", "--config.steps=1", f"--workdir={runs}/run", *flags]
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "marginface.main", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdout is not None
            found = None
            for line in process.stdout:
                if found is None and line.startswith("step 1/"):
                    found = Seconds(time.perf_counter() - begun, _processor(process.pid))
        if process.returncode or found is None:
            errors.seek(0)
            raise RuntimeError(f"it ended with {process.returncode}: {errors.read()[-500:]}")
    return found


def _processor(pid: int) -> float:
    """User and system seconds of a process, where the kernel tells."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return float("nan")
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def measure(
    rounds: int, experiment: str = EXPERIMENT, flags: Sequence[str] = ()
) -> tuple[Seconds, Seconds]:
    """Medians of first and second run."""
    firsts, seconds = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for found in (firsts, seconds):
                found.append(until_first_step(experiment, pathlib.Path(cache), flags))
    return _median(firsts), _median(seconds)


def _median(found: Sequence[Seconds]) -> Seconds:
    return Seconds(*(statistics.median(column) for column in zip(*found, strict=True)))


def main() -> None:
    """Prints both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    first, second = measure(rounds)
    print(f"{EXPERIMENT}: from the command to the end of step 1, median of {rounds}")
    for name in reversed(Seconds._fields):
        a, b = getattr(first, name), getattr(second, name)
        print(f"{name:9}  first {a:6.1f} s  second {b:6.1f} s  ratio {b / a:.2f}")


if __name__ == "__main__":
    main()
