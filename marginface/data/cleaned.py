"""A training set without the images that a list leaves out, and with the list's labels."""

import dataclasses
import hashlib
import operator
import os
import pathlib
import re
from typing import Any

import numpy as np

from marginface.data import Faces, RandomAccess, Record
from marginface.typing import Int

COLUMNS = "index,label,new_label,angle"
_LINE = re.compile(rb"(\d{1,18}),(\d{1,18}),(-1|\d{1,18}),(?:\d{1,3}(?:\.\d{1,9})?|nan)\r?\n?")
_MAX_LINE = 72  # bytes


@dataclasses.dataclass(frozen=True, eq=False)
class _Relabelled:
    """Record i is record rows[i] of the source under labels[i]."""

    source: RandomAccess
    rows: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Record:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} in a data set of {len(self)} images")
        row = int(self.rows[index])
        record = self.source[row]
        if record.get("unreadable", 0):  # another image stands in for it, under another label
            raise ValueError(
                f"image {row} cannot be read, but the cleaned list keeps it: repair the image, or "
                "write -1 as its new_label"
            )
        return {**record, "label": self.labels[index]}


def relabel(faces: Faces, path: str | os.PathLike[str]) -> Faces:
    """The images of `faces` that the list at `path` keeps, under the list's new labels.

    The list is what `python -m marginface.clean` writes: the columns index, label, new_label and
    angle, a line for every image in order; new_label −1 leaves it out.

    Args:
        faces: the training set that the list was made of.
        path: the list.

    Returns:
        The same classes, fewer images; the fingerprint follows from both contents.

    Raises:
        FileNotFoundError: nothing at path.
        ValueError: the list is damaged, of another data set, or keeps no image; names file and
            line.
    """
    path, old = pathlib.Path(path), faces.labels()
    if not path.is_file():
        raise FileNotFoundError(
            f"no cleaned list at {path}: write it with python -m marginface.clean RUN --out {path}"
        )
    if path.stat().st_size > _MAX_LINE * (len(old) + 1):
        raise ValueError(
            f"{path} is too large for a list of {len(old)} images: give one that marginface.clean "
            "made of this data set"
        )
    labels, digest = np.empty(len(old), np.int32), hashlib.sha256()
    with path.open("rb") as file:
        header = file.readline()
        digest.update(header)
        if header.strip() != COLUMNS.encode():
            raise ValueError(f"{path}, line 1: the columns must be {COLUMNS}")
        index = -1
        for index, line in enumerate(file):
            labels[index] = _new_label(line, index, old, faces.num_classes, path)
            digest.update(line)
    if index + 1 < len(old):
        raise ValueError(
            f"{path} ends after {index + 1} of {len(old)} images: make it anew of this data set"
        )
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise ValueError(f"{path} leaves out every image: use a larger --max_angle")
    kept = labels[rows]
    content = faces.fingerprint + digest.hexdigest()
    return dataclasses.replace(
        faces,
        source=_Relabelled(faces.source, rows, kept),
        labels=lambda: kept,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
    )


def _new_label(
    line: bytes, index: int, old: np.ndarray, num_classes: int, path: pathlib.Path
) -> int:
    """The new label in the line of image `index`, whose label in the data set is old[index]."""
    where = f"{path}, line {index + 2}"
    if not (match := _LINE.fullmatch(line)):
        shown = line[:_MAX_LINE].decode("ascii", "replace").strip()
        raise ValueError(f"{where}: {shown!r} is not {COLUMNS}")
    at, label, new = map(int, match.groups())
    if index >= len(old):
        raise ValueError(f"{where}: the data set has only {len(old)} images: use its own list")
    if at != index:
        raise ValueError(f"{where}: index {at} stands where {index} must: keep every line in order")
    if label != old[index]:
        raise ValueError(
            f"{where}: image {index} has label {label} here and {old[index]} in the data set: use "
            "the list made of this data set"
        )
    if new >= num_classes:
        raise ValueError(
            f"{where}: new_label {new} is no class: give 0 to {num_classes - 1}, or -1 to leave "
            "the image out"
        )
    return new
