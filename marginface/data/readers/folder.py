"""Faces in a folder or zip file of `identity/image` files."""

import dataclasses
import hashlib
import operator
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex, cast

import numpy as np

from marginface.data import Faces, Pairs, Record
from marginface.data.archives import MAX_MEMBERS, Files, open_files, text
from marginface.data.held_out import draw_pairs, images_of
from marginface.data.images import MAX_PIXELS, SUFFIXES, Augment, Frame, decode
from marginface.typing import Array, Bool, Float, Int

_SKIPS = 100


def by_identity(files: Files) -> dict[str, np.ndarray]:
    """Returns identity -> file rows, both in the order of their names.

    The identity is the folder that holds the image; an archive may keep all identities below one
    or more common folders. Files that are not images by their suffix, and images in no folder,
    are left out.
    """
    kept: dict[str, list[int]] = {}
    for i, name in enumerate(files.names):
        parent, slash, file = text(name).rpartition("/")
        if slash and file.lower().endswith(SUFFIXES):
            kept.setdefault(parent, []).append(i)
    return {identity: np.array(rows, np.int64) for identity, rows in sorted(kept.items())}


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Random access to decoded images: record i is file rows[i] under labels[i].

    A record is {"image": uint8 [oh, ow, 3], the frame's outer box; "label": int32; "unreadable":
    int32}. With skip, an unreadable image is replaced by the next readable record (with its own
    label; the last is followed by the first) and "unreadable" counts the records passed over;
    this depends on i alone, hence not on workers. skip None is that of a test, which cannot skip.

    Raises:
      ValueError: an unreadable image (names it), or with skip, 100 of them in a row.
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


def load(
    *,
    root: str | os.PathLike,
    image_size: int | Sequence[int],
    crop: float = 1.0,
    augment: Mapping[str, Any] | None = None,
    unreadable: str = "stop",
    min_images: int = 1,
    test_identities: int = 0,
    test_pairs: int = 6000,
    folds: int = 10,
    seed: int = 0,
    lfw_root: str | os.PathLike | None = None,
    max_members: int = MAX_MEMBERS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Faces, dict[str, Pairs]]:
    """Training faces and held-out verification pairs from `identity/image` files.

    Args:
      root: a folder, or a zip file.
      image_size: side, or (height, width), that the network sees.
      crop: middle fraction of the (squared) image that becomes image_size.
      augment: random changes in training; keys of images.Augment.
      unreadable: "stop" names the first unreadable image; "skip" trains on the next one instead
        and counts. The test always stops.
      min_images: people with fewer images are left out.
      test_identities: people drawn for the test, never trained on; 0 gives no test.
      test_pairs: verification pairs, half same and half different.
      folds: identity-disjoint folds of the test.
      seed: of the choice of test people and pairs; keep it while comparing runs.
      lfw_root: where LFW lies, to test on its ten folds as well (see lfw.verification); empty
        for no such test. People of LFW must have been removed from root.
      max_members: the most files read from root.
      max_pixels: the most pixels of an image.

    Returns:
      (Faces, {"held_out": Pairs, "lfw": Pairs}), with those tests that were asked for.

    Raises:
      FileNotFoundError: nothing at root.
      ValueError: no images, too few people, or hostile content.
    """
    if not str(root):
        raise ValueError(
            "data.kw.root is empty: give your faces behind the experiment's name, as in "
            "experiments/arcface.py:data=folder,root=faces.zip"
        )
    frame, changes = Frame.of(image_size, crop), Augment.of(augment or {})
    files = open_files(pathlib.Path(root), max_members=max_members)
    people = [rows for rows in by_identity(files).values() if len(rows) >= min_images]
    if not people:
        raise ValueError(
            f"{root} holds no identity/image files of {min_images} images a person or more "
            f"({', '.join(SUFFIXES)})"
        )
    if not 0 <= test_identities < len(people):
        raise ValueError(
            f"test_identities {test_identities} must leave somebody of the {len(people)} people "
            f"in {root} to train on"
        )
    order = np.random.default_rng(seed).permutation(len(people))
    test, train = np.sort(order[:test_identities]), np.sort(order[test_identities:])
    trained = faces(
        files,
        [people[i] for i in train],
        frame=frame,
        augment=changes,
        unreadable=unreadable,
        max_pixels=max_pixels,
    )
    tests = {}
    if test_identities:
        drawn = draw_pairs([people[i] for i in test], num_pairs=test_pairs, folds=folds, seed=seed)
        tests["held_out"] = pairs(
            files, *drawn, frame=frame, protocol="folds", name="held_out", max_pixels=max_pixels
        )
    if lfw_root:
        from marginface.data.readers import lfw  # which is itself built on this module

        tests["lfw"] = lfw.verification(root=lfw_root, image_size=image_size, crop=crop)
    # A run that goes on is to be tested on what it was tested on before.
    content = [trained.fingerprint, *(digest(test) for test in tests.values())]
    fingerprint = hashlib.sha256(" ".join(content).encode()).hexdigest()
    return dataclasses.replace(trained, fingerprint=fingerprint), tests
