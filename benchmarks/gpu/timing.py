"""Seconds of one unit of work, and the memory of a compiled program."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

_SAMPLES = 7
_LEAST = 0.02  # seconds of a sample: below it starting the work is what is timed
_MOST = 12.0  # seconds of all samples

smoke = False  # set in a process that only shows that everything runs


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Median seconds of `call` after it has run twice.

    Args:
        call: starts a unit of work and returns what is to be waited for.
        wait: waits for it.
    """

    def sample(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            done = call()
        wait(done)
        return (time.perf_counter() - start) / repeats

    sample(1)
    if smoke:
        return sample(1)
    once = sample(1)
    if once > _MOST:
        return once
    repeats = max(1, math.ceil(_LEAST / once))
    samples = max(1, min(_SAMPLES, int(_MOST / (once * repeats))))
    return statistics.median(sample(repeats) for _ in range(samples))


def mib(compiled: jax.stages.Compiled) -> float | None:
    """What a program needs at its peak as its compiler counts it: inputs, outputs and scratch."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return (total - found.alias_size_in_bytes) / 2**20
