"""Folders and zip files as numbered files with names, read safely: both may be hostile."""

import hashlib
import os
import pathlib
import stat
import struct
import threading
import weakref
import zipfile
import zlib
from typing import SupportsIndex

import numpy as np

from marginface.typing import Int

MAX_MEMBERS = 20_000_000
MAX_BYTES = 64 * 2**20
_MAX_NAME = 1024
_HASHED = 1024

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
            raise ValueError(f"{path} holds {text(self.names[repeated[0]])} twice")
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


def text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
