"""Trains, evaluates and reports one experiment; read it from top to bottom.

data → model → objective → step → evaluators → restore → loop → report
"""

import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from marginface import config as configs
from marginface import models, runtime, sharding
from marginface.config import Config
from marginface.data import Faces, Pairs, cleaned, held_out, pipeline, readers
from marginface.evaluators import geometry, grouping, verification
from marginface.evaluators.common import NotFiniteError
from marginface.losses import groups, pair_losses
from marginface.report import run_folder
from marginface.runs import metrics
from marginface.runs.trackers import start_trackers
from marginface.training import footprint, objective, step
from marginface.training.checkpoint import Checkpoints, Preemption

SCORES = ("cosine", "group_aware", "siamese")
GROUP_OUTPUTS = ("group_feature", "group_logits")  # evaluated beside the embedding, if there


class DivergedError(Exception):
    """A loss or gradient was not finite; the last good checkpoint stands."""


def train(
    config: Config,
    workdir: pathlib.Path,
    *,
    origin: Mapping[str, Any] | None = None,
    allow_changed_data: bool = False,
) -> bool:
    """Trains as `config` says in the folder `workdir`; continues what is there.

    Args:
      config: as the files in experiments/ make it.
      workdir: the run folder.
      origin: what the user typed, for the report: see run_folder.claim.
      allow_changed_data: continue though the data set is not the one the run began with.

    Returns:
      True when the run is complete, False when SIGTERM stopped it after saving.

    Raises:
      ValueError: a config, data set or run folder that does not fit; one line that says which.
      DivergedError: names the step and the terms that were not finite.
    """
    started = time.monotonic()
    first_process = jax.process_index() == 0
    mesh = sharding.make_mesh()

    # --- data ------------------------------------------------------------------------------
    faces, test_sets = load_data(config)
    total = total_steps(config, faces, mesh)
    batches = make_batches(config, faces)
    prepare = make_prepare(faces, mesh)

    # --- model, objective, step --------------------------------------------------------------
    steps = make_steps(config, faces, mesh, total)
    numbers = objective.hyper(config), jnp.int32(config.seed)
    hyper, seed = sharding.put_everywhere(mesh, numbers)  # once: no step waits for them
    if first_process:
        print("\n".join(describe(config, faces, steps, mesh, hyper, seed)), flush=True)

    # --- evaluators ------------------------------------------------------------------------
    evaluators = make_evaluators(config, faces, test_sets, steps, mesh)

    # --- run folder, restore -----------------------------------------------------------------
    if first_process:
        run_folder.claim(workdir, configs.to_json(config), origin)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        best_metric=f"{next(iter(test_sets))}/accuracy" if test_sets else None,
    )
    restored = checkpoints.restore(steps.like)
    meta: dict[str, Any] = {"step": 0, "window": [], "seconds": 0.0, "unreadable": 0}
    if restored is None:
        state = steps.init(seed, hyper)
    else:
        _, state, meta = restored
        if meta["data"] != faces.fingerprint and not allow_changed_data:
            raise ValueError(
                f"{workdir}: the data set is not the one this run began with (fingerprint "
                f"{faces.fingerprint[:12]}, was {meta['data'][:12]}): restore the data, choose "
                "another --workdir, or give --allow_changed_data"
            )
    now = meta["step"]
    window = metrics.Window(config.batch_size, meta["window"], meta["unreadable"])
    batches.set_state({"step": now})
    resume_step, tracked = now if restored else -1, None
    if first_process:
        tracked = start_trackers(config.to_dict(), workdir, resume_step=resume_step)
    writer = metrics.Writer(
        workdir,
        resume_step=resume_step,
        total_steps=total,
        active=first_process,
        trackers=tracked,
    )

    # --- loop ----------------------------------------------------------------------------------
    pending: collections.deque = collections.deque()

    def give_up(at: int, what: str) -> NoReturn:
        checkpoints.wait()  # one that is being written counts
        raise DivergedError(diverged(at, what, workdir, checkpoints.steps()))

    def settle(keep: int) -> None:
        """Reads the figures of all but the newest `keep` steps; logs; stops a diverged run."""
        while len(pending) > keep:
            at, arrays = pending.popleft()
            values = {k: float(v) for k, v in arrays.items()}
            if bad := metrics.not_finite(values):
                give_up(at, bad)
            window.add(values)
            if at % config.log_every == 0 or at == total:
                line = window.line()
                if line.get("train/collapsed") == 1:
                    logging.warning(
                        "step %d: collapse: all embeddings are one point, so the triplet loss "
                        "equals its margin; take semi-hard triplets or a lower learning rate",
                        at,
                    )
                writer.write(at, line)

    def evaluate(at: int, state: step.State) -> dict[str, float]:
        """All that is measured of a state; stops a run whose embeddings are not finite."""
        settle(keep=0)
        try:
            return evaluators.run(state)
        except NotFiniteError as error:
            give_up(at, str(error))

    def save(at: int, state: step.State, results: dict[str, float] | None) -> None:
        settle(keep=0)
        writer.sync()
        meta = {
            "step": at,
            "window": window.values,
            "unreadable": window.unreadable,
            "seconds": seconds_before + time.monotonic() - started,
            "data": faces.fingerprint,
        }
        checkpoints.save(at, state, meta, results)

    seconds_before = meta["seconds"]
    results = None
    try:
        if now == 0 and restored is None:
            results = evaluate(0, state)
            writer.write(0, results)
        window.restart_clock()
        runtime.collect_as_usual()
        with Preemption() as preemption:
            while now < total:
                try:
                    batch = next(batches)
                except Exception:
                    if not preemption.signalled:
                        raise
                    # The signal went to the whole process group, and ended the workers first.
                    save(now, state, None)
                    checkpoints.wait()
                    return False
                images, labels, skipped = prepare(sharding.put_batch(mesh, batch))
                state, figures = steps.train(state, images, labels, hyper, seed)
                now += 1
                pending.append((now, figures | {"data/unreadable": skipped}))
                settle(keep=2)
                writer.advance(now)
                stop, last = preemption.requested(now), now == total
                results = None
                if last or (config.evaluate.every and now % config.evaluate.every == 0):
                    results = evaluate(now, state)
                    writer.write(now, results)
                    window.restart_clock()
                if stop or results or now % config.checkpoint_every == 0:
                    save(now, state, results)
                if stop and not last:
                    checkpoints.wait()
                    return False
        checkpoints.wait()
        if results is None:  # complete already: the same command only reports again
            results = evaluate(now, state)
    finally:
        batches.close()
        writer.close()
        checkpoints.close()

    # --- report --------------------------------------------------------------------------------
    if first_process:
        run_folder.report(
            workdir,
            results=results,
            evaluators=evaluators.verifications,
            mesh=mesh,
            seconds=seconds_before + time.monotonic() - started,
            command=(origin or {}).get("command"),
            separability=evaluators.separability,
            groupings=evaluators.groupings,
            walk=walk_of(config, faces, mesh),
        )
    return True


