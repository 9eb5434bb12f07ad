"""Trains, evaluates and reports one experiment; read it from top to bottom.

data → model → objective → step → evaluators → restore → loop → report
"""

import collections
import dataclasses
import pathlib
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from marginface import config as configs
from marginface import data, groups, metrics, models, objective, pair_losses, sharding, step
from marginface.checkpoint import Checkpoints, Preemption
from marginface.config import Config
from marginface.data import Faces, Pairs, cleaned, pipeline
from marginface.evaluators import geometry, grouping, verification
from marginface.report import run_folder

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
    total = config.steps or max(1, round(config.epochs * len(faces.source) / config.batch_size))
    devices = mesh.size * config.optimizer.accumulate
    if config.batch_size % devices:
        raise ValueError(
            f"config.batch_size={config.batch_size} is not a multiple of devices × "
            f"optimizer.accumulate = {mesh.size} × {config.optimizer.accumulate} = {devices}"
        )
    batches = pipeline.train_iterator(
        faces,
        seed=config.seed,
        batch_size=config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        images_per_identity=config.data.images_per_identity,
    )
    prepare = make_prepare(faces, mesh)
    image_shape = image_shape_of(faces)

    # --- model, objective, step --------------------------------------------------------------
    model = make_model(config)
    losses = objective.make(
        config,
        num_classes=faces.num_classes,
        embedding_dim=config.model.embedding_dim,
        mesh=mesh,
        total_steps=total,
    )
    score_fn, num_groups = make_score(config), config.model.kw.get("num_groups", 0)
    steps = step.make(
        config,
        model=model,
        objective=losses,
        mesh=mesh,
        image_shape=image_shape,
        total_steps=total,
        outputs=("embedding", *GROUP_OUTPUTS) if num_groups else ("embedding",),
    )
    hyper, seed = objective.hyper(config), jnp.int32(config.seed)

    # --- evaluators ------------------------------------------------------------------------
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
            chunk_size=config.loss.chunk_size or None,
            mesh=mesh,
        )
        for _ in range(objective.one_row_a_class(config))
    ]
    groupings = [grouping.Evaluator(v, num_groups=num_groups) for v in verifications if num_groups]
    evaluators = [*verifications, *geometries, *groupings]

    def evaluate(state: step.State) -> dict[str, float]:
        return {name: value for e in evaluators for name, value in e.run(state)}

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
        state = steps.init(seed)
    else:
        _, state, meta = restored
        if meta["data"] != faces.fingerprint and not allow_changed_data:
            raise ValueError(
                f"{workdir}: the data set is not the one this run began with (fingerprint "
                f"{faces.fingerprint[:12]}, was {meta['data'][:12]}): restore the data, choose "
                "another --workdir, or give --allow_changed_data"
            )
    now, window, unreadable = meta["step"], meta["window"], meta["unreadable"]
    batches.set_state({"step": now})
    wandb_run = None
    if config.wandb.use and first_process:
        wandb_run = metrics.start_wandb(config.wandb, workdir, config.to_dict())
    writer = metrics.Writer(
        workdir,
        resume_step=now if restored else -1,
        total_steps=total,
        active=first_process,
        wandb_run=wandb_run,
    )

    # --- loop ----------------------------------------------------------------------------------
    pending: collections.deque = collections.deque()
    since = time.monotonic()

    def settle(keep: int) -> None:
        """Reads the figures of all but the newest `keep` steps; logs; stops a diverged run."""
        nonlocal since, unreadable
        while len(pending) > keep:
            at, arrays = pending.popleft()
            values = {k: float(v) for k, v in arrays.items()}
            if bad := metrics.not_finite(values):
                good = max(checkpoints.steps(), default=None)
                raise DivergedError(
                    f"step {at}: {', '.join(bad)} not finite; the last good checkpoint in "
                    f"{workdir} is that of step {good}; lower the learning rate or the margin"
                )
            unreadable += int(values.pop("data/unreadable"))
            window.append(values)
            if at % config.log_every == 0 or at == total:
                line = {k: float(np.mean([w[k] for w in window])) for k in values}
                if unreadable:
                    line["data/unreadable"] = float(unreadable)
                if line.get("train/collapsed") == 1:
                    logging.warning(
                        "step %d: collapse: all embeddings are one point, so the triplet loss "
                        "equals its margin; take semi-hard triplets or a lower learning rate",
                        at,
                    )
                elapsed = time.monotonic() - since
                line["time/examples_per_s"] = len(window) * config.batch_size / elapsed
                writer.write(at, line)
                window.clear()
                since = time.monotonic()

    def save(at: int, state: step.State, results: dict[str, float] | None) -> None:
        settle(keep=0)
        writer.sync()
        meta = {
            "step": at,
            "window": window,
            "unreadable": unreadable,
            "seconds": seconds_before + time.monotonic() - started,
            "data": faces.fingerprint,
        }
        checkpoints.save(at, state, meta, results)

    seconds_before = meta["seconds"]
    results = None
    try:
        if now == 0 and restored is None:
            results = evaluate(state)
            writer.write(0, results)
        with Preemption() as preemption:
            while now < total:
                images, labels, skipped = prepare(sharding.put_batch(mesh, next(batches)))
                state, figures = steps.train(state, images, labels, hyper, seed)
                now += 1
                pending.append((now, figures | {"data/unreadable": skipped}))
                settle(keep=2)
                writer.advance(now)
                stop, last = preemption.requested(now), now == total
                results = None
                if last or (config.evaluate.every and now % config.evaluate.every == 0):
                    settle(keep=0)
                    results = evaluate(state)
                    writer.write(now, results)
                    since = time.monotonic()
                if stop or results or now % config.checkpoint_every == 0:
                    save(now, state, results)
                if stop and not last:
                    checkpoints.wait()
                    return False
        checkpoints.wait()
        if results is None:  # complete already: the same command only reports again
            results = evaluate(state)
    finally:
        batches.close()
        writer.close()
        checkpoints.close()

    # --- report --------------------------------------------------------------------------------
    if first_process:
        run_folder.report(
            workdir,
            results=results,
            evaluators=verifications,
            mesh=mesh,
            seconds=seconds_before + time.monotonic() - started,
            command=(origin or {}).get("command"),
            separability=geometries[0].separability if geometries else None,
            groupings=groupings,
        )
    return True


