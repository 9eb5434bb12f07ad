"""What an evaluator measures and when; from a set of images to what the network gives for them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from marginface.data import Pairs
from marginface.typing import Array, Float, Int

Batch = dict[str, np.ndarray]
Outputs = dict[str, Float[np.ndarray, "m _"]]  # of m images: {"embedding": [m, d], ...}
# (state, outputs of m images, first [n], second [n]) → scores [n], larger = more alike
Score = Callable[[Any, Outputs, Int[np.ndarray, "n"], Int[np.ndarray, "n"]], Float[np.ndarray, "n"]]


class Picture(NamedTuple):
    """A drawn file and one line that says how to read it."""

    path: pathlib.Path
    caption: str


class NotFiniteError(ValueError):
    """An embedding or score is infinite or not a number."""


def batches(
    source: Any, decode: Callable[[dict], dict], batch_size: int
) -> Iterator[tuple[Batch, int]]:
    """Yields all records of `source` in order, stacked, with the number of real rows in each batch.

    The last batch is filled up by repeating its last record, so every batch has one shape. The next
    batch is decoded by threads while the caller works on this one.

    Args:
        source: has a length and gives a record for each index; read from several threads.
        decode: from a record to a dict of arrays, the same shapes for every record.
        batch_size: rows of each batch.

    Raises:
        ValueError: if there is nothing to read.
    """
    count = len(source)
    if count == 0:
        raise ValueError("there are no images to embed: the source is empty")
    chunks = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    with ThreadPoolExecutor() as pool:
        # map submits at once, so at most two batches of decoded images are held.
        ahead = pool.map(lambda i: decode(source[i]), chunks[0])
        for here, following in zip(chunks, [*chunks[1:], range(0)], strict=True):
            records = list(ahead)
            ahead = pool.map(lambda i: decode(source[i]), following)
            records += records[-1:] * (batch_size - len(records))
            yield {k: np.stack([r[k] for r in records]) for k in records[0]}, len(here)


def embed_all(
    embed_fn: Callable[[Any, Batch], Any],
    state: Any,
    source: Any,
    decode: Callable[[dict], dict],
    batch_size: int,
) -> Outputs:
    """Embeds every record of `source` once.

    Args:
        embed_fn: (state, batch of batch_size rows) -> {"embedding": [batch_size, d], ...}, which
            may still be under way: the next batch is handed over before they are read.
        state: handed to embed_fn.
        source: n records.
        decode: from a record to a dict of arrays.
        batch_size: rows of each batch, the last one filled up.

    Returns:
        The same names, {"embedding": [n, d], ...}, in the order of `source`.

    Raises:
        NotFiniteError: an output is not finite; names it and the image's index.
        ValueError: on an empty source.
    """
    found: list[Outputs] = []

    def read(outputs: Any, real: int) -> None:
        here = {name: np.asarray(output)[:real] for name, output in outputs.items()}
        for name, output in here.items():
            broken = ~np.isfinite(output).all(axis=1)
            if broken.any():
                index = sum(len(part[name]) for part in found) + int(broken.argmax())
                raise NotFiniteError(
                    f"the {name} of image {index} of {len(source)} is not finite: the network has "
                    "diverged or the image holds NaN"
                )
        found.append(here)

    ahead: tuple[Any, int] | None = None  # what the device works on while the last is read
    for batch, real in batches(source, decode, batch_size):
        started = embed_fn(state, batch), real
        if ahead is not None:
            read(*ahead)
        ahead = started
    if ahead is not None:
        read(*ahead)
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


class Embedded:
    """What the network gives for the images of a test set, once for a state however many ask."""

    def __init__(self, embed_fn: Callable[[Any, Batch], Any], pairs: Pairs, batch_size: int):
        """Args: as embed_all; pairs: the test set."""
        self._embed_fn, self._pairs, self._batch_size = embed_fn, pairs, batch_size
        self._state: Any = None
        self._outputs: Outputs = {}

    def __call__(self, state: Any) -> Outputs:
        """{"embedding": [m, d], ...} of the m images of pairs.source; errors as embed_all."""
        if self._state is not state or not self._outputs:
            source, decode = self._pairs.source, self._pairs.decode
            self._outputs = embed_all(self._embed_fn, state, source, decode, self._batch_size)
            self._state = state
        return self._outputs

    def forget(self) -> None:
        """Keeps neither the state nor its outputs."""
        self._state, self._outputs = None, {}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What an evaluator is given: a network, and where config.evals names data, a test set.

    Attributes:
        name: what the evaluator's figures begin with.
        pairs: the test set.
        outputs: state → {"embedding": [m, d], ...}, all that the network gives for the m images of
            pairs.source; see Embedded.
        score: how two of these images are compared.
        prototypes: state → W [c, d], rows from num_classes on are padding; None where classes have
            none, or several each.
        num_classes: that the network is trained on.
        chunk_size: classes compared with each other at once; None for all.
        mesh: over whose axis the prototypes are sharded, or None.
    """

    name: str
    pairs: Pairs | None = None
    outputs: Callable[[Any], Outputs] | None = None
    score: Score | None = None
    prototypes: Callable[[Any], Float[Array, "c d"]] | None = None
    num_classes: int = 0
    chunk_size: int | None = None
    mesh: Mesh | None = None

    def images(self) -> tuple[Pairs, Callable[[Any], Outputs]]:
        """The test set and what the network gives for it, for an evaluator that needs one.

        Raises:
            ValueError: there is none.
        """
        if self.pairs is None or self.outputs is None:
            raise ValueError(
                f"evals.{self.name}.data is missing: give 'tests' for every test set of the "
                "training reader, or the name of one, or a reader's {name, kw}"
            )
        return self.pairs, self.outputs


class Entry(NamedTuple):
    """An evaluator, and the updates from one evaluation to the next; 0: only before and after all.

    embedded is what of its images is kept while a state is measured.
    """

    evaluator: Any
    every: int
    embedded: Embedded | None = None


@dataclasses.dataclass(frozen=True)
class Evaluators:
    """All that is measured of a state, each at its own interval."""

    entries: Sequence[Entry]

    def __iter__(self) -> Iterator[Any]:
        return (entry.evaluator for entry in self.entries)

    @property
    def ranking(self) -> str | None:
        """The figure by which checkpoints are compared: the first that an evaluator names."""
        return next((e.ranking for e in self if hasattr(e, "ranking")), None)

    def __len__(self) -> int:
        return len(self.entries)

    def due(self, step: int) -> "Evaluators":
        """Those whose interval ends at this step."""
        return Evaluators([e for e in self.entries if e.every and step % e.every == 0])

    def run(self, state: Any) -> dict[str, float]:
        """{"lfw/accuracy": 0.97, ...} of a state.

        Raises:
            NotFiniteError: an output of the network or a score is not finite.
            ValueError: two evaluators have one name for a figure.
        """
        found: dict[str, float] = {}
        try:
            for entry in self.entries:
                for name, value in entry.evaluator.run(state):
                    if name in found:
                        raise ValueError(
                            f"config.evals: two evaluators yield {name}; give one of them another "
                            "name, or data of its own"
                        )
                    found[name] = value
        finally:
            for entry in self.entries:
                if entry.embedded is not None:
                    entry.embedded.forget()
        return found
