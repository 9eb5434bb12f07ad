"""Configs: files loaded, values checked, dotted overrides."""

import ast
import contextlib
import functools
import importlib.util
import json
import math
import pathlib
import sys
from collections.abc import Callable, Generator, Mapping
from importlib.machinery import ModuleSpec
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
# What a value may be, by its section and the end of its key, however deep it lies between them:
# "model.dropout" is that of model.kw.dropout and of model.kw.backbone_kw.dropout.
_LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "batch_size": (1, _MANY),
    "epochs": (0.0, _MANY),
    "steps": (0, _MANY),
    "log_every": (1, _MANY),
    "checkpoint_every": (1, _MANY),
    "data.workers": (0, 1024),
    "data.held_out": (0, _MANY),
    "data.folds": (2, _MANY),
    "model.embedding_dim": (1, _MANY),
    "model.dropout": (0.0, 0.99),
    "model.width": (0.001, _MANY),
    "optimizer.learning_rate": (0.0, math.inf),
    "optimizer.weight_decay": (0.0, math.inf),
    "optimizer.clip_norm": (0.0, math.inf),
    "optimizer.accumulate": (1, _MANY),
    "schedule.warmup": (0.0, 1.0),
    "evaluate.every": (0, _MANY),
    "evaluate.batch_size": (1, _MANY),
    "evals.every": (0, _MANY),
    "evals.batch_size": (1, _MANY),
    "evals.folds": (2, _MANY),
}
_WORDS: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "loss.precision": ("auto", "highest", "tf32", "bfloat16"),
}


def check(config: Config) -> None:
    """Raises a one-line ValueError that names a value with which no run has a meaning."""
    for key, value in dotted(config).items():
        section, *inner = key.split(".")
        place = f"{section}.{inner[-1]}" if inner else key
        if place in _LIMITS and isinstance(value, int | float):
            least, most = _LIMITS[place]
            if not least <= value <= most:  # NaN is within no limits
                above = f" to {most}" if most < _MANY else " or more"
                raise ValueError(f"config.{key}={value}: give {least}{above}")
        if place in _WORDS and value not in _WORDS[place]:
            hint = nearest(str(value), _WORDS[place])
            raise ValueError(f"config.{key}={value!r} is unknown; {hint}")
        known = value == "auto" or (type(value) is int and 0 <= value <= _MANY)
        if key.endswith(".chunk_size") and not known:
            raise ValueError(
                f"config.{key}={value!r}: give a number of classes, 0 for all at once, or 'auto'"
            )
        if place == "schedule.boundaries" and not all(
            isinstance(b, int | float) and 0 <= b <= 1 for b in value
        ):
            raise ValueError(f"config.{key}={value!r}: give fractions of the run, as (0.5, 0.75)")


def to_json(config: Config) -> str:
    """The config as text: equal configs give equal text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list) + "\n"


def parts(config_flag: str) -> tuple[pathlib.Path, str]:
    """ "experiments/a.py:dim=8" → (experiments/a.py, "dim=8")."""
    name, _, variant = config_flag.partition(".py:")
    return pathlib.Path(f"{name}.py" if variant else config_flag), variant


_INSIDE = pathlib.Path(__file__).resolve().parent / "_experiments"
_BESIDE = _INSIDE.parents[1] / "experiments"
# The clone that this package lies in; None where it was installed as a wheel.
CLONE = None if _INSIDE.is_dir() else _BESIDE.parent
# The experiments that come with this package: inside it in a wheel, beside it in a clone.
PACKAGED = _BESIDE if CLONE else _INSIDE


def find_experiment(config_flag: str) -> tuple[ModuleType, str]:
    """The module of an experiment's file, and the variant: "experiments/a.py[:variant]".

    Where there is no experiments/a.py the file of that name that comes with this package is taken,
    and one line says so. `from experiments import common` finds what lies beside the file.

    Raises:
      FileNotFoundError: no such file; names the nearest beside it.
      ValueError: the file is not Python or has no get_config.
    """
    path, variant = parts(config_flag)
    found = path
    if not path.is_file() and path.parent == pathlib.Path("experiments"):
        found = PACKAGED / path.name
    if not found.is_file():
        siblings = sorted({p.name for folder in (path, found) for p in folder.parent.glob("*.py")})
        hint = nearest(path.name, siblings) if siblings else f"no experiments in {path.parent}"
        raise FileNotFoundError(f"no config file {path}; {hint}")
    if found != path:
        any_here = any(path.parent.glob("*.py"))
        _say_packaged(path if any_here else path.parent)
    spec = importlib.util.spec_from_file_location(found.stem, found)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    beside = _package_of(found)
    try:
        with beside():
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config(arg)")
    for name in ("get_config", "sweep", "search"):
        if hasattr(module, name):
            setattr(module, name, beside()(getattr(module, name)))
    return module, variant


def _package_of(file: pathlib.Path) -> Callable[[], Any]:
    """A maker of contexts in which the package `experiments` is the one that a file belongs to.

    It is the first with a common.py of the file's folder and the working directory's `experiments`;
    or else what comes with this package. The common.py of a package of another name counts if it
    makes configs, as the one that comes with this package does.
    """
    for folder in (file.parent.resolve(), pathlib.Path("experiments").resolve()):
        common = folder / "common.py"
        if not common.is_file():
            continue
        another = folder.name != "experiments" and (folder / "__init__.py").exists()
        if not another or "def base(" in common.read_text(encoding="utf-8"):
            return functools.partial(_experiments, folder)
    return functools.partial(_experiments, PACKAGED)


_loaded: dict[pathlib.Path, dict[str, ModuleType]] = {}  # folder → its modules by name


@contextlib.contextmanager
def _experiments(folder: pathlib.Path) -> Generator[None]:
    """Imports of `experiments` are imports from the folder, and leave no trace outside."""

    def taken() -> dict[str, ModuleType]:
        names = [n for n in sys.modules if n == "experiments" or n.startswith("experiments.")]
        return {name: sys.modules.pop(name) for name in names}

    before = taken()
    here = getattr(before.get("experiments"), "__path__", ())
    same = [pathlib.Path(p).resolve() for p in here] == [folder]
    if same:
        _loaded[folder] = before  # what others have imported from there
    if folder not in _loaded:
        spec = ModuleSpec("experiments", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        _loaded[folder] = {"experiments": importlib.util.module_from_spec(spec)}
    sys.modules.update(_loaded[folder])
    try:
        yield
    finally:
        _loaded[folder] = taken()
        sys.modules.update(_loaded[folder] if same else before)


@functools.cache
def _say_packaged(path: pathlib.Path) -> None:
    what = f"no {path} here: what comes with marginface under that name is used"
    print(f"marginface: {what}", file=sys.stderr, flush=True)


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


_TARGETS = {"arc": "additive_angular", "cos": "additive_cosine"}  # elasticface's earlier words


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config of an earlier version, nested, as this version has them."""
    values = ({"evals": _EVALS} if "evaluate" in values else {}) | dict(values)
    match values.get("loss"):
        case {"name": "elasticface", "kw": {"target": "arc" | "cos" as word}} as loss:
            values["loss"] = loss | {"kw": loss["kw"] | {"target": _TARGETS[word]}}
    return values


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
