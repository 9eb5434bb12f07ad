"""The units of a sweep: which runs there are, what each is called, and how far it is.

A unit is always the plain command a user would type, in a run folder of its own:

    ROOT/<experiment>[-<variant>]/sweep.json            all units of the sweep, run or not
    ROOT/<experiment>[-<variant>]/<unit>/               a run folder
"""

import hashlib
import itertools
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from marginface import config as configs
from marginface.config import Config
from marginface.report import run_folder
from marginface.runs import metrics

SWEEP = "sweep.json"


class Unit(NamedTuple):
    """One run of a sweep.

    name: its overrides in short, e.g. "embedding_dim=128,m=0.3,seed=0"; also its folder's name.
    experiment: what stands behind --config, e.g. "experiments/arcface.py:data=small".
    overrides: dotted key → value, the seed among them.
    config: the experiment's config with these values, locked.
    folder: its run folder.
    """

    name: str
    experiment: str
    overrides: dict[str, Any]
    config: Config
    folder: pathlib.Path

    def command(self, python: str = "python") -> list[str]:
        """What a user would type for this run alone."""
        changes = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        words = [python, "-m", "marginface.main", "--config", self.experiment, *changes]
        return [*words, "--workdir", str(self.folder)]

    def origin(self) -> dict[str, Any]:
        """What the plain command leaves as origin.json."""
        path, variant = configs.parts(self.experiment)
        return {
            "experiment": path.stem,
            "variant": variant,
            "overrides": self.overrides,
            "command": shlex.join(self.command()),
        }


class State(NamedTuple):
    """How far a run folder is.

    kind: "done", "not run", "interrupted" (begun, and ended without a word or still running),
      "checkpointed" (stopped by SIGTERM), "failed" (config or input error) or "diverged".
    why: one line, empty where the kind says it all.
    step: the last step in metrics.jsonl, 0 if there is none.
    """

    kind: str
    why: str = ""
    step: int = 0


def expand(
    experiment: str,
    *,
    root: pathlib.Path,
    seeds: int = 1,
    grid: bool = True,
    filters: Sequence[str] = (),
    changes: Mapping[str, str] | None = None,
) -> list[Unit]:
    """All units of an experiment's sweep(add), every key checked, seed by seed.

    Args:
        experiment: "experiments/arcface.py[:variant]".
        root: where the sweeps' folders are.
        seeds: each point of the grid runs with seeds 0 to seeds - 1, unless it sets its own.
        grid: False for the experiment as its file has it, without its sweep.
        filters: "KEY=VALUE[,VALUE...]": only units whose KEY (the end of a dotted key is enough)
            has one of these values.
        changes: dotted key → text, as on the command line, for every unit.

    Raises:
        ValueError: a key that the config does not have (names the nearest), a value of another
            type, two equal units, or a filter that fits none.
    """
    module, variant = configs.find_experiment(experiment)
    points: list[dict[str, Any]] = [] if grid else [{}]
    if grid:
        if not hasattr(module, "sweep"):
            raise ValueError(f"{experiment} has no function sweep(add, arg)")
        module.sweep(points.append, variant or None)
    keys = list(dict.fromkeys(key for point in points for key in point))
    short = short_keys(keys)
    common = configs.from_text(configs.load(experiment), changes or {})
    if clash := sorted(common.keys() & set(keys)):
        raise ValueError(f"--config.{clash[0]}: the sweep of {experiment} varies it; use --filter")
    folder = root / folder_name(experiment, common)
    units: dict[str, Unit] = {}
    for seed, point in itertools.product(range(seeds), points):
        own = dict(point)
        if "seed" in common | point and seed:
            continue
        if "seed" not in common:
            own.setdefault("seed", seed)
        overrides = common | own
        config = configs.load(experiment)
        try:
            configs.override(config, overrides)
            configs.check(config)
        except ValueError as error:
            raise ValueError(f"{experiment}, sweep: {error}") from None
        shown = own or {"seed": config.seed}
        name = ",".join(f"{short.get(k, k)}={_text(v)}" for k, v in shown.items())
        if name in units:
            raise ValueError(f"{experiment}, sweep: {name} stands there twice")
        units[name] = Unit(name, experiment, overrides, config, folder / name)
    return _filtered(list(units.values()), filters)


def folder_name(experiment: str, changes: Mapping[str, Any] | None = None) -> str:
    """<experiment>[-<variant>][-<digest of the changes>], fit for a file system."""
    path, variant = configs.parts(experiment)
    words = [path.stem, *([variant] if variant else [])]
    # Where results go and how they are tracked makes no other sweep.
    changes = {k: v for k, v in (changes or {}).items() if not k.startswith(run_folder.MAY_CHANGE)}
    if changes:
        words.append(hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:6])
    return re.sub(r"[^\w.=,+-]+", "-", "-".join(words))


def record(units: Iterable[Unit]) -> None:
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
        metrics.write_atomically(folder / SWEEP, text)


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


def state(folder: pathlib.Path) -> State:
    """How far the run in this folder is, from the files it left."""
    try:
        lines = metrics.read_lines(folder / "metrics.jsonl")
        step = max((int(line["step"]) for line in lines), default=0)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return State("failed", f"metrics.jsonl is damaged: {error}")
    stopped = _read_json(folder / "stopped.json")
    if stopped:
        kinds = {2: "failed", 3: "diverged", 75: "checkpointed"}
        kind = kinds.get(stopped.get("code"), "failed")
        return State(kind, str(stopped.get("message", "")), step)
    summary = _read_json(folder / "summary.json")
    if summary == {}:
        return State("failed", "summary.json is damaged: the same command makes it anew", step)
    if summary is not None:
        broken = sorted(key for key, value in summary.items() if value is None)
        return State("done", f"not finite: {', '.join(broken)}" if broken else "", step)
    if (folder / "config.json").exists():
        return State("interrupted", f"ended without a word after step {step}", step)
    log = folder / "log.txt"
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return State("failed", lines[-1] if lines else "left no word")
    return State("not run")


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


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


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)


def _filtered(units: list[Unit], filters: Sequence[str]) -> list[Unit]:
    for word in filters:
        end, equals, values = word.partition("=")
        if not equals:
            raise ValueError(f"--filter {word!r}: write KEY=VALUE[,VALUE...]")
        keys = sorted({key for unit in units for key in unit.overrides})
        fitting = [key for key in keys if key == end or key.endswith(f".{end}")]
        if len(fitting) != 1:
            what = "fits none" if not fitting else f"fits {', '.join(fitting)}"
            raise ValueError(f"--filter {word!r} {what}; {configs.nearest(end, keys)}")
        wanted = set(values.split(","))
        there = {_text(configs.dotted(unit.config)[fitting[0]]) for unit in units}
        if not wanted & there:
            raise ValueError(f"--filter {word!r} leaves no unit; {fitting[0]} is {sorted(there)}")
        units = [u for u in units if _text(configs.dotted(u.config)[fitting[0]]) in wanted]
    return units
