"""What a sweep writes down before it starts: sweep.json, all of its units."""

import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from marginface import config as configs
from marginface.runs.files import write_atomically

SWEEP = "sweep.json"


def record(units: Iterable[Any]) -> None:
    """Writes down each sweep's units, so that a table can name those that never ran.

    Those recorded before stay: a sweep may grow by seeds and points.
    """
    for folder, group in itertools.groupby(units, lambda unit: unit.folder.parent):
        group = list(group)
        folder.mkdir(parents=True, exist_ok=True)
        path, variant = configs.parts(group[0].experiment)
        try:
            known = recorded(folder)["units"]
        except (OSError, ValueError):  # none yet, or damaged: made anew
            known = {}
        content = {
            "experiment": path.stem,
            "variant": variant,
            "units": known | {unit.name: unit.overrides for unit in group},
        }
        text = json.dumps(content, indent=1, default=list) + "\n"
        write_atomically(folder / SWEEP, text)


def recorded(folder: pathlib.Path) -> dict[str, Any]:
    """{"experiment", "variant", "units": {name: overrides}} of a sweep's folder.

    Raises:
        ValueError: the file is damaged; names it.
    """
    path = folder / SWEEP
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(o, dict) for o in content["units"].values()):
            raise TypeError
        return {key: content[key] for key in ("experiment", "variant", "units")}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: start the sweep again, it is made anew") from None


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's shortest end that names it alone; "weight" says too little."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        others = [other for other in keys if other != key]
        found[key] = next(
            (
                end
                for end in ends
                if end != "weight"
                and not any(other == end or other.endswith(f".{end}") for other in others)
            ),
            key,
        )
    return found
