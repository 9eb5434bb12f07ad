"""Files that are whole or are not there, and JSON lines of which the last may be torn."""

import json
import os
import pathlib
import tempfile
from typing import Any

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


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no file. A broken last line is left out.

    Raises:
      ValueError: a broken line before the last; names the file and the line.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, or no text
            if number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(
                f"{path}, line {number} is not a JSON object with a step: mend or move it"
            )
        records.append(record)
    return records
