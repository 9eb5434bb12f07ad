"""How a network with latent groups uses them on faces that it never saw."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from marginface.evaluators import common
from marginface.losses import groups


class Evaluator:
    """Usage of the groups over the images of a test set: each is in that of its largest logit.

    Nothing for a network without "group_logits". After a run, `chosen` [m] holds the group of each
    image.
    """

    def __init__(self, subject: common.Subject):
        """Args: subject: with a test set."""
        self.name = subject.name
        self.pairs, self._outputs = subject.images()
        self.chosen: np.ndarray | None = None

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yields entropy over log K (1: all groups alike) and K times the largest share."""
        logits = self._outputs(state).get("group_logits")
        if logits is None:
            return
        self.chosen = np.argmax(logits, axis=1)
        used = groups.usage(jnp.asarray(self.chosen, jnp.int32), logits.shape[1])
        yield f"{self.name}/group_entropy", float(used.entropy)
        yield f"{self.name}/group_largest", float(used.largest)

    def pictures(self, folder: pathlib.Path) -> Iterator[common.Picture]:
        """Draws faces of each group into the folder."""
        if self.chosen is None:
            return
        from marginface.evaluators import pictures as draw  # matplotlib takes long to import

        path = folder / f"{self.name}_groups.png"
        draw.group_sheet(self.pairs, self.chosen, path, title=self.name)
        caption = "Faces of each latent group, the same number from each."
        yield common.Picture(path, f"{self.name}: {caption}")
