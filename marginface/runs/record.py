"""One run while it trains: its folder, its figures, its checkpoints, and its end if it diverges."""

import collections
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

from marginface import config as configs
from marginface.config import Config
from marginface.evaluators.common import NotFiniteError
from marginface.runs import folder as run_folder
from marginface.runs import metrics
from marginface.runs.trackers import start_trackers
from marginface.training.checkpoint import Checkpoints

State = Any  # a train state, see training.step
_BEHIND = 2  # steps whose figures are not waited for: the device works on them


class DivergedError(Exception):
    """A loss, gradient or embedding was not finite; the last good checkpoint stands."""


class Record:
    """What a run leaves in its folder while it trains. Every process has one, the first writes.

    In order: restore, begin; log or add, write and save as it trains; close.

    Args:
      workdir: the run folder, which is claimed: see folder.claim, its errors too.
      config: of the run.
      fingerprint: of its training set.
      total_steps: how many updates it has.
      best_metric: figure that ranks its checkpoints, the higher the better; None keeps no best.
      origin: what was typed, see folder.claim.
      started: time.monotonic() when the run's time began to count.

    Attributes:
      step: the step that the run continues from, 0 if it begins.
      fresh: there was no checkpoint to continue from.
      window: the figures since the last logged line.
      together: how many runs share this program and its time; 0 for a run alone.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: Config,
        *,
        fingerprint: str,
        total_steps: int,
        best_metric: str | None = None,
        origin: Mapping[str, Any] | None = None,
        started: float,
    ) -> None:
        self._first_process = jax.process_index() == 0
        if self._first_process:
            run_folder.claim(workdir, configs.to_json(config), origin)
        self.workdir, self.config = workdir, config
        self.started, self.together = started, 0
        self._fingerprint, self._total, self._best = fingerprint, total_steps, best_metric
        self._pending: collections.deque = collections.deque()
        self._opened: Checkpoints | None = None
        self._continue({"step": 0, "window": [], "seconds": 0.0, "unreadable": 0}, fresh=True)

    def _continue(self, meta: Mapping[str, Any], *, fresh: bool) -> None:
        self.step, self.fresh, self._seconds_before = meta["step"], fresh, meta["seconds"]
        self.window = metrics.Window(self.config.batch_size, meta["window"], meta["unreadable"])

    @property
    def _checkpoints(self) -> Checkpoints:
        if self._opened is None:
            folder = self.workdir / run_folder.CHECKPOINTS
            self._opened = Checkpoints(folder, best_metric=self._best)
        return self._opened

    def restore(
        self,
        like: State,
        *,
        allow_changed_data: bool = False,
        advice: str = "choose another --workdir, or give --allow_changed_data",
    ) -> State | None:
        """The state of the newest sound checkpoint; None if nothing was saved.

        Args:
          like: shapes and shardings of the state.
          allow_changed_data: continue though the training set is not the one the run began with.
          advice: what to do then other than to restore the data.

        Raises:
          ValueError: no checkpoint is sound, they do not fit, or the training set is another.
        """
        restored = self._checkpoints.restore(like)
        if restored is None:
            return None
        _, state, meta = restored
        if not allow_changed_data:
            run_folder.require_same_data(self.workdir, self._fingerprint, meta["data"], advice)
        self._continue(meta, fresh=False)
        return state

    def begin(self) -> None:
        """Opens metrics.jsonl, cut back to the restored step, and starts the trackers."""
        resume_step, trackers = -1 if self.fresh else self.step, None
        if self._first_process:
            values = self.config.to_dict()
            trackers = start_trackers(values, self.workdir, resume_step=resume_step)
        self._writer = metrics.Writer(
            self.workdir,
            resume_step=resume_step,
            total_steps=self._total,
            active=self._first_process,
            trackers=trackers,
        )
        self.window.restart_clock()

    @property
    def seconds(self) -> float:
        """How long the run has taken, earlier processes included; its share of a shared program."""
        here = time.monotonic() - self.started
        return self._seconds_before + here / max(self.together, 1)

    def add(self, at: int, figures: Mapping[str, Any]) -> None:
        """The figures of step `at`, arrays that need not be there yet: they are read later."""
        self._pending.append((at, figures))
        self.settle(behind=_BEHIND)
        self._writer.advance(at)

    def settle(self, behind: int = 0) -> None:
        """Logs the figures of all steps added, but for the newest `behind` of them.

        Raises:
          DivergedError: a figure is not finite.
        """
        while len(self._pending) > behind:
            at, arrays = self._pending.popleft()
            self.log(at, {name: float(value) for name, value in arrays.items()})

    def log(self, at: int, values: Mapping[str, float]) -> None:
        """The figures of step `at`; every config.log_every steps their means are written.

        Raises:
          DivergedError: a figure is not finite.
        """
        if bad := metrics.not_finite(values):
            raise self.diverged(at, bad)
        self.window.add(dict(values))
        if at % self.config.log_every == 0 or at == self._total:
            line = self.window.line()
            if line.get("train/collapsed") == 1:
                logging.warning(
                    "step %d: collapse: all embeddings are one point, so the triplet loss equals "
                    "its margin; take semi-hard triplets or a lower learning rate",
                    at,
                )
            if self.together:  # its speed is a share: not to be compared with that of a run alone
                line["time/together"] = float(self.together)
            self._writer.write(at, line)

    def evaluate(
        self, at: int, measure: Callable[[State], dict[str, float]], state: State
    ) -> dict[str, float]:
        """measure(state), after all steps are logged.

        Raises:
          DivergedError: a figure, an embedding or a score is not finite.
        """
        self.settle()
        try:
            return measure(state)
        except NotFiniteError as error:
            raise self.diverged(at, str(error)) from error

    def write(self, at: int, results: Mapping[str, float]) -> None:
        """A line of metrics.jsonl; the time since the last one is not training's."""
        self._writer.write(at, results)
        self.window.restart_clock()

    def save(self, at: int, state: State, results: dict[str, float] | None = None) -> None:
        """Writes a checkpoint in the background, after the lines of metrics.jsonl before it.

        Args:
          at: number of updates done.
          state: the train state.
          results: of the evaluation at this step, if there was one.

        Raises:
          DivergedError: a figure is not finite.
          ValueError, OSError: as Checkpoints.save.
        """
        self.settle()
        self._writer.sync()
        meta = {
            "step": at,
            "window": self.window.values,
            "unreadable": self.window.unreadable,
            "seconds": self.seconds,
            "data": self._fingerprint,
        }
        ranked = results if results and self._best in results else None
        self._checkpoints.save(at, state, meta, ranked)

    def wait(self) -> None:
        """Returns once all that was saved is on disk, and the threads that wrote it have ended."""
        checkpoints, self._opened = self._opened, None
        if checkpoints is not None:
            checkpoints.close()

    def diverged(self, at: int, what: str) -> DivergedError:
        """The error that ends a run whose step `at` gave what is not finite."""
        self.wait()  # a checkpoint that is being written counts
        last = f"no checkpoint was saved in {self.workdir} before"
        if good := self._checkpoints.steps():
            last = f"the last good checkpoint in {self.workdir} is that of step {max(good)}"
        return DivergedError(f"step {at}: {what}; {last}; lower the learning rate or the margin")

    def close(self) -> None:
        """Closes metrics.jsonl and the trackers, and waits for the last checkpoint."""
        self._writer.close()
        self.wait()
