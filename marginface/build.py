"""From a config to what it names: data, batches, network, step, evaluators, scorer."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from marginface import config as configs
from marginface import evaluators, lookup, models, sharding
from marginface.config import Config
from marginface.data import Faces, Pairs, cleaned, held_out, pipeline, readers
from marginface.evaluators import verification
from marginface.evaluators.common import Embedded, Entry, Evaluators, Score, Subject
from marginface.losses import groups, pair_losses
from marginface.training import footprint, objective, step


def _named(package: ModuleType, name: str, attribute: str, key: str) -> Any:
    """The `attribute` of a module of the package; or what "path/to/file.py:name" names.

    Raises:
      ValueError: there is no such thing; `key` is where the config names it.
    """
    if lookup.is_path(name):
        return lookup.from_path(name, key)
    return getattr(lookup.find_module(package, name, attribute, key), attribute)


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
    faces, test_sets = _read(config.data.name, config.data.kw.to_dict(), "data")
    if path := config.data.get("cleaned"):  # which a config of an earlier version may lack
        faces = cleaned.relabel(faces, path)
    if identities := config.data.get("held_out"):
        faces, validation = held_out.hold_out(faces, identities)
        test_sets = {validation.name: validation}  # the test is not looked at while one chooses
    return faces, test_sets


def _read(name: str, kw: Mapping[str, Any], key: str) -> tuple[Faces, dict[str, Pairs]]:
    """What a reader gives for these arguments; `key` is where the config names it."""
    load = _named(readers, name, "load", f"{key}.name")
    lookup.check_arguments(load, kw, f"{key}.kw")
    return load(**kw)


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
    return make(
        config,
        model=make_model(config),
        objective=losses,
        mesh=mesh,
        image_shape=image_shape_of(faces, config.batch_size, mesh),
        total_steps=total,
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
    model = _named(models, config.model.name, "Model", "model.name")
    known = set()
    if dataclasses.is_dataclass(model):
        known = {f.name for f in dataclasses.fields(model)} - {"parent", "name"}
    if "embedding_dim" not in known:
        raise ValueError(
            f"model.name={config.model.name!r}: give a flax.linen.Module with a field embedding_dim"
        )
    for key in config.model.kw:
        if key not in known:
            hint = lookup.nearest(key, known)
            raise ValueError(f"model.kw.{key} is not an argument of {config.model.name}; {hint}")
    return model(embedding_dim=config.model.embedding_dim, **config.model.kw)


def make_evaluators(
    config: Config,
    faces: Faces,
    test_sets: dict[str, Pairs],
    steps: step.Step,
    mesh: jax.sharding.Mesh,
) -> Evaluators:
    """Those that config.evals names, each on its own data and at its own interval.

    config.evals.NAME is {type, data, every, batch_size, score} and arguments of the evaluator:

        type         a module of evaluators, or "path/to/file.py:Evaluator"
        data         "tests" for every test set of the training reader, the name of one, or
                     {name, kw} of another reader; none for an evaluator of the network alone
        every, batch_size, score   as config.evaluate has them, unless they stand here

    Figures begin with NAME; with data="tests", with the name of the test set.

    Raises:
      ValueError: an entry with a key or value that does not fit; names it.
    """
    entries, embedded, read = [], {}, {}
    shared = Subject("", num_classes=faces.num_classes, mesh=mesh)
    if objective.one_row_a_class(config):
        shared = dataclasses.replace(
            shared,
            prototypes=lambda state: objective.weights(state["params"]["prototypes"]),
            chunk_size=objective.chunk_size_between(config, faces.num_classes, mesh),
        )
    for name, entry in configs.translate(config.to_dict())["evals"].items():
        key = f"evals.{name}"
        made, own = _evaluator(entry, key)
        every, size, score = (
            entry.get(k, config.evaluate[k]) for k in ("every", "batch_size", "score")
        )
        for what, value, least in (("every", every, 0), ("batch_size", size, 1)):
            if type(value) is not int or value < least:
                raise ValueError(f"{key}.{what}={value!r}: give a whole number, {least} or more")
        size = -(-size // mesh.size) * mesh.size
        score = make_score(config, score, key if "score" in entry else "evaluate")
        for title, pairs in _data(entry, name, test_sets, faces, read).items():
            images = None
            if pairs is not None:
                images = embedded.setdefault(
                    (id(pairs), size), Embedded(make_embed(steps, pairs, mesh), pairs, size)
                )
            subject = dataclasses.replace(
                shared, name=title, pairs=pairs, outputs=images, score=score
            )
            entries.append(Entry(made(subject, **own), every, images))
    return Evaluators(entries)


_OF_ALL = ("type", "data", "every", "batch_size", "score")  # what every entry of evals may have


def _evaluator(entry: Any, key: str) -> tuple[Any, dict[str, Any]]:
    """The class that an entry names, and the arguments that are its own."""
    if not isinstance(entry, Mapping) or "type" not in entry:
        raise ValueError(f"{key}={entry!r}: give a dict with a type, such as 'verification'")
    made = _named(evaluators, entry["type"], "Evaluator", f"{key}.type")
    own = {k: v for k, v in entry.items() if k not in _OF_ALL}
    takes = inspect.signature(made).parameters.values()
    known = {*_OF_ALL, *(p.name for p in takes if p.kind == p.KEYWORD_ONLY)}
    for k in own:
        if k not in known:
            raise ValueError(f"{key}.{k} is unknown; {lookup.nearest(k, known)}")
    lookup.check_arguments(made, own, key)
    return made, own


def _data(
    entry: Mapping[str, Any],
    name: str,
    test_sets: dict[str, Pairs],
    faces: Faces,
    read: dict[str, dict[str, Pairs]],
) -> Mapping[str, Pairs | None]:
    """The test sets of an entry, by what its figures begin with; {name: None} without data.

    `read` is what other readers gave to the entries before.
    """
    data = entry.get("data", "")
    if data == "tests":
        return test_sets
    if not data:
        return {name: None}
    if isinstance(data, str):
        if data not in test_sets:
            hint = lookup.nearest(data, {*test_sets, "tests"})
            raise ValueError(f"evals.{name}.data={data!r} is no test set of the reader; {hint}")
        return {name: test_sets[data]}
    key = f"evals.{name}.data"
    for k in ("name", *data):
        if k not in data or k not in ("name", "kw"):
            raise ValueError(f"{key}={data!r}: give {{name, kw}} of a reader, as config.data has")
    if (words := json.dumps(data, sort_keys=True, default=str)) not in read:
        _, read[words] = _read(data["name"], data.get("kw", {}), key)
    found, wanted = read[words], image_shape_of(faces)
    for pairs in found.values():
        if (shape := image_shape_of(pairs)) != wanted:
            raise ValueError(
                f"{key}: images of {shape[0]} × {shape[1]}, and the network is trained on "
                f"{wanted[0]} × {wanted[1]}: set its image_size"
            )
    return {name if len(found) == 1 else f"{name}_{k}": pairs for k, pairs in found.items()}


def _cosine(config: Config, key: str) -> Score:
    del config, key
    return lambda _, outputs, first, second: verification.cosine_scores(
        outputs["embedding"], first, second
    )


def _group_aware(config: Config, key: str) -> Score:
    if not config.model.kw.get("num_groups", 0):
        raise ValueError(f"{key}.score='group_aware' needs model.name='group_head'")
    return lambda _, outputs, first, second: groups.group_aware_similarity(
        outputs["embedding"], outputs["group_feature"], first, second
    )


def _siamese(config: Config, key: str) -> Score:
    if "siamese" not in config.pairs:
        raise ValueError(f"{key}.score='siamese' needs the term pairs.siamese")
    features = config.pairs.siamese.features
    learned = jax.jit(partial(pair_losses.siamese_score, features=features))

    def score(state: step.State, outputs: Any, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        x, own = outputs["embedding"], state["params"]["terms"]["pairs.siamese"]
        return np.asarray(learned(own, x[first], x[second]))

    return score


SCORES = {"cosine": _cosine, "group_aware": _group_aware, "siamese": _siamese}


def make_score(config: Config, name: str, key: str) -> Score:
    """How two images are compared; `key` is the section of the config that says so.

    Raises:
      ValueError: no such score, or the network or the objective lacks what it needs.
    """
    return lookup.find(SCORES, name, f"{key}.score")(config, key)


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
    faces: Faces | Pairs, batch_size: int = 1, mesh: jax.sharding.Mesh | None = None
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
    """(state, batch of records, the same in every process) → {"embedding": [b, d], ...}."""
    to_images = _on_device(data.to_images, mesh)

    def embed(state: step.State, batch: dict[str, np.ndarray]) -> Any:
        return steps.embed(state, to_images(sharding.put_global_batch(mesh, batch)))

    return embed
