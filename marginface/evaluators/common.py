"""From a set of images to their embeddings."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from marginface.typing import Float

Batch = dict[str, np.ndarray]


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
) -> Float[np.ndarray, "n d"]:
    """Embeds every record of `source` once.

    Args:
        embed_fn: (state, batch of batch_size rows) -> embeddings [batch_size, d], which may still
            be under way: the next batch is handed over before they are read.
        state: handed to embed_fn.
        source: n records.
        decode: from a record to a dict of arrays.
        batch_size: rows of each batch, the last one filled up.

    Returns:
        Embeddings [n, d] in the order of `source`.

    Raises:
        NotFiniteError: an embedding is not finite; names the image's index.
        ValueError: on an empty source.
    """
    found: list[np.ndarray] = []

    def read(embeddings: Any, real: int) -> None:
        here = np.asarray(embeddings)[:real]
        broken = ~np.isfinite(here).all(axis=1)
        if broken.any():
            index = sum(map(len, found)) + int(broken.argmax())
            raise NotFiniteError(
                f"the embedding of image {index} of {len(source)} is not finite: the network has "
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
    return np.concatenate(found)
