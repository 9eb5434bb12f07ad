"""The signal that asks a run to save and leave."""

import signal
import types
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Notices SIGTERM, so that the train loop can save and stop after a step.

    In one process, a signal handler sets a flag until the context ends. The first Ctrl-C and a lost
    terminal count as SIGTERM; the second Ctrl-C ends the process at once. With several processes,
    JAX's preemption service stops all of them after the same step; a Python handler would silently
    disable it, so none is installed.
    """

    def __init__(self) -> None:
        self.signalled = False  # always False where there are several processes
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
                numbers.append(signal.SIGHUP)
            self._previous = {n: signal.signal(n, self._notice) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() == 1:
            for number, handler in self._previous.items():
                # None stands for a handler that was not set from Python and cannot be put back.
                signal.signal(number, handler or signal.SIG_DFL)

    def _notice(self, signum: int, frame: types.FrameType | None) -> None:
        if signum == signal.SIGINT and self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step; every process must ask at every step."""
        if jax.process_count() == 1:
            return self.signalled
        return multihost_utils.reached_preemption_sync_point(step)
