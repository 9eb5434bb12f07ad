"""Faces in a folder or zip file of `identity/image` files."""

import dataclasses
import hashlib
import operator
import os
import pathlib
import stat
import struct
import threading
import weakref
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from marginface.data import Faces, Pairs, Record
from marginface.data.images import MAX_PIXELS, SUFFIXES, Augment, Frame, decode
from marginface.typing import Array, Bool, Float, Int

MAX_MEMBERS = 20_000_000
MAX_BYTES = 64 * 2**20
_MAX_NAME = 1024
_HASHED = 1024
_SKIPS = 100

Names = np.ndarray  # of bytes: an index of millions of files is a few arrays, quick to pickle


class FolderFiles:
    """The files one level below a folder, and below its folders: `image` and `identity/image`.

    Symbolic links are followed only to places inside the folder.

    Raises:
      ValueError: a link out of the folder, a name over 1,024 bytes, or too many files.
    """

    def __init__(self, root: pathlib.Path, *, max_members: int = MAX_MEMBERS):
        self.root = root
        real_root = os.path.realpath(root)
        names, sizes = [], []

        def walk(folder: str, prefix: str) -> None:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink() and not _inside(os.path.realpath(entry.path), real_root):
                        raise ValueError(
                            f"{entry.path} is a symbolic link out of {root}; copy what it points to"
                        )
                    if entry.is_dir():
                        if not prefix:
                            walk(entry.path, f"{entry.name}/")
                    elif entry.is_file():
                        names.append(_checked_name(prefix + entry.name, root))
                        sizes.append(entry.stat().st_size)
                        if len(names) > max_members:
                            raise ValueError(f"{root} holds more than {max_members} files")

        walk(os.fspath(root), "")
        order = np.argsort(np.array(names, dtype=bytes), kind="stable") if names else []
        self.names: Names = np.array(names, dtype=bytes)[order]
        self.sizes = np.array(sizes, dtype=np.int64)[order]

    def read(self, i: SupportsIndex) -> bytes:
        """Returns the bytes of file i.

        Raises:
          OSError: it cannot be read.
          ValueError: it is not a plain file, or over 64 MiB.
        """
        path = os.path.join(os.fsencode(self.root), self.names[i])
        with open(path, "rb", opener=lambda p, f: os.open(p, f | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise ValueError(f"not a plain file of at most {MAX_BYTES} bytes")
            return file.read(MAX_BYTES)

    def digest(self, rows: Int[np.ndarray, " n"]) -> str:
        """sha256 over names and sizes of the rows, and the bytes of up to 1,024 of them.

        Reading all bytes of millions of files would take as long as an epoch. Every added, removed,
        renamed or resized file is seen; another content of equal length is seen only in the 1,024
        files that are read whole, evenly spaced in the order of their names.
        """
        rows = np.sort(rows)
        result = hashlib.sha256()
        for i in rows:
            result.update(b"%s\0%d\n" % (self.names[i], self.sizes[i]))
        for i in rows[np.linspace(0, len(rows) - 1, min(_HASHED, len(rows))).astype(int)]:
            try:
                result.update(hashlib.sha256(self.read(i)).digest())
            except (OSError, ValueError):
                result.update(b"unreadable")
        return result.hexdigest()


class ZipFiles:
    """The members of a zip file, read without unpacking; safe across threads and processes.

    The index is arrays of names, offsets, sizes and checksums. The file is opened at the first
    read of each process and read by position, so that no two readers share a file pointer.

    Raises:
      ValueError: not a zip file; an absolute name or one with `..`; a member declared over 64 MiB,
        encrypted, or neither stored nor deflated; a name twice; too many members.
    """

    def __init__(self, path: pathlib.Path, *, max_members: int = MAX_MEMBERS):
        self.root = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if not m.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable zip file: {error}") from error
        if len(members) > max_members:
            raise ValueError(f"{path} holds more than {max_members} files")
        members = [m for m in members if not _hidden(m.filename)]
        names = [_checked_name(m.filename, path) for m in members]
        for member in members:
            if member.file_size > MAX_BYTES or member.compress_size > MAX_BYTES:
                raise ValueError(f"{path}: {member.filename} is declared over {MAX_BYTES} bytes")
            if member.flag_bits & 1 or member.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                raise ValueError(f"{path}: {member.filename} is encrypted or oddly compressed")
        order = np.argsort(np.array(names, dtype=bytes), kind="stable") if names else []
        self.names: Names = np.array(names, dtype=bytes)[order]
        if len(repeated := np.flatnonzero(self.names[1:] == self.names[:-1])):
            raise ValueError(f"{path} holds {_text(self.names[repeated[0]])} twice")
        self.sizes, self.crcs, self._packed, self._offsets, self._methods = (
            np.array(
                [
                    (m.file_size, m.CRC, m.compress_size, m.header_offset, m.compress_type)
                    for m in members
                ],
                dtype=np.int64,
            )
            .reshape(-1, 5)[order]
            .T
        )
        self._lock = threading.Lock()
        self._file: int | None = None

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_file")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.Lock(), _file=None)

    def read(self, i: SupportsIndex) -> bytes:
        """Returns the bytes of member i, checked against its size and checksum.

        Raises:
          OSError: the file cannot be read.
          ValueError: the member is truncated, longer than declared, or damaged.
        """
        with self._lock:
            if self._file is None:
                self._file = os.open(self.root, os.O_RDONLY)
                weakref.finalize(self, os.close, self._file)
        header = os.pread(self._file, 30, int(self._offsets[i]))
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError("damaged zip member")
        start = int(self._offsets[i]) + 30 + sum(struct.unpack_from("<HH", header, 26))
        data = os.pread(self._file, int(self._packed[i]), start)
        if self._methods[i] == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, int(self.sizes[i]) + 1)
            except zlib.error as error:
                raise ValueError(f"damaged zip member: {error}") from error
        if len(data) != self.sizes[i] or zlib.crc32(data) != self.crcs[i]:
            raise ValueError("damaged zip member: its size or checksum differs from the index")
        return data

    def digest(self, rows: Int[np.ndarray, " n"]) -> str:
        """sha256 over names, sizes and CRC-32s of the rows: any change of content is seen."""
        result = hashlib.sha256()
        for i in np.sort(rows):
            result.update(b"%s\0%d %d\n" % (self.names[i], self.sizes[i], self.crcs[i]))
        return result.hexdigest()


Files = FolderFiles | ZipFiles


def open_files(path: pathlib.Path, *, max_members: int = MAX_MEMBERS) -> Files:
    """Opens a folder or zip file.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: content that is not safe to read; see FolderFiles and ZipFiles.
    """
    if path.is_dir():
        return FolderFiles(path, max_members=max_members)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a folder or zip file of identity/image files"
        )
    return ZipFiles(path, max_members=max_members)


