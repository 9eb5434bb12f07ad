"""How a network with latent groups uses them on faces that it never saw."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from marginface.evaluators import verification
from marginface.losses import groups


class Evaluator:
    """Usage of the groups over the images of a verification set.

    Runs after the verification of the same images, whose embeddings end with the group logits.
    After a run, `chosen` [m] holds the group of each image.
    """

    def __init__(self, verified: verification.Evaluator, *, num_groups: int):
        """Args: verified: has run on the state; num_groups: how many last columns are logits."""
        self.verified = verified
        self.num_groups = num_groups
        self.chosen: np.ndarray | None = None

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yields entropy over log K (1: all groups alike) and K times the largest share."""
        del state
        assert self.verified.embeddings is not None
        self.chosen = np.argmax(self.verified.embeddings[:, -self.num_groups :], axis=1)
        used = groups.usage(jnp.asarray(self.chosen, jnp.int32), self.num_groups)
        name = self.verified.pairs.name
        yield f"{name}/group_entropy", float(used.entropy)
        yield f"{name}/group_largest", float(used.largest)
