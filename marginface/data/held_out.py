"""People held out of training, and the verification pairs of their images."""

import dataclasses
import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from marginface.data import Faces, Pairs, RandomAccess, Record
from marginface.typing import Int

NAME = "validation"
_SEED = 20  # chooses the people; not config.seed, so that all losses and trials have the same
_PAIRS, _FOLDS = 6000, 10
_IMAGES = 20  # of each person at most, so that no person makes most of the genuine pairs


@dataclasses.dataclass(frozen=True, eq=False)
class _Trained:
    """Record i is record rows[i] of the source under its new label."""

    source: RandomAccess
    rows: Int[np.ndarray, " n"]
    new_label: Int[np.ndarray, " c"]  # of each old one; −1 for the people held out

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Record:
        index = _checked(index, len(self))
        for passed in range(len(self)):
            record = self.source[int(self.rows[(index + passed) % len(self)])]
            label = self.new_label[record["label"]]
            if label >= 0:  # else one of those held out stands in for an unreadable image
                return {**record, "label": label}
        raise ValueError("no readable image of the people left to train on: repair the data set")


@dataclasses.dataclass(frozen=True, eq=False)
class _Verified:
    """Record i is record rows[i] of the source; nothing may stand in for an unreadable image."""

    source: RandomAccess
    rows: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Record:
        row = int(self.rows[_checked(index, len(self))])
        record = self.source[row]
        if record.get("unreadable", 0):
            raise ValueError(
                f"image {row} cannot be read, but it is held out for validation: repair or "
                "remove it"
            )
        return record


def hold_out(faces: Faces, identities: int) -> tuple[Faces, Pairs]:
    """Takes people out of a training set and makes a verification set of them.

    Who they are depends on the training set and their number alone. Their pairs are half genuine,
    half impostor, up to 6,000, from at most 20 images of each, in folds without a common person.
    Wrong labels in the training set are wrong in the pairs too.

    Args:
        faces: a training set by any reader.
        identities: how many people, of those with two images or more.

    Returns:
        The other classes, renumbered in their order, with another fingerprint; the verification
        set "validation".

    Raises:
        ValueError: too few to verify, or more than there are; names data.held_out.
    """
    labels = faces.labels()
    counts = np.bincount(labels, minlength=faces.num_classes)
    several = np.flatnonzero(counts > 1)
    if identities < 4:
        raise ValueError(f"data.held_out={identities}: give 4 or more, or 0 for none")
    if identities > min(len(several), faces.num_classes - 2):
        raise ValueError(
            f"data.held_out={identities}: of {faces.num_classes} identities {len(several)} have "
            "two images or more, and two must be left to train on; hold out fewer"
        )
    rng = np.random.default_rng(_SEED)
    chosen = np.sort(rng.choice(several, identities, replace=False))
    kept = np.setdiff1d(np.arange(faces.num_classes), chosen)
    new_label = np.full(faces.num_classes, -1, np.int32)
    new_label[kept] = np.arange(len(kept))
    rows = np.flatnonzero(new_label[labels] >= 0)
    new_labels = new_label[labels[rows]]
    digest = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
    content = f"{faces.fingerprint} without {digest}"
    trained = dataclasses.replace(
        faces,
        source=_Trained(faces.source, rows, new_label),
        num_classes=len(kept),
        labels=lambda: new_labels,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
    )
    people = [np.sort(rng.permutation(of)[:_IMAGES]) for of in _rows_of(chosen, labels)]
    return trained, _verification(faces, people)


def draw_pairs(
    people: Sequence[np.ndarray], *, num_pairs: int, folds: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws verification pairs, half same and half different, in identity-disjoint folds.

    People are dealt to the folds at random. Within a fold, pairs are drawn without repetition, as
    many of each kind as the fold has, up to num_pairs / (2·folds).

    Args:
      people: rows [n_i] of each person.
      num_pairs: all pairs wanted.
      folds: disjoint groups of people.
      seed: of the draw.

    Returns:
      first, second (rows), same, fold, each [n], n <= num_pairs.

    Raises:
      ValueError: a fold with no same or no different pair.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for fold, members in enumerate(np.array_split(rng.permutation(len(people)), folds)):
        rows = np.concatenate([people[i] for i in members]) if len(members) else np.zeros(0, int)
        who = np.repeat(members, [len(people[i]) for i in members])
        total = len(rows) * (len(rows) - 1) // 2
        wanted = num_pairs // (2 * folds)
        same_pairs = [
            (a, b) for i in members for k, a in enumerate(people[i]) for b in people[i][k + 1 :]
        ]
        wanted = min(wanted, len(same_pairs), total - len(same_pairs))
        if wanted < 1:
            raise ValueError(
                f"fold {fold} of the {len(people)} test identities has no same or no different "
                "pair; use more test identities, with two images or more, or fewer folds"
            )
        different: set[tuple[int, int]] = set()
        while len(different) < wanted:
            i, j = rng.integers(len(rows), size=2)
            if who[i] != who[j]:
                different.add((min(rows[i], rows[j]), max(rows[i], rows[j])))
        chosen = rng.choice(len(same_pairs), wanted, replace=False)
        drawn += [(*same_pairs[k], True, fold) for k in np.sort(chosen)]
        drawn += [(*pair, False, fold) for pair in sorted(different)]
    first, second, same, fold = zip(*drawn, strict=True)
    return (
        np.array(first, np.int64),
        np.array(second, np.int64),
        np.array(same, bool),
        np.array(fold, np.int64),
    )


def images_of(
    first: Int[np.ndarray, " n"], second: Int[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows in pairs, each once and in order; then the pairs as places among them."""
    rows, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    left, right = places.reshape(2, -1).astype(np.int64)
    return rows, left, right


def _verification(faces: Faces, people: Sequence[np.ndarray]) -> Pairs:
    folds = min(_FOLDS, len(people) // 2)
    first, second, same, fold = draw_pairs(people, num_pairs=_PAIRS, folds=folds, seed=_SEED)
    rows, first, second = images_of(first, second)
    return Pairs(
        source=_Verified(faces.source, rows),
        decode=faces.decode,
        to_images=faces.to_images,
        first=first,
        second=second,
        same=same,
        fold=fold,
        protocol="folds",
        name=NAME,
    )


def _rows_of(people: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """The rows of each of these people, found in one sort."""
    order = np.argsort(labels, kind="stable")
    begin, end = (np.searchsorted(labels[order], people, side=side) for side in ("left", "right"))
    return [order[a:b] for a, b in zip(begin, end, strict=True)]


def _checked(index: Any, length: int) -> int:
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"index {index} in a data set of {length} images")
    return index
