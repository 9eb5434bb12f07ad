"""Sixteen units of a sweep in one program, beside the same sixteen one after the other.

Whole commands are timed, from start to the last report: Python, compilation, training, evaluation,
pictures. The peers are processes that start one after the other: each compiling for itself, as one
would run them by hand, and sharing what was compiled, as --backend local runs them.
"""

import datetime
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks import common
from marginface import runtime
from marginface.launch import units

EXPERIMENT = "benchmarks/tiny.py"
PEERS = {
    "one after the other": {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    "one after the other, compiled once": {},
}


def seconds(backend: str, environment: dict[str, str], options: Sequence[str] = ()) -> float:
    """Wall time of the whole sweep, or of what `options` leave of it, in a new folder.

    Raises:
        RuntimeError: it did not finish; with its last words.
    """
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "launch.sweep", "--config", EXPERIMENT]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--backend", backend, "--runs", runs, *options],
            cwd=common.ROOT,
            env=os.environ | _empty_cache(runs) | environment,
            capture_output=True,
            text=True,
        )
        passed = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(
            f"--backend {backend} ended with {done.returncode}: {done.stderr[-500:]}"
        )
    return passed


def _empty_cache(folder: str) -> dict[str, str]:
    """What was compiled before a sweep began must not help it."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(folder, "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(runtime.WORTH_KEEPING_SECONDS),
    }


def measure(*, quick: bool) -> list[dict[str, str]]:
    """One row for each peer; --quick leaves out the slow one."""
    count = len(units.expand(EXPERIMENT, root=pathlib.Path("runs")))
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    ours, rows = [seconds("vmap", {})], []
    for peer, environment in list(PEERS.items())[quick:]:
        theirs = seconds("local", environment)
        ours.append(seconds("vmap", {}))  # on both sides of each peer
        middle = statistics.median(ours[-2:])
        rows.append(
            {
                "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
                "commit": common.commit(),
                "benchmark": "sweep",
                "case": f"{EXPERIMENT} units={count}",
                "peer": peer,
                "ours_seconds": f"{middle:.1f}",
                "peer_seconds": f"{theirs:.1f}",
                "ratio": f"{theirs / middle:.2f}",
                "ours_mib": common.NOT_RUN,
                "peer_mib": common.NOT_RUN,
                "device": common.device(),
                "conditions": f"one run between two of ours, {load}",
                "versions": common.versions(),
            }
        )
    return rows


if __name__ == "__main__":
    common.main([], [measure])