def load_data(config: Config) -> tuple[Faces, dict[str, Pairs]]:
    """The training set and the test sets that config.data names."""
    reader = configs.find_module(data, config.data.name, "load", "data.name")
    arguments = config.data.kw.to_dict()
    configs.check_arguments(reader.load, arguments, "data.kw")
    faces, test_sets = reader.load(**arguments)
    if path := config.data.get("cleaned"):  # which a config of an earlier version may lack
        faces = cleaned.relabel(faces, path)
    return faces, test_sets


def make_model(config: Config) -> Any:
    """The network that config.model names, its arguments checked."""
    module = configs.find_module(models, config.model.name, "Model", "model.name")
    known = {f.name for f in dataclasses.fields(module.Model)} - {"parent", "name"}
    for key in config.model.kw:
        if key not in known:
            hint = configs.nearest(key, known)
            raise ValueError(f"model.kw.{key} is not an argument of {config.model.name}; {hint}")
    return module.Model(embedding_dim=config.model.embedding_dim, **config.model.kw)


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
    """A jitted function: batch → images, labels, number of unreadable images skipped."""
    by_batch = NamedSharding(mesh, P(sharding.AXIS))

    def prepare(batch: dict[str, Any]) -> tuple[Any, Any, Any]:
        return faces.to_images(batch), batch["label"], jnp.sum(batch["unreadable"])

    return jax.jit(prepare, out_shardings=(by_batch, by_batch, NamedSharding(mesh, P())))


def image_shape_of(faces: Faces) -> tuple[int, int, int]:
    """[h, w, 3] of the network's input, without making an image."""
    record = faces.decode(faces.source[0])
    batch = {
        k: jax.ShapeDtypeStruct((1, *np.shape(v)), np.asarray(v).dtype) for k, v in record.items()
    }
    _, height, width, channels = jax.eval_shape(faces.to_images, batch).shape
    return height, width, channels


def make_embed(steps: step.Step, pairs: Pairs, mesh: jax.sharding.Mesh) -> Any:
    """(state, batch of records, the same in every process) → embeddings [b, d]."""
    by_batch = NamedSharding(mesh, P(sharding.AXIS))
    to_images = jax.jit(pairs.to_images, out_shardings=by_batch)

    def embed(state: step.State, batch: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(steps.embed(state, to_images(sharding.put_global_batch(mesh, batch))))

    return embed
