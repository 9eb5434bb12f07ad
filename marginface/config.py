"""Configs: files loaded, values checked, dotted overrides."""

import ast
import importlib
import importlib.util
import json
import math
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from marginface.lookup import nearest

Config = Any  # an ml_collections.ConfigDict; not imported, so that the core needs jax alone


def dotted(config: Config, prefix: str = "") -> dict[str, Any]:
    """{"loss.scale": 64.0, ...}: every leaf of a nested config under its dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def override(config: Config, changes: Mapping[str, Any]) -> None:
    """Sets dotted keys in place; a sweep and the command line share these checks.

    Raises:
      ValueError: unknown key (names the nearest) or a value of another type.
    """
    known = dotted(config)
    for key, value in changes.items():
        if key not in known:
            raise ValueError(f"config has no key {key!r}; {nearest(key, known)}")
        old = known[key]
        if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        of_two_types = key.endswith(".chunk_size")  # a number or "auto", as check sees
        if old is not None and type(value) is not type(old) and not of_two_types:
            raise ValueError(
                f"config.{key}={value!r} is {type(value).__name__}, not {type(old).__name__}"
            )
        with config.unlocked(), config.ignore_type():  # the types are checked above
            parent = config
            *path, last = key.split(".")
            for part in path:
                parent = parent[part]
            parent[last] = value


_MANY = 2**40  # more than any run has
_LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "batch_size": (1, _MANY),
    "epochs": (0.0, _MANY),
    "steps": (0, _MANY),
    "log_every": (1, _MANY),
    "checkpoint_every": (1, _MANY),
    "data.workers": (0, 1024),
    "data.held_out": (0, _MANY),
    "model.embedding_dim": (1, _MANY),
    "model.kw.dropout": (0.0, 0.99),
    "model.kw.width": (0.001, 1000.0),
    "optimizer.learning_rate": (0.0, math.inf),
    "optimizer.weight_decay": (0.0, math.inf),
    "optimizer.clip_norm": (0.0, math.inf),
    "optimizer.accumulate": (1, _MANY),
    "schedule.warmup": (0.0, 1.0),
    "data.kw.folds": (2, _MANY),
    "evaluate.every": (0, _MANY),
    "evaluate.batch_size": (1, _MANY),
}
_DTYPES = ("float32", "bfloat16")
_PRECISIONS = ("auto", "highest", "tf32", "bfloat16")


def check(config: Config) -> None:
    """Raises a one-line ValueError that names a value with which no run has a meaning."""
    flat = dotted(config)
    for key, (least, most) in _LIMITS.items():
        if key in flat and not least <= flat[key] <= most:  # NaN is within no limits
            above = f" to {most}" if most < _MANY else " or more"
            raise ValueError(f"config.{key}={flat[key]}: give {least}{above}")
    for key, value in flat.items():
        known = value == "auto" or (type(value) is int and 0 <= value <= _MANY)
        if key.endswith(".chunk_size") and not known:
            raise ValueError(
                f"config.{key}={value!r}: give a number of classes, 0 for all at once, or 'auto'"
            )
    boundaries = flat.get("schedule.boundaries", ())
    if not all(isinstance(b, int | float) and 0 <= b <= 1 for b in boundaries):
        raise ValueError(
            f"config.schedule.boundaries={boundaries!r}: give fractions of the run, as (0.5, 0.75)"
        )
    if (precision := flat.get("loss.precision", "auto")) not in _PRECISIONS:
        hint = nearest(precision, _PRECISIONS)
        raise ValueError(f"config.loss.precision={precision!r} is unknown; {hint}")
    if (dtype := flat.get("model.kw.dtype", "float32")) not in _DTYPES:
        raise ValueError(f"config.model.kw.dtype={dtype!r} is unknown; {nearest(dtype, _DTYPES)}")


def to_json(config: Config) -> str:
    """The config as text: equal configs give equal text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list) + "\n"


def parts(config_flag: str) -> tuple[pathlib.Path, str]:
    """ "experiments/a.py:dim=8" → (experiments/a.py, "dim=8")."""
    name, _, variant = config_flag.partition(".py:")
    return pathlib.Path(f"{name}.py" if variant else config_flag), variant


def find_experiment(config_flag: str) -> tuple[ModuleType, str]:
    """The module of an experiment's file, and the variant: "experiments/a.py[:variant]".

    Raises:
      FileNotFoundError: no such file; names the nearest beside it.
      ValueError: the file is not Python or has no get_config.
    """
    path, variant = parts(config_flag)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"no experiments in {path.parent}"
        raise FileNotFoundError(f"no config file {path}; {hint}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config(arg)")
    return module, variant


def load(config_flag: str) -> Config:
    """The locked config that an experiment's file makes: "experiments/a.py[:variant]".

    Raises:
      FileNotFoundError, ValueError: as find_experiment; or no such variant.
    """
    module, variant = find_experiment(config_flag)
    config = module.get_config(variant or None)
    if not hasattr(config, "lock"):
        kind = type(config).__name__
        raise ValueError(f"{module.__file__}: get_config returns {kind}, not a ConfigDict")
    return config.lock()


_EVALS = {  # what versions without config.evals measured
    "pairs": {"type": "verification", "data": "tests"},
    "prototypes": {"type": "geometry"},
    "usage": {"type": "grouping", "data": "tests"},
}


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config of an earlier version, nested, as this version has them."""
    return ({"evals": _EVALS} if "evaluate" in values else {}) | dict(values)


def from_json(text: str) -> Config:
    """The locked config that `to_json` wrote, in an earlier version too.

    Raises:
      ValueError: not JSON, or no nested dict.
    """
    from ml_collections import ConfigDict  # here, so that the core imports without it

    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("no config: nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("no config: a JSON object is needed")
    return ConfigDict(translate(values)).lock()


def from_text(config: Config, texts: Mapping[str, str]) -> dict[str, Any]:
    """Command-line texts as values of the types that the config holds under the same keys.

    Raises:
      ValueError: unknown key (names the nearest) or a text that is not of that type.
    """
    known, values = dotted(config), {}
    for key, text in texts.items():
        if key not in known:
            raise ValueError(f"config has no key {key!r}; {nearest(key, known)}")
        kind = type(known[key])
        if key.endswith(".chunk_size"):
            kind = str if text == "auto" else int
        try:
            if kind is bool:
                values[key] = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            elif kind in (int, float, str):
                values[key] = kind(text)
            else:
                values[key] = ast.literal_eval(text)
        except (ValueError, KeyError, SyntaxError):
            raise ValueError(f"config.{key}={text!r} is not {kind.__name__}") from None
    return values
