"""Files that are whole or are not there."""

import os
import pathlib
import tempfile

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Either the old file or the whole new one: never a half, whenever the machine stops."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
