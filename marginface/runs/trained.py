"""Opens a run that is complete: its config, its data, its functions, its trained state."""

import pathlib
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from marginface import build, sharding
from marginface.config import Config
from marginface.data import Faces, Pairs
from marginface.evaluators.common import embed_all
from marginface.runs import folder as run_folder
from marginface.training.checkpoint import Checkpoints
from marginface.training.step import State, Step
from marginface.typing import Bool, Float


class Trained(NamedTuple):
    """A complete run.

    folder: the run folder.
    config: as it was trained, locked.
    faces: the training set.
    test_sets: what it was verified on, by name; or validation in their place.
    steps: its functions.
    state: the trained state, placed as steps.like says.
    step: number of updates done.
    mesh: the devices.
    """

    folder: pathlib.Path
    config: Config
    faces: Faces
    test_sets: dict[str, Pairs]
    steps: Step
    state: State
    step: int
    mesh: Mesh

    def embed(self, data: Faces | Pairs) -> tuple[Float[np.ndarray, "n d"], Bool[np.ndarray, " n"]]:
        """The embeddings of all images of a data set, and whether each could be read.

        In the place of an image that cannot be read stands the embedding of the next one.

        Raises:
            NotFiniteError: an embedding is not finite; names the image's index.
        """
        embed, unreadable = build.make_embed(self.steps, data, self.mesh), []

        def noting(state: State, batch: dict[str, np.ndarray]) -> object:
            unreadable.append(batch["unreadable"])
            return embed(state, batch)

        batch_size = -(-self.config.evaluate.batch_size // self.mesh.size) * self.mesh.size
        found = embed_all(noting, self.state, data.source, data.decode, batch_size)
        embeddings = found["embedding"]
        return embeddings, np.concatenate(unreadable)[: len(embeddings)] == 0


def load(folder: pathlib.Path, *, mesh: Mesh | None = None) -> Trained:
    """Opens the complete run in a folder, with its newest sound checkpoint.

    Args:
        folder: the run folder; nothing in it is changed.
        mesh: the devices; None for all. It need not be that of the training.

    Raises:
        ValueError: no run, one that is not complete, a damaged config, no sound checkpoint, or a
            training set that is not the one of the run; one line that says which.
    """
    config = run_folder.config_of(folder)
    mesh = mesh or sharding.make_mesh()
    faces, test_sets = build.load_data(config)
    steps = build.make_steps(config, faces, mesh, 1)  # how many updates matters in training only
    with Checkpoints(folder / run_folder.CHECKPOINTS) as checkpoints:
        restored = checkpoints.restore(steps.like)
    if restored is None:
        raise ValueError(f"{folder} has no checkpoint: give the folder of a run that is complete")
    step, state, meta = restored
    run_folder.require_same_data(folder, faces.fingerprint, meta["data"])
    return Trained(folder, config, faces, test_sets, steps, state, step, mesh)