def _hidden(name: str) -> bool:
    return name.startswith("__MACOSX/") or name.rsplit("/", 1)[-1].startswith(".")


def _inside(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def _checked_name(name: str, root: pathlib.Path) -> bytes:
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[0] or ":" in parts[0]:
        raise ValueError(f"{root}: {name!r} leads out of the archive; refusing to read any of it")
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > _MAX_NAME:
        raise ValueError(f"{root}: a name of {len(encoded)} bytes ({name[:40]!r}...)")
    return encoded


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def by_identity(files: Files) -> dict[str, np.ndarray]:
    """Returns identity -> file rows, both in the order of their names.

    The identity is the folder that holds the image; an archive may keep all identities below one
    or more common folders. Files that are not images by their suffix, and images in no folder,
    are left out.
    """
    kept: dict[str, list[int]] = {}
    for i, name in enumerate(files.names):
        parent, slash, file = _text(name).rpartition("/")
        if slash and file.lower().endswith(SUFFIXES):
            kept.setdefault(parent, []).append(i)
    return {identity: np.array(rows, np.int64) for identity, rows in sorted(kept.items())}


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Random access to decoded images: record i is file rows[i] under labels[i].

    A record is {"image": uint8 [oh, ow, 3], the frame's outer box; "label": int32; "unreadable":
    int32}. With skip, an unreadable image is replaced by the next readable record (with its own
    label; the last is followed by the first) and "unreadable" counts the records passed over;
    this depends on i alone, hence not on workers.

    Raises:
      ValueError: an unreadable image (names it), or with skip, 100 of them in a row.
    """

    files: Files
    rows: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    frame: Frame
    skip: bool = False
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
        raise ValueError(f'{reason}; repair or remove it, or set unreadable="skip" to train on')

    def path(self, i: SupportsIndex) -> str:
        """Where record i lies, for people."""
        return f"{self.files.root}/{_text(self.files.names[self.rows[i]])}"


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
    rows, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    left, right = places.reshape(2, -1).astype(np.int64)
    return Pairs(
        source=Images(files, rows, rows.astype(np.int32), frame, False, max_pixels),
        decode=Centre(frame),
        to_images=to_images,
        first=left,
        second=right,
        same=same,
        fold=fold,
        protocol=protocol,
        name=name,
    )


def draw_pairs(
    people: Sequence[np.ndarray], *, num_pairs: int, folds: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws verification pairs, half same and half different, in identity-disjoint folds.

    People are dealt to the folds at random. Within a fold, pairs are drawn without repetition, as
    many of each kind as the fold has, up to num_pairs / (2·folds).

    Args:
      people: file rows [n_i] of each person.
      num_pairs: all pairs wanted.
      folds: disjoint groups of people.
      seed: of the draw.

    Returns:
      first, second (file rows), same, fold, each [n], n <= num_pairs.

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
        from marginface.data import lfw  # which is itself built on this module

        tests["lfw"] = lfw.verification(root=lfw_root, image_size=image_size, crop=crop)
    return trained, tests
