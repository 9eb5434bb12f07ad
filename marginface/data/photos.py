"""Faces in image files, whoever reads the files: training sets, verification sets, digests."""

import dataclasses
import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import SupportsIndex, cast

import numpy as np

from marginface.data import Faces, Pairs, Record
from marginface.data.archives import Files, text
from marginface.data.held_out import images_of
from marginface.data.images import MAX_PIXELS, Augment, Frame, decode
from marginface.typing import Array, Bool, Float, Int

_SKIPS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Random access to decoded images: record i is file rows[i] under labels[i].

    A record is {"image": uint8 [oh, ow, 3], the frame's outer box; "label": int32; "unreadable":
    int32}. With skip=True, the next readable record takes the place of an unreadable image (with
    its own label; the first follows the last) and "unreadable" counts the records passed over.
    This depends on i alone, so it is the same for any number of workers. skip=None never skips, as
    False, but the error does not advise it: it is for test sets.

    Raises:
      ValueError: an unreadable image (names it); with skip, 100 of them in a row.
    """

    files: Files
    rows: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    frame: Frame
    skip: bool | None = False
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: SupportsIndex) -> Record:
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        for passed in range(min(len(self), _SKIPS) if self.skip else 1):
            at = (i + passed) % len(self)
            try:
                image = self.frame.fit(
                    decode(
                        self.files.read(self.rows[at]),
                        max_pixels=self.max_pixels,
                        min_side=max(self.frame.outer),
                    )
                )
            except (OSError, ValueError) as error:
                reason = f"cannot read image {self.path(at)}: {' '.join(str(error).split())}"
                continue
            return {
                "image": image,
                "label": np.int32(self.labels[at]),
                "unreadable": np.int32(passed),
            }
        if self.skip:
            raise ValueError(f"no readable image in {passed + 1} in a row; {reason}")
        else_skip = "" if self.skip is None else ', or set data.kw.unreadable="skip" to train on'
        raise ValueError(f"{reason}; repair or remove it{else_skip}")

    def path(self, i: SupportsIndex) -> str:
        """Where record i lies, for people."""
        return f"{self.files.root}/{text(self.files.names[self.rows[i]])}"


@dataclasses.dataclass(frozen=True)
class RandomChanges:
    """Record -> training example, with the frame's crop and random changes."""

    augment: Augment
    frame: Frame

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        return {**record, "image": self.augment(record["image"], self.frame, rng)}


@dataclasses.dataclass(frozen=True)
class Centre:
    """Record -> example, with the frame's crop and no change."""

    frame: Frame

    def __call__(self, record: Record) -> Record:
        return {**record, "image": np.ascontiguousarray(self.frame.centre(record["image"]))}


def to_images(batch: Mapping) -> Float[Array, "b h w 3"]:
    """Batch -> float32 [b, h, w, 3] in [-1, 1], on the device: x / 127.5 - 1."""
    return batch["image"].astype(np.float32) / 127.5 - 1.0


def faces(
    files: Files,
    people: Sequence[np.ndarray],
    *,
    frame: Frame,
    augment: Augment,
    unreadable: str = "stop",
    max_pixels: int = MAX_PIXELS,
) -> Faces:
    """A training set of file rows, one sequence for each class.

    Raises:
      ValueError: no person, or an unknown policy for unreadable images.
    """
    if unreadable not in ("stop", "skip"):
        raise ValueError(f'unreadable is {unreadable!r}; use "stop" or "skip"')
    if not people:
        raise ValueError(f"{files.root}: nobody to train on")
    rows = np.concatenate(people)
    labels = np.repeat(np.arange(len(people), dtype=np.int32), [len(p) for p in people])
    content = files.digest(rows) + hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()
    return Faces(
        source=Images(files, rows, labels, frame, unreadable == "skip", max_pixels),
        num_classes=len(people),
        labels=lambda: labels,
        augment=RandomChanges(augment, frame),
        decode=Centre(frame),
        to_images=to_images,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
    )


def pairs(
    files: Files,
    first: Int[np.ndarray, " n"],
    second: Int[np.ndarray, " n"],
    same: Bool[np.ndarray, " n"],
    fold: Int[np.ndarray, " n"],
    *,
    frame: Frame,
    protocol: str,
    name: str,
    max_pixels: int = MAX_PIXELS,
) -> Pairs:
    """A verification set of pairs of file rows; each image occurs once in its source.

    An unreadable image always stops: a pair without it would be another test. The labels of the
    source are the file rows, as the pairs do not say who everybody is.
    """
    rows, first, second = images_of(first, second)
    return Pairs(
        source=Images(files, rows, rows.astype(np.int32), frame, None, max_pixels),
        decode=Centre(frame),
        to_images=to_images,
        first=first,
        second=second,
        same=same,
        fold=fold,
        protocol=protocol,
        name=name,
    )


def digest(pairs: Pairs) -> str:
    """sha256 of the images of a verification set of files, and of which ones are compared."""
    images = cast(Images, pairs.source)
    parts = [np.asarray(part) for part in (pairs.first, pairs.second, pairs.same, pairs.fold)]
    drawn = b"".join(part.astype("<i8").tobytes() for part in parts)
    content = images.files.digest(images.rows) + hashlib.sha256(drawn).hexdigest()
    return hashlib.sha256(content.encode()).hexdigest()