def diverged(at: int, what: str, workdir: pathlib.Path, good: Sequence[int]) -> str:
    """What a run that diverged says; `good` are the steps of its checkpoints."""
    last = f"no checkpoint was saved in {workdir} before"
    if good:
        last = f"the last good checkpoint in {workdir} is that of step {max(good)}"
    return f"step {at}: {what}; {last}; lower the learning rate or the margin"


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
    reader = configs.find_module(readers, config.data.name, "load", "data.name")
    arguments = config.data.kw.to_dict()
    configs.check_arguments(reader.load, arguments, "data.kw")
    faces, test_sets = reader.load(**arguments)
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
    module = configs.find_module(models, config.model.name, "Model", "model.name")
    known = {f.name for f in dataclasses.fields(module.Model)} - {"parent", "name"}
    for key in config.model.kw:
        if key not in known:
            hint = configs.nearest(key, known)
            raise ValueError(f"model.kw.{key} is not an argument of {config.model.name}; {hint}")
    return module.Model(embedding_dim=config.model.embedding_dim, **config.model.kw)


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
        raise ValueError(f"evaluate.score={score!r} is unknown; {configs.nearest(score, SCORES)}")
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
            learned(state["params"]["terms"]["siamese"], x[first], x[second])
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


def make_embed(steps: step.Step, pairs: Pairs, mesh: jax.sharding.Mesh) -> Any:
    """(state, batch of records, the same in every process) → embeddings [b, d]."""
    to_images = _on_device(pairs.to_images, mesh)

    def embed(state: step.State, batch: dict[str, np.ndarray]) -> Any:
        return steps.embed(state, to_images(sharding.put_global_batch(mesh, batch)))

    return embed
