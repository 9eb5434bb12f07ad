"""Regularisers: functions of the prototypes alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from marginface.class_softmax import PAD, Classes, find, vary
from marginface.similarity import cosine, normalize
from marginface.typing import Array, Float


def exclusive(
    classes: Classes, *, chunk_size: int | None = None, axis_name: str | None = None
) -> Float[Array, "c"]:
    """Sep_i = max_{j≠i} cos(W_i, W_j), the cosine to the nearest other class.

    Lr(W) = (1/C) Σ_i Sep_i is the mean over the real classes. The nearest class is searched without
    derivative, chunk by chunk; only the C found pairs are differentiated, at both ends.

    Args:
        classes: the prototypes held here, rows [c, d].
        chunk_size: classes compared at a time, on either side; None for all at once.
        axis_name: the mesh axis over which the classes are sharded, if any: every block of
            prototypes then travels twice around the ring of devices, to search and to gather.

    Returns:
        Sep per held row; 0, without gradient, for padding and where there is no other class.

    Raises:
        ValueError: chunk_size is not positive.

    References:
        Zhao et al., RegularFace: Deep Face Recognition via Exclusive Regularization, 2019, eq. 6.
    """
    rows, ids = classes
    c = ids.shape[0]
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give a positive number or None")
    size = min(chunk_size or c, c)

    def search(best: Any, block: Classes) -> Any:
        def one(args: Any) -> Any:
            return _nearest(*args, block, size)

        return lax.map(one, (lax.stop_gradient(rows), ids, *best), batch_size=size)

    nothing = jnp.full(c, -jnp.inf), jnp.full(c, PAD)
    _, partner_ids = _around(
        search, vary(nothing, axis_name), lax.stop_gradient(classes), axis_name
    )

    def gather(partners: Array, block: Classes) -> Array:
        at, held = find(block.ids, partner_ids)
        # Out of range reads 0: unlike a mask, nothing of the rows' size is kept for each turn.
        at = jnp.where(held, at, c)
        return partners + block.rows.at[at].get(mode="fill", fill_value=0)

    partners = _around(
        gather, vary(jnp.zeros(rows.shape, rows.dtype), axis_name), classes, axis_name
    )
    cosines = jnp.sum(normalize(rows) * normalize(partners), axis=-1)
    return jnp.where((ids != PAD) & (partner_ids != PAD), cosines, 0.0)


def _nearest(
    row: Array, row_id: Array, best: Array, best_id: Array, block: Classes, size: int
) -> tuple[Array, Array]:
    """The best of what is known and of a block, for one row: (cosine, class id)."""
    c = block.ids.shape[0]

    def step(carry: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], None]:
        # The last chunk overlaps the one before if need be; a maximum may see a class twice.
        start = jnp.minimum(first, c - size)
        keys, ids = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), block)
        others = (ids != row_id) & (ids != PAD)
        cosines = jnp.where(others, cosine(row[None], keys)[0], -jnp.inf)
        at = jnp.argmax(cosines)
        better = cosines[at] > carry[0]
        return (
            jnp.where(better, cosines[at], carry[0]),
            jnp.where(better, ids[at], carry[1]),
        ), None

    return lax.scan(step, (best, best_id), jnp.arange(0, c, size))[0]


def _around(
    visit: Callable[[Any, Classes], Any], carry: Any, block: Classes, axis_name: str | None
) -> Any:
    """visit(carry, block) for every device's block in turn, each passed on to the next device."""
    if axis_name is None:
        return visit(carry, block)
    devices = lax.axis_size(axis_name)
    ring = [(device, (device + 1) % devices) for device in range(devices)]

    def step(state: Any, _: None) -> tuple[Any, None]:
        carry, block = state
        return (visit(carry, block), lax.ppermute(block, axis_name, ring)), None

    return lax.scan(step, (carry, block), length=devices)[0][0]
