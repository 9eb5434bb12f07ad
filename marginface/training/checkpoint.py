"""Checkpoints that are whole or are not used, and the signal that asks for one.

A checkpoint is a folder named after its step: the train state as Orbax writes it, and manifest.json
with the size and sha256 of every file. The folder gets its name last, so a run killed at any moment
leaves no half checkpoint; what changes on disk later is found when the manifest is verified.
"""

import errno
import functools
import hashlib
import json
import logging as std_logging
import math
import os
import pathlib
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from marginface.typing import PyTree

MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished"
_NONE_SAVED, _NONE_GOOD = -1, -2


class _Damaged(Exception):
    """A checkpoint that must not be restored; the message names the file and what is wrong."""


def _is_not_orbax_chatter(record: std_logging.LogRecord) -> bool:
    """Drops Orbax's progress reports, and its tracebacks of errors that also reach us raised."""
    files = [record.pathname]
    if record.exc_info:  # asyncio reports the tasks which nobody asked once one of them had failed
        files += [f.f_code.co_filename for f, _ in traceback.walk_tb(record.exc_info[2])]
    chatter = record.levelno < std_logging.WARNING or record.exc_info
    return not (chatter and any(f"{os.sep}orbax{os.sep}" in file for file in files))


def _drop_late_callbacks(otherwise: Callable[[Any], None], unraisable: Any) -> None:
    """Keeps quiet the writes that were under way when one of them failed and was raised.

    They report to an event loop which Orbax has closed by then, each with a traceback on stderr.
    """
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        otherwise(unraisable)


