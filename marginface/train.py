"""Trains, evaluates and reports one experiment; read it from top to bottom.

data → network → objective → step → evaluators → restore → loop → report
"""

import contextlib
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from marginface import build, runtime, sharding
from marginface.config import Config
from marginface.report.run import page
from marginface.runs.record import DivergedError, Record
from marginface.training import objective
from marginface.training.preemption import Preemption

__all__ = ["DivergedError", "train"]


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
      origin: what the user typed, for the report: see runs.folder.claim.
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

    # --- network, objective, step ------------------------------------------------------------
    steps = build.make_steps(config, faces, mesh, total)
    numbers = objective.hyper(config), jnp.int32(config.seed)
    hyper, seed = sharding.put_everywhere(mesh, numbers)  # once: no step waits for them
    if first_process:
        print("\n".join(build.describe(config, faces, steps, mesh, hyper, seed)), flush=True)

    # --- evaluators ------------------------------------------------------------------------
    evaluators = build.make_evaluators(config, faces, test_sets, steps, mesh)

    # --- run folder, restore -----------------------------------------------------------------
    run = Record(
        workdir,
        config,
        fingerprint=faces.fingerprint,
        total_steps=total,
        best_metric=evaluators.ranking,
        origin=origin,
        started=started,
    )
    state = run.restore(steps.like, allow_changed_data=allow_changed_data)
    if state is None:
        state = steps.init(seed, hyper)
    now, results = run.step, None
    batches.set_state({"step": now})
    run.begin()

    # --- loop ----------------------------------------------------------------------------------
    with contextlib.closing(run), contextlib.closing(batches):
        if run.fresh:
            run.write(0, run.evaluate(0, evaluators.run, state))
        runtime.collect_as_usual()
        with Preemption() as preemption:
            while now < total:
                try:
                    batch = next(batches)
                except Exception:
                    if not preemption.signalled:
                        raise
                    # The signal went to the whole process group, and ended the workers first.
                    run.save(now, state)
                    run.wait()
                    return False
                images, labels, skipped = prepare(sharding.put_batch(mesh, batch))
                state, figures = steps.train(state, images, labels, hyper, seed)
                now += 1
                run.add(now, figures | {"data/unreadable": skipped})
                stop, last = preemption.requested(now), now == total
                results, due = None, evaluators if last else evaluators.due(now)
                if due or last:
                    results = run.evaluate(now, due.run, state)
                    run.write(now, results)
                if stop or last or results or now % config.checkpoint_every == 0:
                    run.save(now, state, results)
                if stop and not last:
                    run.wait()  # here, where a second signal does not end the process
                    return False
        run.wait()
        if results is None:  # complete already: the same command only reports again
            results = run.evaluate(now, evaluators.run, state)

    # --- report --------------------------------------------------------------------------------
    if first_process:
        page.report(
            workdir,
            results=results,
            evaluators=evaluators,
            mesh=mesh,
            seconds=run.seconds,
            command=(origin or {}).get("command"),
            walk=build.walk_of(config, faces, mesh),
        )
    return True
