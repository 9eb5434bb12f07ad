"""A sweep as one program: units that differ only in numbers train together.

Their states are stacked, and the train step is mapped (jax.vmap) over the states, the numbers and
the seeds: one compilation and one process for all. Units with the same seed see the same batches in
the same order, as they would alone, so that they are compared with common random numbers.

Each unit has its own run folder with everything that the plain command writes, checkpoints too. The
plain command or another backend can continue a run that this one began, and this one theirs.
"""

import argparse
import contextlib
import json
import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from marginface import build, devices, runtime, sharding
from marginface import config as configs
from marginface.command import DIVERGED, INPUT_ERROR, RUN_AGAIN
from marginface.data import pipeline
from marginface.evaluators.common import Evaluators
from marginface.launch.engines.board import Board
from marginface.launch.units import Unit
from marginface.report.run import page
from marginface.runs import folder as run_folder
from marginface.runs.record import DivergedError, Record
from marginface.training import objective, step
from marginface.training.checkpoint import Checkpoints
from marginface.training.preemption import Preemption

UNITS = "units"  # the mesh axis over which the units are split
_SPARE = 0.8  # the part of the free memory that may be filled


def add_arguments(parser: Any) -> None:
    """The options of this backend."""
    parser.add_argument(
        "--width", type=int, default=0, help="units in one program; default: as many as fit"
    )


def submit(units: Sequence[Unit], options: argparse.Namespace) -> bool:
    """Trains the units, group by group. Returns True: they have ended."""
    if options.width < 0:
        raise ValueError(f"--width {options.width}: give 0 (as many as fit) or more")
    runtime.start()
    run(units, width=options.width)
    return True


def run(units: Sequence[Unit], *, width: int = 0) -> None:
    """Trains units that differ only in numbers together, and groups of them one after the other.

    Args:
        units: those to run.
        width: how many in one program; 0 for as many as fit into memory.

    Raises:
        KeyboardInterrupt: SIGTERM; every unit that was training is saved.
    """
    board = Board(units)
    try:
        for group in groups(units):
            try:
                with runtime.one_line_errors():
                    _Program(group, width).run(board)
            except (ValueError, OSError) as error:  # of its data or config; other groups go on
                ended = ("done", "diverged")
                _refuse(
                    [u for u in group if run_folder.state(u.folder).kind not in ended], error, board
                )
    finally:
        board.close()


