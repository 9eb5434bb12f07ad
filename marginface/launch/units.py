"""The units of a sweep: which runs there are, what each is called, and how far it is.

A unit is always the plain command a user would type, in a run folder of its own:

    ROOT/<experiment>[-<variant>]/sweep.json            all units of the sweep, run or not
    ROOT/<experiment>[-<variant>]/<unit>/               a run folder
"""

import itertools
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from marginface import config as configs
from marginface import lookup
from marginface.config import Config
from marginface.runs import plan


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
        """What the plain command writes to origin.json."""
        path, variant = configs.parts(self.experiment)
        return {
            "experiment": path.stem,
            "variant": variant,
            "overrides": self.overrides,
            "command": shlex.join(self.command()),
        }


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
    short = plan.short_keys(keys)
    common = configs.from_text(configs.load(experiment), changes or {})
    if clash := sorted(common.keys() & set(keys)):
        raise ValueError(f"--config.{clash[0]}: the sweep of {experiment} varies it; use --filter")
    folder = root / plan.folder_name(experiment, common)
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
            raise ValueError(f"--filter {word!r} {what}; {lookup.nearest(end, keys)}")
        wanted = set(values.split(","))
        there = {_text(configs.dotted(unit.config)[fitting[0]]) for unit in units}
        if not wanted & there:
            raise ValueError(f"--filter {word!r} leaves no unit; {fitting[0]} is {sorted(there)}")
        units = [u for u in units if _text(configs.dotted(u.config)[fitting[0]]) in wanted]
    return units
