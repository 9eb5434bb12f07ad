"""What a data set is: plain records on the host, images on the device."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from marginface.typing import Array, Bool, Int

__all__ = ["Faces", "Pairs", "RandomAccess", "Record"]

Record = dict[str, Any]


@runtime_checkable
class RandomAccess(Protocol):
    """Anything with a length whose items are records: dicts of numpy values."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Faces:
    """A training set.

    Attributes:
        source: records, always with "label" (int32); picklable.
        num_classes: labels run from 0 to num_classes - 1.
        labels: the labels of all records, int32 [n], without reading an image.
        augment: host side, training only: decodes and changes at random. What it gives has
            "label" and "unreadable" (int32), the number of images that could not be read and in
            whose place this one stands: readers of files count it in the record, others add a 0.
        decode: host side, evaluation: the same without randomness.
        to_images: device side, jittable: batch -> float32 [b, h, w, 3] in [-1, 1].
        fingerprint: sha256 of all that decides the content.
    """

    source: RandomAccess
    num_classes: int
    labels: Callable[[], Int[np.ndarray, " n"]]
    augment: Callable[[Record, np.random.Generator], Record]
    decode: Callable[[Record], Record]
    to_images: Callable[[dict[str, Any]], Array]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A verification set: pairs of images of the same or of different identities.

    Attributes:
        source: records of all images that occur in the pairs.
        decode: as in Faces.
        to_images: as in Faces.
        first: indices [n] into source.
        second: indices [n] into source.
        same: whether the pair shows one identity, [n].
        fold: fold number of each pair, [n].
        protocol: "folds" (k-fold, threshold from the other folds) or "dev" (threshold from fold 0,
            test on fold 1).
        name: what tables and metrics call it.
    """

    source: RandomAccess
    decode: Callable[[Record], Record]
    to_images: Callable[[dict[str, Any]], Array]
    first: Int[np.ndarray, " n"]
    second: Int[np.ndarray, " n"]
    same: Bool[np.ndarray, " n"]
    fold: Int[np.ndarray, " n"]
    protocol: str
    name: str
