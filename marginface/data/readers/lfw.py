"""Labeled Faces in the Wild: its images, its lists of people and pairs, its two protocols."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from marginface.data import Faces, Pairs, archives, photos
from marginface.data.images import Augment, Frame

IMAGES = "lfw_deepfunneled_112_q90.zip"
LISTS = "lfw_lists.zip"

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Lists:
    """LFW's text lists, read as rows of its image files."""

    def __init__(self, root: pathlib.Path, images: str, lists: str):
        for part, content in ((images, "Name/Name_0001.jpg files"), (lists, "pairs.txt and more")):
            if not (root / part).exists():
                raise FileNotFoundError(
                    f"LFW: no {root / part}; set data.kw.root to a folder that holds {images} and "
                    f"{lists} ({part}: a folder or zip file of {content})"
                )
        self.files = archives.open_files(root / images)
        self._lists = archives.open_files(root / lists)
        self._rows = {
            row.decode("utf-8", "replace").rsplit("/", 1)[-1]: i
            for i, row in enumerate(self.files.names)
        }

    def _lines(self, name: str) -> list[tuple[int, list[str]]]:
        """Returns (number, fields) of each line of a list."""
        found = np.flatnonzero(self._lists.names == name.encode())
        if not len(found):
            raise FileNotFoundError(f"LFW: {self._lists.root} holds no {name}")
        text = self._lists.read(found[0]).decode("utf-8", "replace")
        lines = [(i, line.split()) for i, line in enumerate(text.splitlines(), 1)]
        lines = [(i, fields) for i, fields in lines if fields]
        if not lines:
            raise ValueError(f"LFW: {name} is empty")
        return lines

    def fingerprint(self, rows: np.ndarray) -> str:
        """Digests of images and of all lists."""
        return f"{self.files.digest(rows)} {self._lists.digest(np.arange(len(self._lists.names)))}"

    def rows(self, person: str, numbers: Iterable[int]) -> np.ndarray:
        """Returns the file rows of one person's images."""
        rows = []
        for number in numbers:
            name = f"{person}_{number:04d}.jpg"
            if name not in self._rows:
                raise FileNotFoundError(f"LFW: {self.files.root} holds no {name}, but a list does")
            rows.append(self._rows[name])
        return np.array(rows, np.int64)

    def people(self, name: str) -> list[list[np.ndarray]]:
        """Returns the sets of a people list; of each person the file rows.

        The list: the number of sets (absent if one); then for each set the number of its people
        and one line `person images` for each.
        """
        sets: list[list[np.ndarray]] = []
        counts: list[int] = []
        for number, fields in self._lines(name):
            match fields:
                case [count] if count.isdecimal():
                    sets.append([])
                    counts.append(int(count))
                case [person, count] if sets and count.isdecimal():
                    sets[-1].append(self.rows(person, range(1, int(count) + 1)))
                case _:
                    raise ValueError(f"LFW: {name}, line {number}: not `person images`")
        if len(sets) > 1 and not sets[0]:
            sets, counts = sets[1:], counts[1:]
        if counts != [len(people) for people in sets]:
            raise ValueError(f"LFW: {name} lists {[len(p) for p in sets]} people, not {counts}")
        return sets

    def pairs(self, name: str) -> Drawn:
        """Returns first and second (file rows), same and fold of a pairs list.

        The list: `folds n` or `n`; then for each fold n lines `person i j`, the same person, and n
        lines `person i person j`, different ones.
        """
        (_, header), *lines = self._lines(name)
        if not all(field.isdecimal() for field in header) or len(header) not in (1, 2):
            raise ValueError(f"LFW: {name}, line 1: not `folds pairs` or `pairs`")
        folds, half = (int(field) for field in (["1", *header])[-2:])
        if not lines or len(lines) != 2 * folds * half:
            raise ValueError(
                f"LFW: {name} has {len(lines)} pairs, but its first line says {folds} x 2 x {half}"
            )
        rows = []
        for number, fields in lines:
            match fields:
                case [person, i, j] if i.isdecimal() and j.isdecimal():
                    rows.append((*self.rows(person, (int(i), int(j))), True))
                case [person, i, other, j] if i.isdecimal() and j.isdecimal():
                    rows.append((*self.rows(person, [int(i)]), *self.rows(other, [int(j)]), False))
                case _:
                    raise ValueError(f"LFW: {name}, line {number}: not a pair")
        first, second, same = zip(*rows, strict=True)
        return (
            np.array(first, np.int64),
            np.array(second, np.int64),
            np.array(same, bool),
            np.repeat(np.arange(folds), 2 * half),
        )


