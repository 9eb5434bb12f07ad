"""How everything here is measured: interleaved, medians, memory in a process of its own."""

import argparse
import csv
import ctypes
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from marginface import runtime

RESULTS = pathlib.Path(__file__).with_name("results.csv")
ROOT = pathlib.Path(__file__).resolve().parents[1]
COLUMNS = (
    "date",
    "commit",
    "benchmark",
    "case",
    "peer",
    "ours_seconds",
    "peer_seconds",
    "ratio",
    "ours_mib",
    "peer_mib",
    "device",
    "conditions",
    "versions",
)
NOT_RUN = "not run"
MIB = 2**20

Step = Callable[[], float]  # one unit of work, finished when it returns; its value is the loss
Build = Callable[[Mapping[str, Any]], Step]


class Benchmark(NamedTuple):
    """What is compared.

    Attributes:
        name: the module's name in this package.
        cases: settings, each a dict; those of --quick first.
        quick: how many of them --quick measures.
        ours: builds our step for a case.
        peers: name → builds the peer's step for the same case.
        rounds: interleaved repetitions with and without --quick.
        floors: name → builds, with JAX, a part that no form can do without; measured like a peer,
            its ratio tells how much of our time it takes.
    """

    name: str
    cases: tuple[dict[str, Any], ...]
    quick: int
    ours: Build
    peers: Mapping[str, Build]
    rounds: tuple[int, int]
    floors: Mapping[str, Build] = types.MappingProxyType({})

    @property
    def with_jax(self) -> dict[str, Build]:
        """The contenders that are ours or floors."""
        return {"ours": self.ours, **self.floors}


def on_gpu() -> bool:
    """Whether JAX computes on a GPU; PyTorch is then asked to do the same."""
    return jax.default_backend() == "gpu"


def why_no_peers() -> str:
    """One line that says why PyTorch cannot be measured here, or nothing."""
    missing = [m for m in ("torch", "pytorch_metric_learning") if not importlib.util.find_spec(m)]
    if missing:
        names = " and ".join(missing)
        return f"{names} not installed (pip install 'marginface[peers]'): ours is measured alone"
    import torch

    if jax.default_backend() == "tpu" or (on_gpu() and not torch.cuda.is_available()):
        return f"PyTorch has no {jax.default_backend()} here: ours is measured alone"
    return ""


