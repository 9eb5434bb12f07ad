"""How the prototypes lie on the sphere."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from marginface import class_softmax, regularizers, sharding
from marginface.typing import Array, Float


class Evaluator:
    """Separability of the prototypes, Sep_i = max_{j≠i} cos(W_i, W_j).

    A smaller mean says that the classes lie further apart, a smaller variance that they do so
    evenly.

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

        @jax.jit
        def moments(rows: Float[Array, "c d"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
            sep = separability(rows.astype(jnp.float32))
            real = jnp.arange(len(sep)) < num_classes
            mean = jnp.sum(jnp.where(real, sep, 0.0)) / num_classes
            return mean, jnp.sum(jnp.where(real, (sep - mean) ** 2, 0.0)) / num_classes

        self.prototypes = prototypes
        self.moments = moments

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yields the mean and the variance of Sep_i over the classes."""
        mean, variance = self.moments(self.prototypes(state))
        yield "prototypes/sep_mean", float(mean)
        yield "prototypes/sep_var", float(variance)
