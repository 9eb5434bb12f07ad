"""How the prototypes lie on the sphere."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from marginface import sharding
from marginface.evaluators import common
from marginface.losses import class_softmax, regularizers
from marginface.typing import Array, Float


class Evaluator:
    """Separability of the prototypes, Sep_i = max_{j≠i} cos(W_i, W_j).

    A smaller mean says that the classes lie further apart, a smaller variance that they do so
    evenly. Nothing where classes have no prototype, or several each. After a run, `separability`
    [num_classes] holds every Sep_i.

    References:
        Zhao et al., RegularFace: Deep Face Recognition via Exclusive Regularization, CVPR 2019.
    """

    def __init__(self, subject: common.Subject):
        """Args: subject: with prototypes.

        Raises:
            ValueError: with fewer than two classes: no class has a neighbour.
        """
        num_classes, mesh = subject.num_classes, subject.mesh
        self.name, self.prototypes = subject.name, subject.prototypes
        self.separability: np.ndarray | None = None
        if self.prototypes is not None and num_classes < 2:
            raise ValueError(f"separability needs two classes or more, num_classes={num_classes}")

        def separability(rows: Float[Array, "c d"]) -> Float[Array, "c"]:
            axis_name = None if mesh is None else sharding.AXIS
            classes = class_softmax.all_classes(rows, num_classes, axis_name=axis_name)
            return regularizers.exclusive(
                classes, chunk_size=subject.chunk_size, axis_name=axis_name
            )

        if mesh is not None:
            spec = PartitionSpec(sharding.AXIS)
            separability = jax.shard_map(separability, mesh=mesh, in_specs=(spec,), out_specs=spec)

        # On every device, so that every process can read all of it.
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._separability = jax.jit(
            lambda rows: separability(rows.astype(jnp.float32))[:num_classes],
            out_shardings=everywhere,
        )

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yields the mean and the variance of Sep_i over the classes."""
        if self.prototypes is None:
            return
        self.separability = np.asarray(self._separability(self.prototypes(state)))
        yield f"{self.name}/sep_mean", float(np.mean(self.separability, dtype=np.float64))
        yield f"{self.name}/sep_var", float(np.var(self.separability, dtype=np.float64))

    def arrays(self) -> dict[str, np.ndarray]:
        """{"separability": Sep_i of every class}."""
        return {} if self.separability is None else {"separability": self.separability}

    def pictures(self, folder: pathlib.Path) -> Iterator[common.Picture]:
        """Draws the Sep_i into the folder."""
        if self.separability is None:
            return
        from marginface.evaluators import pictures as draw  # matplotlib takes long to import

        path = folder / "separability.png"
        draw.separabilities({"all classes": self.separability}, path)
        yield common.Picture(
            path,
            "How far each prototype lies from the nearest other one: a cosine, less is better.",
        )