def interleave(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender, in turns A B A B so that a busy machine slows all alike.

    Args:
        turns: name → runs one step and returns its seconds; each runs once before it counts.
        rounds: turns of each.
    """
    for turn in turns.values():
        turn()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            seconds[name].append(turn())
    return {name: statistics.median(values) for name, values in seconds.items()}


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes, where the kernel tells."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024  # ty: ignore[not-subscriptable]


def peak_memory(step: Step, before: int) -> int:
    """Bytes that a step needs at most, less what was resident `before` it was built.

    On CPU resident memory at its peak, counted from after the first step, so that compiling is not
    part of it. On an accelerator the allocator's own peak.
    """
    step()
    if _on_linux_cpu():
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    step()
    step()
    if jax.default_backend() != "cpu":
        if "torch" in sys.modules:
            return sys.modules["torch"].cuda.max_memory_allocated()
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    if _on_linux_cpu():
        return _resident("VmHWM") - before
    unit = 1 if sys.platform == "darwin" else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def _on_linux_cpu() -> bool:
    return jax.default_backend() == "cpu" and sys.platform == "linux"


def work(benchmark: Benchmark, contender: str, case: Mapping[str, Any]) -> None:
    """A contender's process: prints its memory in bytes, then seconds for each line it reads.

    Each time a step that does not count goes first. While the others had their turns, the kernel
    took back what this process had freed, and giving it out anew may take longer than the step: a
    pause that a training does not have.
    """
    jax.block_until_ready(jax.numpy.zeros(()))
    if contender not in benchmark.with_jax:
        import torch

        torch.zeros(1)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = _resident("VmRSS") if _on_linux_cpu() else usage
    step = {**benchmark.with_jax, **benchmark.peers}[contender](case)
    print(peak_memory(step, before), flush=True)
    for _ in sys.stdin:
        step()
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


class Worker:
    """A contender in a process of its own: neither's threads, settings or memory touch the other's.

    What uses JAX runs with the settings that `python -m marginface.main` gives itself.
    """

    def __init__(self, benchmark: Benchmark, contender: str, case: Mapping[str, Any]):
        """Raises RuntimeError with the process's last words if it cannot run a step."""
        words = [f"benchmarks.{benchmark.name}", "--work", contender, json.dumps(case)]
        self._name = " ".join(words[:3])
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (close() does it)
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=os.environ | (runtime.CPU_ENVIRONMENT if contender in benchmark.with_jax else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.mib = self._answer() / MIB

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            self._errors.seek(0)
            reason = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            self._errors.close()
            raise RuntimeError(f"{self._name} failed: {reason}")
        return float(line)

    def turn(self) -> float:
        """Runs two steps and returns the seconds of the second."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._errors.close()


def device() -> str:
    """The accelerator's name, or the processor's with the number of cores at hand."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def sources() -> str:
    """Eight digits that stand for the programs that are measured, inside of a checkout or not."""
    found = hashlib.sha256()
    for room in ("marginface", "experiments", "launch", "benchmarks"):
        for path in sorted((ROOT / room).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:8]


def commit(*files: str) -> str:
    """Short hash, "+" where (these) files differ from it, "unknown" outside of a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=all", "--", *files) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> str:
    """Python and the packages whose speed is compared."""
    found = [f"python {platform.python_version()}"]
    for name in ("jax", "flax", "torch", "pytorch-metric-learning"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " ".join(found)


def measure(benchmark: Benchmark, *, quick: bool) -> list[dict[str, str]]:
    """Runs a benchmark's cases and returns one row per case and peer, keys as in COLUMNS."""
    reason = why_no_peers()
    if reason:
        print(reason, file=sys.stderr)
    contenders = [*benchmark.with_jax, *([] if reason else benchmark.peers)]
    rounds = benchmark.rounds[0 if quick else 1]
    rows = []
    for case in benchmark.cases[: benchmark.quick] if quick else benchmark.cases:
        load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        workers = {name: Worker(benchmark, name, case) for name in contenders}
        seconds = interleave({name: worker.turn for name, worker in workers.items()}, rounds)
        for worker in workers.values():
            worker.close()
        kind = "peak allocated" if jax.default_backend() != "cpu" else "peak resident"
        for peer in (*benchmark.floors, *benchmark.peers):
            ran = peer in seconds
            rows.append(
                {
                    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
                    "commit": commit(),
                    "benchmark": benchmark.name,
                    "case": " ".join(f"{k}={v}" for k, v in case.items()),
                    "peer": peer,
                    "ours_seconds": f"{seconds['ours']:.4f}",
                    "peer_seconds": f"{seconds[peer]:.4f}" if ran else NOT_RUN,
                    "ratio": f"{seconds[peer] / seconds['ours']:.2f}" if ran else NOT_RUN,
                    "ours_mib": f"{workers['ours'].mib:.0f}",
                    "peer_mib": f"{workers[peer].mib:.0f}" if ran else NOT_RUN,
                    "device": device(),
                    "conditions": f"median of {rounds} interleaved, each after an uncounted step, "
                    f"memory {kind}, {load}",
                    "versions": versions(),
                }
            )
    return rows


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """The rows' measured columns, aligned; ratio above 1 means that ours is faster."""
    names = ("benchmark", "case", "peer", "ours_seconds", "peer_seconds", "ratio")
    names += ("ours_mib", "peer_mib")
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def append(rows: Iterable[Mapping[str, str]], path: pathlib.Path) -> None:
    """Adds rows to a CSV file; a new file gets the header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main(
    benchmarks: Iterable[Benchmark], others: Iterable[Callable[..., list[dict[str, str]]]] = ()
) -> None:
    """The command line of this package's modules.

    Args:
        benchmarks: steps that are measured beside their peers'.
        others: functions that measure in another way, (*, quick) → rows.
    """
    # Several processes share the card: none may take it whole.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes on two cores")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="CSV to append to")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    benchmarks = tuple(benchmarks)
    if options.work:
        contender, case = options.work
        work(benchmarks[0], contender, json.loads(case))
        return
    print(f"{device()}; {versions()}; commit {commit()}")
    rows = [row for benchmark in benchmarks for row in measure(benchmark, quick=options.quick)]
    rows += [row for other in others for row in other(quick=options.quick)]
    print(table(rows))
    append(rows, options.results)
    print(f"{len(rows)} rows appended to {options.results}")
