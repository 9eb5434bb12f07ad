"""From a config to what it names: data, batches, network, step, evaluators, scorer."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from marginface import lookup, models, sharding
from marginface.config import Config
from marginface.data import Faces, Pairs, cleaned, held_out, pipeline, readers
from marginface.evaluators import geometry, grouping, verification
from marginface.losses import groups, pair_losses
from marginface.training import footprint, objective, step

SCORES = ("cosine", "group_aware", "siamese")
GROUP_OUTPUTS = ("group_feature", "group_logits")  # evaluated beside the embedding, if there


def total_steps(config: Config, faces: Faces, mesh: jax.sharding.Mesh) -> int:
    """How many updates the run has.

    Raises:
      ValueError: the batch cannot be split over the devices and the parts of accumulation.
    """
    parts = mesh.size * config.optimizer.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"config.batch_size={config.batch_size} is not a multiple of devices × "
            f"optimizer.accumulate = {mesh.size} × {config.optimizer.accumulate} = {parts}"
        )
    return config.steps or max(1, round(config.epochs * len(faces.source) / config.batch_size))


def load_data(config: Config) -> tuple[Faces, dict[str, Pairs]]:
    """The training set and the test sets that config.data names; or validation in their place."""
    load = lookup.find_module(readers, config.data.name, "load", "data.name").load
    arguments = config.data.kw.to_dict()
    lookup.check_arguments(load, arguments, "data.kw")
    faces, test_sets = load(**arguments)
    if path := config.data.get("cleaned"):  # which a config of an earlier version may lack
        faces = cleaned.relabel(faces, path)
    if identities := config.data.get("held_out"):
        faces, validation = held_out.hold_out(faces, identities)
        test_sets = {validation.name: validation}  # the test is not looked at while one chooses
    return faces, test_sets


def make_batches(config: Config, faces: Faces) -> pipeline.TrainIterator:
    """This process's part of the batches that the seed decides."""
    return pipeline.train_iterator(
        faces,
        seed=config.seed,
        batch_size=config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        images_per_identity=config.data.images_per_identity,
    )


def make_steps(
    config: Config,
    faces: Faces,
    mesh: jax.sharding.Mesh | None,
    total: int,
    make: Callable[..., step.Step] = step.make,
) -> step.Step:
    """The functions of a run, of network and objective that the config names.

    Args:
      config, faces, mesh: of the run.
      total: its number of updates.
      make: step.make, or step.functions for those not jitted (then mesh may be None).
    """
    losses = objective.make(
        config,
        num_classes=faces.num_classes,
        embedding_dim=config.model.embedding_dim,
        mesh=mesh,
        total_steps=total,
    )
    grouped = config.model.kw.get("num_groups", 0)
    return make(
        config,
        model=make_model(config),
        objective=losses,
        mesh=mesh,
        image_shape=image_shape_of(faces, config.batch_size, mesh),
        total_steps=total,
        outputs=("embedding", *GROUP_OUTPUTS) if grouped else ("embedding",),
    )


def describe(
    config: Config, faces: Faces, steps: step.Step, mesh: jax.sharding.Mesh, hyper: Any, seed: Any
) -> list[str]:
    """The devices, and what the run will need of their memory."""
    need = footprint.of_step(
        steps,
        mesh=mesh,
        batch_size=config.batch_size,
        accumulate=config.optimizer.accumulate,
        image_shape=image_shape_of(faces, config.batch_size, mesh),
        hyper=hyper,
        seed=seed,
    )
    return footprint.describe(need, mesh=mesh, walk=walk_of(config, faces, mesh))


def walk_of(config: Config, faces: Faces, mesh: jax.sharding.Mesh) -> dict[str, Any] | None:
    """objective.walk, None without a loss over classes."""
    return objective.walk(config, faces.num_classes, mesh) if config.loss.name else None


def make_model(config: Config) -> Any:
    """The network that config.model names, its arguments checked."""
    model = lookup.find_module(models, config.model.name, "Model", "model.name").Model
    known = {f.name for f in dataclasses.fields(model)} - {"parent", "name"}
    for key in config.model.kw:
        if key not in known:
            hint = lookup.nearest(key, known)
            raise ValueError(f"model.kw.{key} is not an argument of {config.model.name}; {hint}")
    return model(embedding_dim=config.model.embedding_dim, **config.model.kw)