def _signed(content: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, sort_keys=True, indent=1)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    try:
        text = (folder / MANIFEST).read_text()
        content = json.loads(text)
    except FileNotFoundError:
        raise _Damaged(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise _Damaged(f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(content, dict) or not content.pop("sha256", None) or _signed(content) != text:
        raise _Damaged(f"{MANIFEST} differs from its own sha256")
    return content


def _verify(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the manifest if every file is as it was written, else raises _Damaged."""
    manifest = _read_manifest(folder)
    for name, (size, digest) in manifest["files"].items():
        try:
            with open(folder / name, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise _Damaged(f"{name} has {found} bytes, not {size}")
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise _Damaged(f"{name} differs from its sha256")
        except FileNotFoundError:
            raise _Damaged(f"{name} is missing") from None
        except OSError as error:
            raise _Damaged(f"{name} cannot be read ({error.strerror})") from error
    return manifest


def _list_files(folder: pathlib.Path) -> Iterator[tuple[str, tuple[int, str]]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                # On disk before an older checkpoint is given up, so a power cut cannot take both.
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield path.relative_to(folder).as_posix(), (path.stat().st_size, digest)


def _flatten(state: PyTree) -> dict[str, Any]:
    """Dotted name -> leaf, so that a file does not depend on the classes of the containers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _name_in(saved: Collection[str], name: str) -> str:
    """A leaf's name in a checkpoint: earlier versions named what terms train and remember without
    their section of the config, "terms.center" for "terms.joint.center".
    """
    earlier = re.sub(r"\b(terms|running)\.(loss|regularizers|joint|pairs)\.", r"\1.", name)
    return earlier if name not in saved and earlier in saved else name


def _shapes(flat: dict[str, Any]) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in flat.items()}


def _agree(value: int) -> int:
    """Process 0's value, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class Checkpoints:
    """Saves train states asynchronously, keeps the latest and the best, restores only whole ones.

    Every process calls every method; process 0 writes manifests, verifies and decides. The
    directory must be one that all processes see.

    Args:
        directory: where the step folders go; created by the first save.
        best_metric: key of `metrics` that ranks steps, higher is better; None keeps no best.
        keep_latest: number of newest steps to keep; 2, so one remains if the newest is damaged.
        keep_best: number of best steps to keep besides.

    Raises:
        ValueError: keep_latest below 1 or keep_best below 0.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        best_metric: str | None = None,
        keep_latest: int = 2,
        keep_best: int = 1,
    ):
        if keep_latest < 1 or keep_best < 0:
            raise ValueError(
                f"keep_latest={keep_latest}, keep_best={keep_best}: keep at least one latest step"
            )
        for logger in (logging.get_absl_logger(), std_logging.getLogger("asyncio")):
            logger.addFilter(_is_not_orbax_chatter)
        if getattr(sys.unraisablehook, "func", None) is not _drop_late_callbacks:
            sys.unraisablehook = functools.partial(_drop_late_callbacks, sys.unraisablehook)
        # Orbax accepts a relative path and fails later, in the background.
        self._directory = pathlib.Path(os.path.abspath(directory))
        self._best_metric = best_metric
        self._keep_latest = keep_latest
        self._keep_best = keep_best
        self._sealer = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sealing: tuple[int, futures.Future[None]] | None = None
        self._current: set[int] = set()  # saved or restored here, so known to be this run's
        self._damaged: set[int] = set()

    @functools.cached_property
    def _orbax(self) -> Any:
        """Imported when it is first needed: a new run reaches its first step earlier."""
        import orbax.checkpoint as ocp

        return ocp.StandardCheckpointer()

    def steps(self) -> list[int]:
        """Returns the steps on disk, ascending, damaged ones included."""
        if not self._directory.is_dir():
            return []
        folders = [path for path in self._directory.iterdir() if path.name.isdecimal()]
        return sorted(int(path.name) for path in folders if path.is_dir())

    def save(
        self,
        step: int,
        state: PyTree,
        meta: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Copies the state to the host and writes it in the background.

        An error of the background work is raised by the next save, wait, restore or close. A step
        that this object saved or restored before is left as it is.

        Args:
            step: number of updates done.
            state: pytree of global arrays, in any sharding.
            meta: JSON values: iterator state, dataset fingerprint, config hash.
            metrics: evaluation results at this step, if there are any.

        Raises:
            ValueError: a sound checkpoint of this or a later step is there that this run neither
                saved nor restored, or metrics lack best_metric.
            OSError: no space left, here or in the previous save; earlier steps stay sound.
        """
        self.wait()
        if step in self._current:
            return
        self._refuse_to_rewind(step)
        flat = _flatten(state)
        content = {
            "meta": json.loads(json.dumps(meta)),  # as it is now, and an error now if it is no JSON
            "shapes": _shapes(flat),
            "metric": self._metric(metrics),
        }
        unfinished = self._directory / f"{step}{_UNFINISHED}"
        try:
            self._require_space(sum(leaf.nbytes for leaf in flat.values()))
            self._orbax.save(unfinished, flat)
        except Exception as error:
            raise self._failure(step, error) from error
        self._sealing = step, self._sealer.submit(self._seal, step, unfinished, content)

    def restore(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Returns the newest step that verifies; each newer one is named in a warning.

        Args:
            like: pytree of jax.ShapeDtypeStruct with sharding, or of arrays; the shardings need not
                be those of the run that saved.

        Returns:
            (step, state, meta), or None if nothing has been saved.

        Raises:
            ValueError: no step verifies, or the state has other names, shapes or dtypes than like.
        """
        self.wait()
        chosen = _agree(self._choose(self.steps()) if jax.process_index() == 0 else 0)
        if chosen == _NONE_SAVED:
            return None
        if chosen == _NONE_GOOD:
            raise ValueError(
                f"{self._directory}: no checkpoint passes verification (the warnings above say"
                " why); put back a sound copy, or delete the folder to start again"
            )
        folder = self._directory / str(chosen)
        manifest = _read_manifest(folder)
        saved = manifest["shapes"]
        flat = {_name_in(saved, name): leaf for name, leaf in _flatten(like).items()}
        self._require_fit(folder, saved, _shapes(flat))
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in flat.items()
        }
        restored = self._orbax.restore(folder, target)
        self._current.add(chosen)
        leaves = [restored[name] for name in flat]
        return chosen, jax.tree.unflatten(jax.tree.structure(like), leaves), manifest["meta"]

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
            OSError: no space left; earlier steps stay sound.
        """
        if self._sealing is None:
            return
        (step, sealing), self._sealing = self._sealing, None
        try:
            sealing.result()
        except Exception as error:
            raise self._failure(step, error) from error
        self._current.add(step)

    def close(self) -> None:
        """Waits for the last save and ends the background threads; may be called twice."""
        try:
            self.wait()
        finally:
            self._sealer.shutdown()
            if "_orbax" in vars(self):
                self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _seal(self, step: int, unfinished: pathlib.Path, content: dict[str, Any]) -> None:
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        manifest = _signed(content | {"files": dict(_list_files(unfinished))})
        with open(unfinished / MANIFEST, "w") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        folder = self._directory / str(step)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        self._damaged.discard(step)
        sound = self._sound()
        keep = set(sorted(sound)[-self._keep_latest :]) | set(
            self._ranked(sound)[: self._keep_best]
        )
        for old in set(self.steps()) - keep:
            # Killed in between, it must not leave a folder that looks like a damaged checkpoint.
            leaving = self._directory / f"{old}{_UNFINISHED}"
            (self._directory / str(old)).rename(leaving)
            shutil.rmtree(leaving)

    def _sound(self) -> dict[int, dict[str, Any]]:
        """Manifests of the steps not known to be damaged."""
        sound = {}
        for step in self.steps():
            if step not in self._damaged:
                try:
                    sound[step] = _read_manifest(self._directory / str(step))
                except _Damaged as damage:
                    self._pass_over(step, damage)
        return sound

    def _ranked(self, manifests: dict[int, dict[str, Any]]) -> list[int]:
        rated = [(m["metric"], step) for step, m in manifests.items() if m["metric"] is not None]
        return [step for _, step in sorted(rated, reverse=True)]

    def _metric(self, metrics: dict[str, float] | None) -> float | None:
        if metrics is None or self._best_metric is None:
            return None
        if self._best_metric not in metrics:
            raise ValueError(
                f"metrics have no {self._best_metric!r} to rank checkpoints by; they have"
                f" {', '.join(sorted(metrics)) or 'nothing'}"
            )
        value = float(metrics[self._best_metric])
        return value if math.isfinite(value) else None

    def _choose(self, candidates: Sequence[int]) -> int:
        """The newest of these steps that verifies."""
        for candidate in reversed(candidates):
            try:
                _verify(self._directory / str(candidate))
                return candidate
            except _Damaged as damage:
                self._pass_over(candidate, damage)
        return _NONE_GOOD if candidates else _NONE_SAVED

    def _pass_over(self, step: int, damage: _Damaged) -> None:
        self._damaged.add(step)
        logging.warning("checkpoint %s/%d is not used: %s", self._directory, step, damage)

    def _refuse_to_rewind(self, step: int) -> None:
        later = [s for s in self.steps() if s >= step and s not in self._current | self._damaged]
        sound = _NONE_GOOD
        if jax.process_index() == 0:
            sound = next((s for s in reversed(later) if self._choose([s]) == s), _NONE_GOOD)
        sound = _agree(sound)
        if sound != _NONE_GOOD:
            raise ValueError(
                f"{self._directory}/{sound} is a checkpoint this run did not continue from, and"
                f" step {step} would replace or precede it; delete it or use another workdir"
            )

    def _require_fit(
        self, folder: pathlib.Path, saved: dict[str, str], wanted: dict[str, str]
    ) -> None:
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"{folder} was saved by another model or optimizer: {name} is"
                    f" {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here;"
                    " use the config it was trained with, or another workdir"
                )

    def _require_space(self, needed: int) -> None:
        """Fails before anything is written: on a disk that fills later Orbax fails noisily."""
        free = needed
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._discard_unfinished()
            free = shutil.disk_usage(self._directory).free
        if not _agree(int(free >= needed)):
            raise OSError(errno.ENOSPC, "No space left")

    def _discard_unfinished(self) -> None:
        for path in self._directory.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(path)

    def _failure(self, step: int, error: Exception) -> Exception:
        """What to raise for an error while saving, after removing what it left half-written."""
        if jax.process_index() == 0:
            self._discard_unfinished()
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in str(error) or "quota exceeded" in str(error)
        if full:
            return OSError(
                errno.ENOSPC,
                f"no space left for the checkpoint of step {step}; earlier steps are sound",
                str(self._directory),
            )
        return error
