"""What lies in a run folder, and who may train in it.

No other module spells the names of a run folder's files.
"""

import fcntl
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from marginface.config import Config, dotted, from_json, translate
from marginface.runs.files import read_lines, write_atomically

CONFIG = "config.json"  # all values of the run's config
ORIGIN = "origin.json"  # what was typed: {"experiment", "variant", "overrides", "command"}
METRICS = "metrics.jsonl"  # one line a logging step or evaluation: {"step", figure: value}
CHECKPOINTS = "checkpoints"  # a folder for each saved step
STOPPED = "stopped.json"  # why the run is not complete: {"code", "message"}
SUMMARY = "summary.json"  # the last figures, and where they come from; there when it is complete
PAGE = "summary.md"  # the same for readers, with pictures
PLOTS = "plots"  # the page's pictures
SEPARABILITY = "separability.npy"  # of each class, the cosine to its nearest other prototype
LOG = "log.txt"  # what a unit of a sweep would print
CLEANED = "cleaned.csv"  # which images to keep, as sub-centers tell them
TENSORBOARD = "tensorboard"  # TensorBoard's event files
WANDB_ID = "wandb/id.txt"  # the run's id there
_LOCK = ".lock"

# What may differ between a run and its continuation: where things are, not what they are; and
# whether an unreadable image stops it, which is what the message of a run so stopped advises.
_MAY_CHANGE = ("data.workers", "data.kw.root", "data.kw.unreadable", "wandb.", "tensorboard")
# Keys that the configs of earlier versions lack, and the values with which such a run continues.
_SINCE = {"loss.precision": ("auto", "highest")}  # they ran on CPU, where both are float32
_LOCKS: dict[pathlib.Path, int] = {}  # of the run folders that this process trains in


def claim(workdir: pathlib.Path, config_json: str, origin: Mapping[str, Any] | None = None) -> None:
    """Makes the folder with its config.json and origin.json, or sees that its config is the same.

    Args:
        workdir: the run folder.
        config_json: the run's config.
        origin: what was typed: {"experiment", "variant", "overrides", "command"}.

    Raises:
        ValueError: the folder is a file or holds another config; names the keys that differ.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{workdir} is or lies in a file: choose another --workdir") from None
    _lock(workdir)  # before anything is looked at: two that start together must not both go on
    path = workdir / CONFIG
    if not path.exists():
        if origin is not None:
            text = json.dumps(dict(origin), indent=2, default=list) + "\n"
            write_atomically(workdir / ORIGIN, text)
        write_atomically(path, config_json)
        return
    try:
        changed = differing(path, config_json)
    except ValueError:
        raise ValueError(f"{path} is no config: choose another --workdir") from None
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"{workdir} holds a run with another config ({', '.join(changed[:3])}{more}): "
            "choose another --workdir"
        )
    (workdir / STOPPED).unlink(missing_ok=True)


def release(workdir: pathlib.Path) -> None:
    """Lets other processes train in the folder again; the end of this process does so too."""
    if (handle := _LOCKS.pop(workdir.resolve(), None)) is not None:
        os.close(handle)


def record_stop(workdir: pathlib.Path, config_json: str, code: int, message: str) -> None:
    """Leaves {"code", "message"} in stopped.json: why the run is not complete; claim removes it.

    Does nothing where the folder is not this config's, where another process trains in it, and
    where the run is complete: what is there is not to be marked by a command that was refused.
    """
    try:
        if differing(workdir / CONFIG, config_json) or (workdir / SUMMARY).exists():
            return
        _lock(workdir)
        text = json.dumps({"code": code, "message": message}) + "\n"
        write_atomically(workdir / STOPPED, text)
    except (OSError, ValueError):  # no folder yet, or a full disk: the command's own line says so
        return


def config_of(folder: pathlib.Path) -> Config:
    """The config of the complete run in this folder.

    Raises:
        ValueError: no run, one that is not complete, or a damaged config.
    """
    for name in (CONFIG, SUMMARY):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the folder of a run that is complete")
    path = folder / CONFIG
    try:
        config = from_json(path.read_text(encoding="utf-8"))
        if any("name" not in config[section] for section in ("data", "model", "loss")):
            raise KeyError
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is no config: give the folder of a run") from None
    return config


def require_same_data(workdir: pathlib.Path, found: str, saved: str, advice: str = "") -> None:
    """Sees that the training set is the one of the run's checkpoint.

    Args:
        workdir: the run folder.
        found: the fingerprint of the training set that is there.
        saved: the fingerprint in the checkpoint.
        advice: what to do other than to restore the data.

    Raises:
        ValueError: they differ.
    """
    if found != saved:
        raise ValueError(
            f"{workdir}: the data set is not the one this run began with (fingerprint "
            f"{found[:12]}, was {saved[:12]}): restore the data{', ' if advice else ''}{advice}"
        )


def may_change(key: str) -> bool:
    """Whether a run may be continued with another value of this key; an evaluator's data too."""
    return re.sub(r"^evals\.[^.]+\.", "", key).startswith(_MAY_CHANGE)


def differing(path: pathlib.Path, config_json: str) -> list[str]:
    """ "loss.scale was 24.0, is 32.0" for each key that a continued run must not change.

    Args:
        path: a config.json.
        config_json: another config.
    """
    old = dotted(from_json(path.read_text(encoding="utf-8")))
    new = dotted(translate(json.loads(config_json)))
    old |= {k: new[k] for k, known in _SINCE.items() if k not in old and new.get(k) in known}
    return [
        f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}"
        for key in sorted(old | new)
        if old.get(key, ...) != new.get(key, ...) and not may_change(key)
        # Where a walk over classes is cut decides rounding alone.
        if not key.endswith(".chunk_size")
    ]


def _lock(workdir: pathlib.Path) -> None:
    """Two processes in one folder would undo each other's files: the second is refused."""
    if (folder := workdir.resolve()) in _LOCKS:
        return
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"{workdir} is being trained by another process: wait for it, or end it"
        ) from None
    except OSError:  # a file system without locks, as buckets are
        os.close(handle)
        return
    _LOCKS[folder] = handle


class State(NamedTuple):
    """How far a run folder is.

    kind: "done", "not run", "interrupted" (begun, and ended without a word or still running),
      "checkpointed" (stopped by SIGTERM), "failed" (config or input error) or "diverged".
    why: one line, empty where the kind says it all.
    step: the last step in metrics.jsonl, 0 if there is none.
    """

    kind: str
    why: str = ""
    step: int = 0


def state(folder: pathlib.Path) -> State:
    """How far the run in this folder is, from the files it left."""
    try:
        lines = read_lines(folder / METRICS)
        step = max((int(line["step"]) for line in lines), default=0)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return State("failed", f"{METRICS} is damaged: {error}")
    stopped = _read_json(folder / STOPPED)
    if stopped:
        kinds = {2: "failed", 3: "diverged", 75: "checkpointed"}
        kind = kinds.get(stopped.get("code"), "failed")
        return State(kind, str(stopped.get("message", "")), step)
    summary = _read_json(folder / SUMMARY)
    if summary == {}:
        return State("failed", f"{SUMMARY} is damaged: the same command makes it anew", step)
    if summary is not None:
        broken = sorted(key for key, value in summary.items() if value is None)
        return State("done", f"not finite: {', '.join(broken)}" if broken else "", step)
    if (folder / CONFIG).exists():
        return State("interrupted", f"ended without a word after step {step}", step)
    log = folder / LOG
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return State("failed", lines[-1] if lines else "left no word")
    return State("not run")


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