class Evaluators(NamedTuple):
    """All that is measured of a state."""

    verifications: list[verification.Evaluator]
    geometries: list[geometry.Evaluator]
    groupings: list[grouping.Evaluator]

    def run(self, state: step.State) -> dict[str, float]:
        """{"lfw/accuracy": 0.97, ...} of a state."""
        everything = (*self.verifications, *self.geometries, *self.groupings)
        return {name: value for e in everything for name, value in e.run(state)}

    @property
    def separability(self) -> np.ndarray | None:
        """Sep_i of every class of the last state, if classes have one prototype each."""
        return self.geometries[0].separability if self.geometries else None


def make_evaluators(
    config: Config,
    faces: Faces,
    test_sets: dict[str, Pairs],
    steps: step.Step,
    mesh: jax.sharding.Mesh,
) -> Evaluators:
    """Verification of each test set, and what there is to say of prototypes and groups."""
    num_groups, score_fn = config.model.kw.get("num_groups", 0), make_score(config)
    rounded = -(-config.evaluate.batch_size // mesh.size) * mesh.size
    verifications = [
        verification.Evaluator(
            make_embed(steps, pairs, mesh), pairs=pairs, batch_size=rounded, score_fn=score_fn
        )
        for pairs in test_sets.values()
    ]
    geometries = [
        geometry.Evaluator(
            lambda state: objective.weights(state["params"]["prototypes"]),
            num_classes=faces.num_classes,
            chunk_size=objective.chunk_size_between(config, faces.num_classes, mesh),
            mesh=mesh,
        )
        for _ in range(objective.one_row_a_class(config))
    ]
    groupings = [grouping.Evaluator(v, num_groups=num_groups) for v in verifications if num_groups]
    return Evaluators(verifications, geometries, groupings)


def make_score(config: Config) -> verification.Score | None:
    """How two images are compared, as config.evaluate.score says; None is the cosine."""
    score = config.evaluate.score
    if score not in SCORES:
        raise ValueError(f"evaluate.score={score!r} is unknown; {lookup.nearest(score, SCORES)}")
    dim, num_groups = config.model.embedding_dim, config.model.kw.get("num_groups", 0)
    if score == "group_aware":
        if not num_groups:
            raise ValueError("evaluate.score='group_aware' needs model.name='group_head'")
        return lambda _, x, first, second: groups.group_aware_similarity(
            x[:, :-num_groups], first, second, embedding_dim=dim
        )
    if num_groups:  # the columns behind the embedding are not to be compared
        return lambda _, x, first, second: verification.cosine_scores(x[:, :dim], first, second)
    if score == "siamese":
        if "siamese" not in config.pairs:
            raise ValueError("evaluate.score='siamese' needs the term pairs.siamese")
        features = config.pairs.siamese.features
        learned = jax.jit(partial(pair_losses.siamese_score, features=features))
        return lambda state, x, first, second: np.asarray(
            learned(state["params"]["terms"]["pairs.siamese"], x[first], x[second])
        )
    return None


def make_prepare(faces: Faces, mesh: jax.sharding.Mesh) -> Any:
    """A function: batch → images, labels, number of unreadable images skipped."""
    to_images = _on_device(faces.to_images, mesh)
    count = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
    return lambda batch: (to_images(batch), batch["label"], count(batch["unreadable"]))


@functools.lru_cache(maxsize=16)
def _on_device(to_images: Callable[..., Any], mesh: jax.sharding.Mesh) -> Any:
    """to_images jitted; training and test images that are made alike share the program."""
    return jax.jit(to_images, out_shardings=NamedSharding(mesh, P(sharding.AXIS)))


def image_shape_of(
    faces: Faces, batch_size: int = 1, mesh: jax.sharding.Mesh | None = None
) -> tuple[int, int, int]:
    """[h, w, 3] of the network's input, without making an image.

    With the batch size and the mesh of the run, its images need not be traced again.
    """
    where = None if mesh is None else NamedSharding(mesh, P(sharding.AXIS))
    to_images = faces.to_images if mesh is None else _on_device(faces.to_images, mesh)
    batch = {
        k: jax.ShapeDtypeStruct((batch_size, *np.shape(v)), np.asarray(v).dtype, sharding=where)
        for k, v in faces.decode(faces.source[0]).items()
    }
    _, height, width, channels = jax.eval_shape(to_images, batch).shape
    return height, width, channels


def make_embed(steps: step.Step, data: Faces | Pairs, mesh: jax.sharding.Mesh) -> Any:
    """(state, batch of records, the same in every process) → embeddings [b, d]."""
    to_images = _on_device(data.to_images, mesh)

    def embed(state: step.State, batch: dict[str, np.ndarray]) -> Any:
        return steps.embed(state, to_images(sharding.put_global_batch(mesh, batch)))

    return embed
