"""One mesh axis for everything: it carries the batch and the rows of the prototypes."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from marginface.typing import Array

AXIS = "data"
_ROW_MULTIPLE = 256


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh over all devices (or the first few), one axis "data"."""
    chosen = jax.devices()[:devices]
    return jax.make_mesh(
        (len(chosen),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=chosen
    )


def padded_rows(num_classes: int, num_devices: int) -> int:
    """Rows of the prototype array: a multiple of 256 and of the number of devices.

    A fixed multiple keeps the shape the same on 1, 2, 4, ... 256 devices, so that a checkpoint
    of one count restores on another.
    """
    multiple = math.lcm(_ROW_MULTIPLE, num_devices)
    return -(-num_classes // multiple) * multiple


def specs(tree: Any) -> Any:
    """How a tree of arrays is split: by class below a key "prototypes" or "centers", else not."""

    def spec(path: tuple, leaf: Any) -> P:
        keys = {getattr(k, "key", None) for k in path}
        return P(AXIS) if keys & {"prototypes", "centers"} and leaf.ndim else P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Rows of classes (the optimizer's copies too) are split; the rest is replicated."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(state))


def put_everywhere(mesh: Mesh, tree: Any) -> Any:
    """The same numbers in every process → arrays on every device."""
    replicated = NamedSharding(mesh, P())

    def put(leaf: Any) -> Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, replicated, lambda index: value[index])

    return jax.tree.map(put, tree)


def put_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, Array]:
    """This process's rows of the global batch → arrays split over the mesh."""
    sharding = NamedSharding(mesh, P(AXIS))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in local.items()}


def put_global_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Array]:
    """The same whole batch in every process → arrays split over the mesh."""
    sharding = NamedSharding(mesh, P(AXIS))
    return {
        k: jax.make_array_from_callback(v.shape, sharding, lambda index, v=v: v[index])
        for k, v in batch.items()
    }
