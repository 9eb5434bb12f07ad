"""From a training set to endless batches, through Grain; the position is one number, the step."""

import dataclasses
import operator
import sys
from collections.abc import Iterator
from typing import Any, cast

import grain
import numpy as np
from absl import flags

from marginface.data import Faces, RandomAccess, Record
from marginface.typing import Int

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _LocalBatch:
    """Step k to this process's rows of the global batch k."""

    examples: RandomAccess
    batch_size: int
    first: int
    local_size: int

    def __call__(self, step: int) -> Batch:
        start = step * self.batch_size + self.first
        rows = [self.examples[i] for i in range(start, start + self.local_size)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@dataclasses.dataclass(frozen=True)
class _ByIdentity:
    """Example e to a record: image e mod K of turn e // K, K random images of one identity.

    The turns of a pass go to all identities once, in random order; those of a pass that do not
    fill a batch are left out, so that no batch holds an identity twice.
    """

    source: RandomAccess
    seed: int
    images: int  # K
    people: Any  # shuffled numbers of the identities, another order each pass
    turns: int  # of one pass, a multiple of a batch's
    order: Int[np.ndarray, " n"]  # all examples, sorted by label
    first: Int[np.ndarray, " p"]  # where an identity's examples start in that order
    count: Int[np.ndarray, " p"]  # its number of examples

    def __call__(self, example: int) -> Record:
        turn, image = divmod(example, self.images)
        person = self.people[turn // self.turns * len(self.first) + turn % self.turns]
        count = int(self.count[person])
        shuffled = np.random.default_rng([self.seed, turn]).permutation(count)
        return self.source[int(self.order[self.first[person] + shuffled[image % count]])]


def _by_identity(faces: Faces, seed: int, batch_size: int, images: int) -> _ByIdentity:
    labels = faces.labels()
    order = np.argsort(labels, kind="stable")
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    first, count = first[count > 1], count[count > 1]
    identities = batch_size // images
    if len(first) < identities:
        raise ValueError(
            f"a batch of {batch_size} = {identities} identities x {images} images needs "
            f"{identities} identities of 2 images or more; the training set has {len(first)}"
        )
    return _ByIdentity(
        source=faces.source,
        seed=seed,
        images=images,
        people=grain.MapDataset.range(len(first)).seed(seed).shuffle().repeat(),
        turns=len(first) // identities * identities,
        order=order,
        first=first,
        count=count,
    )


class TrainIterator(Iterator[Batch]):
    """Endless batches whose whole state is the number of the next step.

    The state holds neither workers nor processes, so a run may resume with other numbers of both.
    """

    def __init__(self, steps: grain.MapDataset, *, step: int, workers: int, threads: int):
        self._steps, self._workers, self._threads = steps, workers, threads
        self._batches: grain.DatasetIterator | None = None
        self._step = step

    def __next__(self) -> Batch:
        if self._batches is None:
            batches = self._steps[self._step :].to_iter_dataset(
                grain.ReadOptions(self._threads, 2 * self._threads)
            )
            if self._workers:
                if not flags.FLAGS.is_parsed():  # Grain's worker processes ask for it
                    flags.FLAGS.mark_as_parsed()
                batches = batches.mp_prefetch(grain.MultiprocessingOptions(self._workers, 2))
            self._batches = iter(batches)
        batch = next(self._batches)
        self._step += 1
        # Workers hand over views of shared memory, which must not outlive the interpreter's end.
        return {key: np.array(value) for key, value in batch.items()} if self._workers else batch

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at state["step"]; what was read ahead is dropped."""
        step = operator.index(state["step"])
        if step < 0:
            raise ValueError(f"step is {step}; use 0 or more")
        self.close()
        self._step = step

    def close(self) -> None:
        """Ends worker processes and threads; the next batch starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def train_iterator(
    faces: Faces,
    *,
    seed: int,
    batch_size: int,
    step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    images_per_identity: int = 0,
) -> TrainIterator:
    """Returns the endless training batches of one process, from global step `step` on.

    Example e = batch_size·k + r is row r of global step k. Epoch e // n is a permutation of all n
    examples, another one each epoch, and the random changes of an example depend on (seed, e)
    alone: so step k is the same whatever the numbers of processes, workers and threads. Process p
    of P gets the rows [p·b, (p + 1)·b), b = batch_size / P.

    With images_per_identity = K, a batch is batch_size / K identities after each other, K images
    of each, for losses over pairs. Every pass over the identities has another random order, and no
    identity stands twice in a batch; those with a single image have no pair and are left out. The
    K images are drawn at random, one of them twice only where the identity has fewer than K. All
    of this depends on (seed, e) alone, too.

    Args:
      faces: the training set; its source and augment must be picklable when workers > 0.
      seed: 0 to 2³² - 1; order and random changes follow from it.
      batch_size: rows of the global batch, a multiple of process_count.
      step: the first global step returned.
      process_index: this process, p.
      process_count: all processes, P.
      workers: worker processes that read and decode; 0 does it in threads of this one.
      threads: batches made at a time in each worker (or in this process).
      images_per_identity: K, 2 or more; 0 takes any images.

    Returns:
      An iterator of dicts of arrays [b, ...]; set_state moves it to another step.

    Raises:
      ValueError: batch size, counts or seed out of range, no examples, or too few identities.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in [0, {process_count})")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not a positive multiple of the {process_count} processes"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is not in [0, 2**32)")
    for name, value, least in (("step", step, 0), ("workers", workers, 0), ("threads", threads, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; use {least} or more")
    if images_per_identity < 0 or images_per_identity == 1:
        raise ValueError(f"images_per_identity is {images_per_identity}; use 0, or 2 or more")
    if images_per_identity and batch_size % images_per_identity:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of images_per_identity "
            f"{images_per_identity}"
        )
    if not len(faces.source):
        raise ValueError("the training set has no examples")
    if images_per_identity:
        chosen = _by_identity(faces, seed, batch_size, images_per_identity)
        order = grain.MapDataset.range(sys.maxsize).seed(seed).map(chosen)
    else:
        order = grain.MapDataset.source(cast(Any, faces.source)).seed(seed).shuffle().repeat()
    examples = order.random_map(faces.augment)
    local_size = batch_size // process_count
    local = _LocalBatch(cast(Any, examples), batch_size, process_index * local_size, local_size)
    steps = grain.MapDataset.range(sys.maxsize // batch_size).map(local)
    return TrainIterator(steps, step=step, workers=workers, threads=threads)
