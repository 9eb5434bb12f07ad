"""A stand-in for ml_collections, for machines without it: nested dicts with attributes.

Only what the files in experiments/ use when they are read.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping
from typing import Any


class ConfigDict(dict[str, Any]):
    """A dict whose keys are attributes; dicts in it become such dicts."""

    def __init__(self, values: Any = ()) -> None:
        super().__init__()
        self.update(values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __setitem__(self, name: str, value: Any) -> None:
        plain = isinstance(value, Mapping) and not isinstance(value, ConfigDict)
        super().__setitem__(name, ConfigDict(value) if plain else value)

    def update(self, values: Any = (), **more: Any) -> None:
        """As a dict's, nested dicts included."""
        for name, value in (dict(values) | more).items():
            self[name] = value


def _field(value: Any, *, field_type: type | None = None) -> Any:
    return value


def experiment(name: str, arg: str) -> Any:
    """The config of an experiment's variant."""
    if "ml_collections" not in sys.modules and not importlib.util.find_spec("ml_collections"):
        module: Any = types.ModuleType("ml_collections")
        module.ConfigDict, module.FieldReference = ConfigDict, _field
        sys.modules["ml_collections"] = module
    return importlib.import_module(f"experiments.{name}").get_config(arg)


def arcface(*, batch: int, dim: int, remat: bool, dtype: str) -> Any:
    """ArcFace with SGD, as train_step.py measures it."""
    from benchmarks import train_step as beside

    config = experiment("arcface", f"data=casia,dim={dim}")
    config.batch_size = batch
    config.model.kw.update(dtype=dtype, remat=remat)
    config.loss.margin_kw.m, config.loss.scale = beside.MARGIN, beside.SCALE
    config.optimizer.update(
        learning_rate=beside.RATE, momentum=beside.MOMENTUM, weight_decay=beside.DECAY
    )
    return config