def verification(
    *,
    root: str | os.PathLike,
    image_size: int | Sequence[int],
    crop: float = 1.0,
    images: str = IMAGES,
    lists: str = LISTS,
) -> Pairs:
    """The ten folds of View 2, for a network that was trained on other people than LFW's.

    Args, raises: as for load.

    Returns:
      Pairs "lfw", protocol "folds": 6,000 pairs, 300 same and 300 different in each fold.
    """
    lfw = Lists(pathlib.Path(root), images, lists)
    return photos.pairs(
        lfw.files,
        *lfw.pairs("pairs.txt"),
        frame=Frame.of(image_size, crop),
        protocol="folds",
        name="lfw",
    )


def load(
    *,
    root: str | os.PathLike,
    image_size: int | Sequence[int],
    protocol: str = "view1",
    fold: int = 0,
    crop: float = 1.0,
    augment: Mapping[str, Any] | None = None,
    unreadable: str = "stop",
    min_images: int = 1,
    images: str = IMAGES,
    lists: str = LISTS,
) -> tuple[Faces, dict[str, Pairs]]:
    """LFW without outside data, by either of its protocols; nobody is in training and test.

    view1 (development): train on peopleDevTrain.txt (4,038 people, 9,525 images), choose the
    threshold on pairsDevTrain.txt, test on pairsDevTest.txt (other people). view2, fold i: train
    without set i of people.txt, choose the threshold on the other nine folds of pairs.txt, test
    on fold i; the result of View 2 is the mean over ten such trainings.

    Args:
      root: the folder that holds `images` and `lists`.
      image_size: side, or (height, width), that the network sees.
      protocol: "view1" or "view2".
      fold: 0 to 9, with view2.
      crop: middle fraction of the stored crop that becomes image_size.
      augment: random changes in training; keys of images.Augment.
      unreadable: "stop" or "skip", in training; the test always stops.
      min_images: people with fewer images are not trained on.
      images: folder or zip file of Name/Name_0001.jpg files.
      lists: folder or zip file of LFW's text lists.

    Returns:
      (Faces, {"lfw": Pairs}), protocol "dev": fold 0 chooses the threshold, fold 1 is tested.

    Raises:
      FileNotFoundError: a file, or an image that a list names, is absent.
      ValueError: an unknown protocol or fold, a damaged list, or hostile content.

    References:
      G. B. Huang, M. Ramesh, T. Berg, E. Learned-Miller. Labeled Faces in the Wild, 2007.
      G. B. Huang, M. Mattar, H. Lee, E. Learned-Miller. Learning to Align from Scratch, 2012.
    """
    frame, changes = Frame.of(image_size, crop), Augment.of(augment or {})
    lfw = Lists(pathlib.Path(root), images, lists)
    if protocol == "view1":
        (people,) = lfw.people("peopleDevTrain.txt")
        chosen, tested = lfw.pairs("pairsDevTrain.txt"), lfw.pairs("pairsDevTest.txt")
        first, second, same = (np.concatenate([chosen[i], tested[i]]) for i in range(3))
        is_test = np.repeat([0, 1], [len(chosen[0]), len(tested[0])])
    elif protocol == "view2":
        sets = lfw.people("people.txt")
        if not 0 <= fold < len(sets):
            raise ValueError(f"LFW: fold is {fold}; use 0 to {len(sets) - 1}")
        people = [person for i, some in enumerate(sets) if i != fold for person in some]
        first, second, same, folds = lfw.pairs("pairs.txt")
        is_test = (folds == fold).astype(np.int64)
    else:
        raise ValueError(f'LFW: protocol is {protocol!r}; use "view1" or "view2"')
    people = [person for person in people if len(person) >= min_images]
    trained = photos.faces(lfw.files, people, frame=frame, augment=changes, unreadable=unreadable)
    content = f"{trained.fingerprint} {lfw.fingerprint(np.concatenate([first, second]))}"
    trained = dataclasses.replace(trained, fingerprint=hashlib.sha256(content.encode()).hexdigest())
    test = photos.pairs(
        lfw.files, first, second, same, is_test, frame=frame, protocol="dev", name="lfw"
    )
    return trained, {"lfw": test}
