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


def arcface(*, batch: int, remat: bool, dtype: str) -> ConfigDict:
    """What objective.make and step.make ask of a config: ArcFace with SGD, as in train_step.py."""
    from benchmarks import train_step as beside

    return ConfigDict(
        {
            "batch_size": batch,
            "model": {"kw": {"dtype": dtype, "remat": remat}},
            "loss": {
                "name": "margin_softmax",
                "kw": {},
                "margin": "additive_angular",
                "margin_kw": {"m": beside.MARGIN},
                "detach": False,
                "anneal": {},
                "similarity": "cosine",
                "scale": beside.SCALE,
                "norm_as_scale": False,
                "chunk_size": "auto",
                "precision": "auto",
                "sample_rate": 1.0,
            },
            "regularizers": {},
            "joint": {},
            "pairs": {},
            "optimizer": {
                "name": "sgd",
                "learning_rate": beside.RATE,
                "prototypes_factor": 1.0,
                "weight_decay": beside.DECAY,
                "momentum": beside.MOMENTUM,
                "clip_norm": 0.0,
                "accumulate": 1,
            },
            "schedule": {
                "name": "cosine",
                "warmup": 0.05,
                "boundaries": (0.5, 0.75),
                "factor": 0.1,
                "power": 1.0,
            },
        }
    )
