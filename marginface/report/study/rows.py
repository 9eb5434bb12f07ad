"""Runs as rows: one for each run folder, with what it measured and where that comes from.

A row is a plain dict: the columns of COLUMNS, then every figure of the run's summary.json under its
own name ("synthetic/accuracy", "time/wall_s"); None is a figure that was not finite, a name that is
absent one that was not measured. Two runs of one config and seed give the same row but for "time/".
"""

import csv
import hashlib
import io
import json
import math
import os
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from marginface.config import dotted, translate
from marginface.runs import folder as run_folder
from marginface.runs import plan, provenance

Row = dict[str, str | float | int | None]
Setting = tuple[str, str, str]

# setting_hash: of the config without its seed; runs that share it differ by their seed alone.
COLUMNS = (
    *("experiment", "variant", "overrides", "seed", "status"),
    *("commit", "config_hash", "setting_hash", "device", "versions"),
)
TOGETHER = "time/together"  # how many runs trained in one program
_SHARED = ("time/wall_s", "time/examples_per_s")  # of which each of them has a share only
_KEEP_OUT = {run_folder.CHECKPOINTS, run_folder.PLOTS}  # large, and no run lies in them
_READ = (run_folder.METRICS, run_folder.STOPPED, run_folder.SUMMARY, run_folder.LOG)
_LARGEST = 64 << 20  # bytes; no file that is read here is near it
_NOT_FINITE = "nan"


def gather(paths: Iterable[pathlib.Path]) -> list[Row]:
    """One row for each run in or below the paths, sorted by experiment, variant, overrides, seed.

    Args:
        paths: run folders, folders that hold some (at any depth), sweeps, or CSVs from `to_csv`.

    Raises:
        ValueError: a path without any run, or a damaged file; names it.
    """
    rows: list[Row] = []
    folders: dict[pathlib.Path, None] = {}
    for path in paths:
        if path.suffix == ".csv":
            rows += read_csv(path)
            continue
        found = _find(path)
        if not found:
            raise ValueError(f"{path} holds no run: give run folders, folders of them, or a CSV")
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    return sorted([*rows, *map(_row, folders)], key=_order)


def settings(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """(experiment, variant, overrides) → its rows: all that differ by the seed, in their order."""
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        key = (str(row["experiment"]), str(row["variant"]), str(row["overrides"]))
        found.setdefault(key, []).append(row)
    return found


def seed(row: Row) -> int:
    """The seed of a run."""
    return int(str(row["seed"]))


def figure(row: Row, name: str) -> float | None:
    """A figure of a run; None if it was not measured, not finite, or a share of others' time."""
    value = None if name in _SHARED and shares_time(row) else row.get(name)
    return float(value) if isinstance(value, int | float) else None


def shares_time(row: Row) -> bool:
    """Whether a run trained together with others in one program, and has no time of its own."""
    count = row.get(TOGETHER)
    return isinstance(count, int | float) and count > 1


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows; where both have the same setting and seed, the new ones only."""
    new = list(new)
    known = {_order(row) for row in new}
    return sorted([*(row for row in old if _order(row) not in known), *new], key=_order)


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV: COLUMNS, then every figure by name; `read_csv` gives equal rows back."""
    figures = sorted({name for row in rows for name in row} - set(COLUMNS))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *figures])
    for row in rows:
        writer.writerow([row[c] for c in COLUMNS] + [_cell(row, name) for name in figures])
    return text.getvalue()


