"""Where figures go while a run lasts: metrics.jsonl, the terminal, and wandb when asked for."""

import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import tqdm
from absl import logging

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)


class Writer:
    """Appends one JSON line a logging step to <workdir>/metrics.jsonl; shows progress.

    Args:
      workdir: the run folder.
      resume_step: lines after this step are of a future that a crash undid: they are dropped,
        and so is a broken last line.
      total_steps: for the progress bar.
      active: False in every process but the first: then nothing is written or shown.
      wandb_run: a wandb run or None.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        resume_step: int,
        total_steps: int,
        active: bool = True,
        wandb_run: Any = None,
    ) -> None:
        self._active, self._wandb = active, wandb_run
        if not active:
            return
        self._path = workdir / "metrics.jsonl"
        kept = [r for r in read_lines(self._path) if r["step"] <= resume_step]
        write_atomically(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = self._path.open("a", encoding="utf-8")
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
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
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
        """Returns once every line written is on the disk: before a checkpoint refers to it."""
        if self._active:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the bar, the file and the wandb run."""
        if self._active:
            self._bar.close()
            self._file.close()
            if self._wandb is not None:
                self._wandb.finish()
            self._active = False


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no file. A broken last line is left out.

    Raises:
      ValueError: a broken line before the last; names the file and the line.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: mend or move it") from None
    return records


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Either the old file or the whole new one: never a half, whenever the machine stops."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def not_finite(values: Mapping[str, float]) -> list[str]:
    """Names of the figures that are infinite or not a number."""
    return [k for k, v in values.items() if not math.isfinite(v)]


def start_wandb(settings: Any, workdir: pathlib.Path, config: dict) -> Any:
    """A wandb run, or None (with a warning that says what to do) where it cannot start."""
    try:
        import wandb
    except ImportError:
        logging.warning("wandb is not installed: pip install marginface[wandb]; going on without")
        return None
    try:
        return wandb.init(
            project=settings["project"],
            name=workdir.name,
            dir=str(workdir),
            mode=settings["mode"],
            config=config,
            resume="allow",
            id=workdir.name,
        )
    except (wandb.errors.UsageError, wandb.errors.CommError) as error:
        logging.warning(
            "wandb: %s; set WANDB_API_KEY or --config.wandb.mode=offline; going on without",
            str(error).splitlines()[0],
        )
        return None
