"""How the prototypes lie on the sphere."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marginface import sharding
from marginface.losses import class_softmax, regularizers
from marginface.typing import Array, Float


class Evaluator:
    """Separability of the prototypes, Sep_i = max_{j≠i} cos(W_i, W_j).

    A smaller mean says that the classes lie further apart, a smaller variance that they do so
    evenly. After a run, `separability` [num_classes] holds every Sep_i.

    References:
        Zhao et al., RegularFace: Deep Face Recognition via Exclusive Regularization, CVPR 2019.
    """

    def __init__(
        self,
        prototypes: Callable[[Any], Float[Array, "c d"]],
        *,
        num_classes: int,
        chunk_size: int | None = None,
        mesh: Mesh | None = None,
    ):
        """Says where the prototypes are.

        Args:
            prototypes: from a state to W [c, d]; rows from num_classes on are padding.
            num_classes: the number of real rows.
            chunk_size: rows compared at once; None compares with all.
            mesh: the mesh over whose axis the rows are sharded, or None.

        Raises:
            ValueError: with fewer than two classes: no class has a neighbour.
        """
        if num_classes < 2:
            raise ValueError(f"separability needs two classes or more, num_classes={num_classes}")

        def separability(rows: Float[Array, "c d"]) -> Float[Array, "c"]:
            axis_name = None if mesh is None else sharding.AXIS
            classes = class_softmax.all_classes(rows, num_classes, axis_name=axis_name)
            return regularizers.exclusive(classes, chunk_size=chunk_size, axis_name=axis_name)

        if mesh is not None:
            spec = PartitionSpec(sharding.AXIS)
            separability = jax.shard_map(separability, mesh=mesh, in_specs=(spec,), out_specs=spec)

        # On every device, so that every process can read all of it.
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._separability = jax.jit(
            lambda rows: separability(rows.astype(jnp.float32))[:num_classes],
            out_shardings=everywhere,
        )
        self.prototypes = prototypes
        self.separability: np.ndarray | None = None

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yields the mean and the variance of Sep_i over the classes."""
        self.separability = np.asarray(self._separability(self.prototypes(state)))
        yield "prototypes/sep_mean", float(np.mean(self.separability, dtype=np.float64))
        yield "prototypes/sep_var", float(np.var(self.separability, dtype=np.float64))