def groups(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units at the same step whose configs differ only in traced numbers and seeds."""
    found: dict[tuple[str, int], list[Unit]] = {}
    for unit in units:
        same = json.dumps(objective.static(unit.config), sort_keys=True, default=list)
        saved = Checkpoints(unit.folder / run_folder.CHECKPOINTS)
        found.setdefault((same, max(saved.steps(), default=0)), []).append(unit)
        saved.close()
    return list(found.values())


class _Program:
    """Units that train together: they share data, network, evaluators and one compiled step."""

    def __init__(self, units: Sequence[Unit], width: int) -> None:
        self.units, self.config = list(units), units[0].config
        config, self.mesh = self.config, sharding.make_mesh(1)  # a unit alone, to evaluate it
        self.faces, test_sets = build.load_data(config)
        self.total = build.total_steps(config, self.faces, self.mesh)
        self.alone = build.make_steps(config, self.faces, self.mesh, self.total)
        self.evaluators = build.make_evaluators(
            config, self.faces, test_sets, self.alone, self.mesh
        )
        self.prepare = build.make_prepare(self.faces, self.mesh)
        self.untrained: dict[int, dict[str, float]] = {}  # by seed: no other number decides it
        count = len(jax.devices())
        self.wide = jax.make_mesh(
            (count, 1),
            (UNITS, sharding.AXIS),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
            devices=jax.devices(),
        )
        self.functions = build.make_steps(config, self.faces, None, self.total, make=step.functions)
        wanted = -(-min(width or len(units), len(units)) // count) * count
        self.seeds = min(wanted, len({unit.config.seed for unit in units}))
        self.width, self.step = self._compile(wanted, bounded=not width)

    def run(self, board: Board) -> None:
        """Trains all units, `width` at a time."""
        for start in range(0, len(self.units), self.width):
            runs = self._restored(self.units[start : start + self.width], board)
            # Their steps can differ: where the newest checkpoint is damaged, an older one is used.
            for now in sorted({run.record.step for run in runs}):
                _Chunk(self, [run for run in runs if run.record.step == now], board).train()

    def _restored(self, units: Sequence[Unit], board: Board) -> list["_Run"]:
        """The units whose folders and data fit, each restored from its newest checkpoint."""
        runs = []
        for unit in units:
            try:
                runs.append(_Run(unit, self))
                board.started(unit)
            except (ValueError, OSError) as error:
                _refuse([unit], error, board)
        return runs

    def _compile(self, width: int, bounded: bool) -> tuple[int, Any]:
        """(how many units fit into memory, the compiled step for that many)."""
        count = self.wide.size
        while True:
            compiled = self._step(width)
            memory = compiled.memory_analysis()
            need = memory.temp_size_in_bytes + memory.argument_size_in_bytes
            free = _SPARE * devices.free_memory(self.wide.devices.flat[0])
            if not bounded or need <= free or width <= count:
                return width, compiled
            fitting = int(width * free / need) // count * count
            width = max(count, min(fitting, width - count))

    def _step(self, width: int) -> Any:
        """(states, images [s, b, ...], labels [s, b], slot [u], hyper, seed [u]) → states, figures.

        slot: for each of the u units, which of the s batches it trains on.
        """

        def step(states: Any, images: Any, labels: Any, slot: Any, hyper: Any, seed: Any) -> Any:
            def one(state: Any, slot: Any, hyper: Any, seed: Any) -> Any:
                return self.functions.train(state, images[slot], labels[slot], hyper, seed)

            return jax.vmap(one)(states, slot, hyper, seed)

        by_unit, everywhere = P(UNITS), P()
        # Each unit is on one device alone: no value has to be the same on all of them.
        split = jax.shard_map(
            step,
            mesh=self.wide,
            in_specs=(by_unit, everywhere, everywhere, by_unit, by_unit, by_unit),
            out_specs=by_unit,
            check_vma=False,
        )

        def stacked(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((width, *leaf.shape), leaf.dtype, sharding=self.by_unit)

        batch, edge = self.config.batch_size, build.image_shape_of(self.faces)
        number = stacked(jax.ShapeDtypeStruct((), jnp.int32))
        lowered = jax.jit(split, donate_argnums=0).lower(
            jax.tree.map(stacked, self.functions.like),
            jax.ShapeDtypeStruct((self.seeds, batch, *edge), jnp.float32, sharding=self.everywhere),
            jax.ShapeDtypeStruct((self.seeds, batch), jnp.int32, sharding=self.everywhere),
            number,
            jax.tree.map(stacked, objective.hyper(self.config)),
            number,
        )
        return lowered.compile()

    @property
    def by_unit(self) -> NamedSharding:
        return NamedSharding(self.wide, P(UNITS))

    @property
    def everywhere(self) -> NamedSharding:
        return NamedSharding(self.wide, P())


class _Run:
    """One unit while it trains with others."""

    def __init__(self, unit: Unit, program: _Program) -> None:
        self.unit, self.alive = unit, True
        self.record = Record(
            unit.folder,
            unit.config,
            fingerprint=program.faces.fingerprint,
            total_steps=program.total,
            best_metric=program.evaluators.ranking,
            origin=unit.origin(),
            started=time.monotonic(),
        )
        state = self.record.restore(program.alone.like, advice="or choose another --runs")
        self.record.wait()  # no unit keeps threads while others train
        if state is None:
            numbers = jnp.int32(unit.config.seed), objective.hyper(unit.config)
            state = program.alone.init(*sharding.put_everywhere(program.mesh, numbers))
        self.state = jax.device_get(state)  # one device has no room for all
        self._log = (unit.folder / run_folder.LOG).open("a", encoding="utf-8")
        with self.logging():
            self.record.begin()

    @contextlib.contextmanager
    def logging(self) -> Generator[None]:
        """Sends what would go to the terminal to the unit's log.txt, as --backend local does."""
        with contextlib.redirect_stdout(self._log), contextlib.redirect_stderr(self._log):
            yield

    def write(self, at: int, results: dict[str, float]) -> None:
        """A line of metrics.jsonl."""
        with self.logging():
            self.record.write(at, results)

    def save(self, at: int, state: Any, results: dict[str, float] | None) -> None:
        """A checkpoint as the plain command writes it."""
        self.record.save(at, state, results)
        self.record.wait()

    def stop(self, code: int, message: str) -> None:
        """Ends the run, unless it has ended already; stopped.json says why."""
        if not self.alive:
            return
        text = configs.to_json(self.unit.config)
        run_folder.record_stop(self.unit.folder, text, code, message)
        self.close()

    def close(self) -> None:
        """Closes the unit's files and lets other processes train in its folder."""
        if self.alive:
            self.alive = False
            self.record.close()
            self._log.close()
            run_folder.release(self.unit.folder)


class _Chunk:
    """As many units as train in one program."""

    def __init__(self, program: _Program, runs: list[_Run], board: Board) -> None:
        self.program, self.runs, self.board = program, runs, board
        self.begun = runs[0].record.step
        for run in runs:
            run.record.started, run.record.together = time.monotonic(), len(runs)

    def train(self) -> None:
        """Trains, evaluates and reports the units.

        Raises:
            KeyboardInterrupt: SIGTERM; the units are saved.
        """
        streams = self._streams()
        try:
            with Preemption() as preemption:
                self._loop(list(streams.values()), list(streams), preemption)
                if preemption.requested(self.program.total):
                    raise KeyboardInterrupt  # all units are saved; no other chunk begins
        finally:
            for stream in streams.values():
                stream.close()
            for run in self.runs:
                run.close()

    def _streams(self) -> dict[int, pipeline.TrainIterator]:
        """For each seed, its batches from the chunk's first step on."""
        streams = {}
        for run in self.runs:
            if run.unit.config.seed not in streams:
                stream = build.make_batches(run.unit.config, self.program.faces)
                stream.set_state({"step": self.begun})
                streams[run.unit.config.seed] = stream
        return streams

    def _loop(
        self, streams: list[pipeline.TrainIterator], seeds: list[int], preemption: Preemption
    ) -> None:
        program, config = self.program, self.program.config
        # The program takes `width` units: copies of the last stand in where there are fewer.
        lanes = [*self.runs, *[self.runs[-1]] * (program.width - len(self.runs))]
        states = self._stack([run.state for run in lanes])
        for run in self.runs:
            del run.state
        hyper = self._stack([objective.hyper(run.unit.config) for run in lanes])
        number = self._stack([jnp.int32(run.unit.config.seed) for run in lanes])
        slot = self._stack([jnp.int32(seeds.index(run.unit.config.seed)) for run in lanes])
        now, pending = self.begun, deque()
        if self.runs[0].record.fresh:
            for lane, run in enumerate(self.runs):
                seed = run.unit.config.seed
                if seed not in program.untrained:
                    program.untrained[seed] = program.evaluators.run(self._slice(states, lane))
                run.write(0, program.untrained[seed])
        for run in self.runs:
            run.record.window.restart_clock()
        while now < program.total and any(run.alive for run in self.runs):
            images, labels, skipped = self._batches(streams)
            states, figures = program.step(states, images, labels, slot, hyper, number)
            now += 1
            pending.append((now, figures, skipped))
            self._settle(pending, seeds, keep=2)
            self.board.show()
            stop = preemption.requested(now)
            last = now == program.total
            due = program.evaluators.due(now)
            if stop or last or due or now % config.checkpoint_every == 0:
                self._settle(pending, seeds, keep=0)
                self._pause(states, now, stop=stop, last=last)
            if stop and not last:
                raise KeyboardInterrupt
        if self.begun == program.total:  # trained already, but not reported
            self._pause(states, now, stop=False, last=True)

    def _batches(self, streams: list[pipeline.TrainIterator]) -> tuple[Any, Any, list[Any]]:
        """The next batch of each seed, stacked, and the number of unreadable images in each."""
        program = self.program
        found = [program.prepare(sharding.put_batch(program.mesh, next(s))) for s in streams]
        filled = [*found, *[found[0]] * (program.seeds - len(found))]
        images, labels = (jnp.stack([batch[i] for batch in filled]) for i in (0, 1))
        images, labels = jax.device_put((images, labels), program.everywhere)
        return images, labels, [batch[2] for batch in found]

    def _settle(self, pending: deque, seeds: list[int], keep: int) -> None:
        """Logs the figures of all but the newest `keep` steps, and ends units that diverged."""
        while len(pending) > keep:
            at, arrays, skipped = pending.popleft()
            arrays = {k: np.asarray(v) for k, v in arrays.items()}
            for lane, run in enumerate(self.runs):
                if not run.alive:
                    continue
                values = {k: float(v[lane]) for k, v in arrays.items()}
                values["data/unreadable"] = float(skipped[seeds.index(run.unit.config.seed)])
                try:
                    with run.logging():
                        run.record.log(at, values)
                except DivergedError as error:
                    run.stop(DIVERGED, str(error))
                    self.board.ended(run.unit)

    def _pause(self, states: Any, now: int, *, stop: bool, last: bool) -> None:
        """Evaluates, saves and reports each unit, as the plain command would at this step."""
        evaluators = self.program.evaluators
        due = evaluators if last else evaluators.due(now)
        for lane, run in enumerate(self.runs):
            if not run.alive:
                continue
            try:
                self._save_one(run, self._slice(states, lane), now, due, last)
            except DivergedError as error:
                run.stop(DIVERGED, str(error))
            except (ValueError, OSError) as error:  # of this unit; the others go on
                run.stop(INPUT_ERROR, str(error))
            if stop and not last:
                run.stop(RUN_AGAIN, "stopped by SIGTERM after saving: the same command continues")
            if not run.alive:
                self.board.ended(run.unit)
            run.record.window.restart_clock()

    def _save_one(self, run: _Run, state: Any, now: int, due: Evaluators, last: bool) -> None:
        results = run.record.evaluate(now, due.run, state) if due or last else None
        if self.begun < now:
            if results is not None:
                run.write(now, results)
            run.save(now, state, results)
        if last and results is not None:
            self._report(run, results)

    def _report(self, run: _Run, results: dict[str, float]) -> None:
        with run.logging():
            page.report(
                run.unit.folder,
                results=results,
                evaluators=self.program.evaluators,
                mesh=self.program.mesh,
                seconds=run.record.seconds,
                command=run.unit.origin()["command"],
                walk=build.walk_of(run.unit.config, self.program.faces, self.program.mesh),
            )
        run.close()

    def _stack(self, trees: list[Any]) -> Any:
        stacked = jax.tree.map(lambda *leaves: np.stack(jax.device_get(leaves)), *trees)
        return jax.device_put(stacked, self.program.by_unit)

    def _slice(self, states: Any, lane: int) -> Any:
        """One unit's state, on the devices where it would be if it ran alone."""
        one = _take(states, jnp.int32(lane))
        where = jax.tree.map(lambda leaf: leaf.sharding, self.program.alone.like)
        return jax.device_put(one, where)


@jax.jit
def _take(states: Any, lane: Any) -> Any:
    return jax.tree.map(lambda x: x[lane], states)


def _refuse(units: Sequence[Unit], error: Exception, board: Board) -> None:
    """Ends units whose data, config or folder does not fit: the error is left in their folders."""
    for unit in units:
        unit.folder.mkdir(parents=True, exist_ok=True)
        with (unit.folder / run_folder.LOG).open("a", encoding="utf-8") as log:
            log.write(f"launch.sweep: {error}\n")
        text = configs.to_json(unit.config)
        run_folder.record_stop(unit.folder, text, INPUT_ERROR, str(error))
        board.ended(unit)
