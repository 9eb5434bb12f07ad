"""Trains, evaluates and reports one experiment; read it from top to bottom.

data → model → objective → step → evaluators → restore → loop → report
"""

import collections
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from absl import logging

from marginface import build, runtime, sharding
from marginface import config as configs
from marginface.config import Config
from marginface.evaluators.common import NotFiniteError
from marginface.report.run import page
from marginface.runs import folder as run_folder
from marginface.runs import metrics
from marginface.runs.trackers import start_trackers
from marginface.training import objective, step
from marginface.training.checkpoint import Checkpoints
from marginface.training.preemption import Preemption


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
    faces, test_sets = build.load_data(config)
    total = build.total_steps(config, faces, mesh)
    batches = build.make_batches(config, faces)
    prepare = build.make_prepare(faces, mesh)

    # --- model, objective, step --------------------------------------------------------------
    steps = build.make_steps(config, faces, mesh, total)
    numbers = objective.hyper(config), jnp.int32(config.seed)
    hyper, seed = sharding.put_everywhere(mesh, numbers)  # once: no step waits for them
    if first_process:
        print("\n".join(build.describe(config, faces, steps, mesh, hyper, seed)), flush=True)

    # --- evaluators ------------------------------------------------------------------------
    evaluators = build.make_evaluators(config, faces, test_sets, steps, mesh)

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
        page.report(
            workdir,
            results=results,
            evaluators=evaluators.verifications,
            mesh=mesh,
            seconds=seconds_before + time.monotonic() - started,
            command=(origin or {}).get("command"),
            separability=evaluators.separability,
            groupings=evaluators.groupings,
            walk=build.walk_of(config, faces, mesh),
        )
    return True


def diverged(at: int, what: str, workdir: pathlib.Path, good: Sequence[int]) -> str:
    """What a run that diverged says; `good` are the steps of its checkpoints."""
    last = f"no checkpoint was saved in {workdir} before"
    if good:
        last = f"the last good checkpoint in {workdir} is that of step {max(good)}"
    return f"step {at}: {what}; {last}; lower the learning rate or the margin"
