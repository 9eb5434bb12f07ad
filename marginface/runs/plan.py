"""Where runs go, and what a sweep writes down before it starts: sweep.json, all of its units."""

import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from marginface import config as configs
from marginface.runs.files import write_atomically
from marginface.runs.folder import may_change

SWEEP = "sweep.json"


def folder_name(
    experiment: str, changes: Mapping[str, Any] | None = None, *, of_one_run: bool = False
) -> str:
    """<experiment>[-<variant>][-<digest of the changes>], fit for a file system.

    The folder of a sweep, whose units lie in it, and that of one run without a sweep have names of
    two rules. Both stay as they are, because runs are continued where they lie:

        a sweep   keeps "," and "+"; changes of what may_change names make no other folder
        one run   has "-" for them; every change makes another folder

    Args:
        experiment: "experiments/arcface.py[:variant]".
        changes: dotted key → value; of one run, as typed: a text.
        of_one_run: that of one run without a sweep.
    """
    path, variant = configs.parts(experiment)
    name = "-".join(filter(None, (path.stem, variant)))
    name = re.sub(r"[^\w.=-]+" if of_one_run else r"[^\w.=,+-]+", "-", name)
    changes = dict(changes or {})
    if not of_one_run:
        changes = {k: v for k, v in changes.items() if not may_change(k)}
    if changes:
        name += "-" + hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:6]
    return name


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
