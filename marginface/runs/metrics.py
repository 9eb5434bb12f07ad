"""Where figures go during a run: metrics.jsonl, the terminal, and trackers when asked for."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from marginface.runs import folder as run_folder
from marginface.runs.files import read_lines, write_atomically
from marginface.runs.trackers import Trackers


class Writer:
    """Appends one JSON line a logging step to <workdir>/metrics.jsonl; shows progress.

    Args:
      workdir: the run folder.
      resume_step: the step that the run continues from, -1 if it begins. Lines of later steps are
        dropped, since those steps are trained again, and so is a broken last line.
      total_steps: for the progress bar.
      active: False in every process but the first: then nothing is written or shown.
      trackers: where the figures go as well; closed with the writer.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        resume_step: int,
        total_steps: int,
        active: bool = True,
        trackers: Trackers | None = None,
    ) -> None:
        self._active, self._trackers = active, trackers or Trackers()
        if not active:
            return
        self._path = workdir / run_folder.METRICS
        kept = [r for r in read_lines(self._path) if r["step"] <= resume_step]
        write_atomically(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = self._path.open("a", encoding="utf-8")
        import tqdm  # here: the core asks for none

        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=max(resume_step, 0),
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line {"step": step, **values}; shown on the terminal too."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._trackers.write(step, values)
        shown = {k: v for k, v in values.items() if not k.startswith("time/")}
        text = "  ".join(f"{k.split('/', 1)[-1]} {v:.4g}" for k, v in shown.items())
        if self._bar.disable:
            print(f"step {step}/{self._bar.total}  {text}", flush=True)
        elif any(k.startswith(("loss/", "train/")) for k in values):
            brief = {k: f"{values[k]:.4g}" for k in ("loss/total", "train/top1") if k in values}
            self._bar.set_postfix(brief, refresh=False)
        else:
            self._bar.write(f"step {step}  {text}")

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        if self._active:
            self._bar.update(step - self._bar.n)

    def sync(self) -> None:
        """Returns once every line written is on disk; called before a checkpoint refers to it."""
        if self._active:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._trackers.flush()

    def close(self) -> None:
        """Ends the bar, the file and the trackers."""
        if self._active:
            self._bar.close()
            self._file.close()
            self._trackers.close()
            self._active = False


class Window:
    """The figures of the steps since the last logged line.

    Args:
      batch_size: images a step.
      values: what a checkpoint kept of an unfinished window.
      unreadable: images skipped so far in the whole run.
    """

    def __init__(
        self, batch_size: int, values: Sequence[dict[str, float]] = (), unreadable: int = 0
    ) -> None:
        self.values, self.unreadable = list(values), unreadable
        self._batch_size = batch_size
        self.restart_clock()

    def add(self, values: dict[str, float]) -> None:
        """A step's figures; "data/unreadable" adds up over the run."""
        values = dict(values)
        self.unreadable += int(values.pop("data/unreadable", 0))
        self.values.append(values)

    def line(self) -> dict[str, float]:
        """The mean of each figure, images per second; a new window begins."""
        line = {k: float(np.mean([v[k] for v in self.values])) for k in self.values[-1]}
        if self.unreadable:
            line["data/unreadable"] = float(self.unreadable)
        elapsed = time.monotonic() - self._since
        line["time/examples_per_s"] = len(self.values) * self._batch_size / elapsed
        self.values = []
        self.restart_clock()
        return line

    def restart_clock(self) -> None:
        """Leaves the time since the last line out of the training speed."""
        self._since = time.monotonic()


def not_finite(values: Mapping[str, float]) -> str:
    """ "loss/total, loss/ring not finite", the figures that are infinite or NaN; "" for none."""
    names = [k for k, v in values.items() if not math.isfinite(v)]
    return f"{', '.join(names)} not finite" if names else ""