def read_csv(path: pathlib.Path) -> list[Row]:
    """The rows of a CSV from `to_csv`.

    Raises:
        ValueError: no such table, or a damaged one; names the file, the line and the column.
    """
    try:
        lines = list(csv.reader(io.StringIO(_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is not a table of runs: {error}") from None
    header, lines = lines[0] if lines else [], lines[1:]
    if missing := [name for name in COLUMNS if name not in header]:
        raise ValueError(f"{path} has no column {missing[0]!r}: it is not a table of runs")
    if len(set(header)) < len(header):
        raise ValueError(f"{path} names a column twice: {sorted(header)}")
    return [_parsed(header, line, f"{path}, row {n}") for n, line in enumerate(lines, 2)]


def is_table(path: pathlib.Path) -> bool:
    """Whether a CSV has one row a run, as `to_csv` writes it."""
    with path.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader([file.readline(_LARGEST)]), [])
    return tuple(header[: len(COLUMNS)]) == COLUMNS


def _parsed(header: Sequence[str], line: Sequence[str], where: str) -> Row:
    if len(line) != len(header):
        raise ValueError(f"{where} has {len(line)} cells, not {len(header)}: mend or remove it")
    row: Row = {}
    for name, text in zip(header, line, strict=True):
        if name in COLUMNS and name != "seed":
            row[name] = text
        elif text or name == "seed":
            row[name] = _number(text, f"{where}, {name}")
    if not isinstance(row["seed"], int):
        raise ValueError(f"{where}, seed: {row['seed']!r} is not a whole number")
    return row


def _number(text: str, where: str) -> float | int | None:
    if text == _NOT_FINITE:
        return None
    try:
        value = int(text) if re.fullmatch(r"-?\d{1,18}", text) else float(text)
    except ValueError:
        raise ValueError(f"{where}: {text[:40]!r} is not a number") from None
    return value if math.isfinite(value) else None


def _cell(row: Row, name: str) -> str | float | int | None:
    return "" if name not in row else _NOT_FINITE if row[name] is None else row[name]


def _order(row: Row) -> tuple[str, str, str, int]:
    return str(row["experiment"]), str(row["variant"]), str(row["overrides"]), seed(row)


# ---- run folders --------------------------------------------------------------------------------


def _find(path: pathlib.Path) -> list[pathlib.Path]:
    """All run folders in or below a path: those with a config.json, and all units of sweeps."""
    if _planned(path) is not None:
        return [path]
    found = []
    for name, below, files in os.walk(path):
        folder = pathlib.Path(name)
        if plan.SWEEP in files:
            found += [folder / unit for unit in _sweep(folder)["units"]]
        if run_folder.CONFIG in files:
            found.append(folder)
        if run_folder.CONFIG in files and plan.SWEEP not in files:
            below.clear()
        below[:] = sorted(b for b in below if b not in _KEEP_OUT and not b.startswith("."))
    return found


def _row(folder: pathlib.Path) -> Row:
    for name in _READ:
        _size(folder / name)
    try:
        kind, why, _ = run_folder.state(folder)
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{folder} is damaged: run it again in a new folder") from None
    experiment, variant, overrides = _identity(folder)
    config = _json(folder / run_folder.CONFIG)
    summary = (_json(folder / run_folder.SUMMARY) or {}) if kind == "done" else {}
    own_seed = overrides.get("seed") if config is None else config.get("seed")
    if not isinstance(own_seed, int):
        raise ValueError(f"{folder}: its config has no seed, so it is no run's: move it away")
    versions = (k for k in summary if k.startswith("version/"))
    row: Row = {
        "experiment": experiment,
        "variant": ",".join(p for p in variant.split(",") if not p.startswith("root=")),
        "overrides": _words(overrides),
        "seed": own_seed,
        "status": f"{kind}: {' '.join(why.split())[:300]}" if why else kind,
        "commit": str(summary.get("commit", "")),
        "config_hash": "" if config is None else _digest(_text(folder / run_folder.CONFIG)),
        "setting_hash": "" if config is None else _digest(_without_seed(config)),
        "device": _device(summary),
        "versions": " ".join(f"{k.removeprefix('version/')} {summary[k]}" for k in versions),
    }
    return row | _figures(summary)


def _identity(folder: pathlib.Path) -> tuple[str, str, dict[str, Any]]:
    """Experiment, variant and overrides: as typed, as planned, or else the folder's name."""
    found = _json(folder / run_folder.ORIGIN) or _planned(folder) or {"experiment": folder.name}
    variant, overrides = found.get("variant", ""), found.get("overrides", {})
    if not isinstance(variant, str) or not isinstance(overrides, dict):
        raise ValueError(f"{folder / run_folder.ORIGIN} is damaged: move this run folder away")
    return str(found.get("experiment", folder.name)), variant, overrides


def _planned(folder: pathlib.Path) -> dict[str, Any] | None:
    """What the sweep around a folder says of it; None if there is none, or it is no unit."""
    if not (folder.parent / plan.SWEEP).is_file():
        return None
    sweep = _sweep(folder.parent)
    if folder.name not in sweep["units"]:
        return None
    return {**sweep, "overrides": sweep["units"][folder.name]}


def _sweep(folder: pathlib.Path) -> dict[str, Any]:
    _size(folder / plan.SWEEP)
    sweep = plan.recorded(folder)
    if wrong := [name for name in sweep["units"] if pathlib.PurePath(name).name != name]:
        raise ValueError(f"{folder / plan.SWEEP}: {wrong[0]!r} is no name of a run folder")
    return sweep


def _words(overrides: Mapping[str, Any]) -> str:
    """ "key=value key=value", sorted, without the seed and what only says where things are."""
    words = []
    for key, value in sorted(overrides.items()):
        if key == "seed" or run_folder.may_change(key):
            continue
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            value = int(value)  # 1 in the sweep is 1.0 in the run
        text = f"{key}={value if isinstance(value, str | bool) else json.dumps(value)}"
        words.append(shlex.quote(text) if re.search(r"[\s'\"\\]", text) else text)
    return " ".join(words)


def _figures(summary: Mapping[str, Any]) -> Row:
    """The numbers of a summary; None for one that is not finite."""
    return {
        name: _finite(value)
        for name, value in sorted(summary.items())
        if not name.startswith(provenance.ORIGIN) and name not in COLUMNS
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _finite(value: float | int | None) -> float | int | None:
    try:
        return value if value is not None and math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None


def _device(summary: Mapping[str, Any]) -> str:
    if "device/kind" not in summary:
        return ""
    text = f"{summary.get('device/count', '?')} x {summary['device/kind']}"
    processes = summary.get("device/processes", 1)
    return text if processes == 1 else f"{text}, {processes} processes"


def _without_seed(config: Mapping[str, Any]) -> str:
    flat = {
        key: value
        for key, value in dotted(translate(config)).items()
        if key != "seed" and not run_folder.may_change(key)
    }
    return json.dumps(flat, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _size(path: pathlib.Path) -> None:
    if path.is_file() and path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} is larger than {_LARGEST >> 20} MiB: no run leaves such a file")


def _text(path: pathlib.Path) -> str:
    _size(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    """A JSON object; None if there is no such file."""
    if not path.is_file():
        return None
    text = _text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON: move this run folder away") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: move this run folder away")
    return content
