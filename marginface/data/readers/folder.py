"""Faces in a folder or zip file of `identity/image` files."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marginface.data import Faces, Pairs, photos
from marginface.data.archives import MAX_MEMBERS, Files, open_files, text
from marginface.data.held_out import draw_pairs
from marginface.data.images import MAX_PIXELS, SUFFIXES, Augment, Frame
from marginface.data.readers import lfw


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
    trained = photos.faces(
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
        tests["held_out"] = photos.pairs(
            files, *drawn, frame=frame, protocol="folds", name="held_out", max_pixels=max_pixels
        )
    if lfw_root:
        tests["lfw"] = lfw.verification(root=lfw_root, image_size=image_size, crop=crop)
    # A run that goes on is to be tested on what it was tested on before.
    content = [trained.fingerprint, *(photos.digest(test) for test in tests.values())]
    fingerprint = hashlib.sha256(" ".join(content).encode()).hexdigest()
    return dataclasses.replace(trained, fingerprint=fingerprint), tests
