"""Softmax over classes with a margin on the true one: the only code that walks over all classes.

    loss_i = softplus(LSE_i − s·ψ(c_i)),  c_i = sim(x_i, W_{y_i}),
    LSE_i = log Σ_{j≠y_i} exp(s·sim(x_i, W_j))

Leaving the target out of the sum keeps a small loss exact. Which classes are held is data, not
code: `Classes`. All of them, a padded matrix, or one device's shard go through the same functions.
With `axis_name`, call them inside jax.shard_map with embeddings and labels replicated and the
classes sharded; take gradients outside of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from marginface.margins import Margin, identity
from marginface.similarity import Rows, Similarity, cosine
from marginface.typing import Array, Bool, Float, Int

PAD = np.int32(np.iinfo(np.int32).max)  # the id of a row that stands for no class

Reweight = Callable[[Float[Array, "b c"], Float[Array, "b"]], Float[Array, "b c"]]


class Classes(NamedTuple):
    """The classes held here: rows (leading axis c) and ids [c], sorted class numbers, PAD last."""

    rows: Rows
    ids: Array


class Negatives(NamedTuple):
    """What the other classes amount to: log Σ exp(s·sim) and the largest sim, both [b].

    Both are −inf where there is no other class.
    """

    logsumexp: Array
    max: Array


def all_classes(rows: Rows, num_classes: int, *, axis_name: str | None = None) -> Classes:
    """Numbers the rows 0, 1, ... and marks those from num_classes on as padding.

    Args:
        rows: all rows, or inside jax.shard_map this device's block of them.
        num_classes: how many classes there really are.
        axis_name: the mesh axis over which the rows are sharded, if any.

    Returns:
        The classes, with ids [c].
    """
    c = jax.tree.leaves(rows)[0].shape[0]
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * c
    ids = offset + jnp.arange(c, dtype=jnp.int32)
    return Classes(rows, jnp.where(ids < num_classes, ids, PAD))


def find(ids: Int[Array, "c"], wanted: Int[Array, "n"]) -> tuple[Int[Array, "n"], Bool[Array, "n"]]:
    """Where the wanted classes are held.

    Args:
        ids: sorted class numbers, PAD last.
        wanted: class numbers.

    Returns:
        A position in ids for each, and whether the class is really there.
    """
    at = jnp.minimum(jnp.searchsorted(ids, wanted), ids.shape[0] - 1)
    return at, (ids[at] == wanted) & (wanted != PAD)


def target_similarity(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    similarity: Similarity = cosine,
    axis_name: str | None = None,
) -> Float[Array, "b"]:
    """c_i = sim(x_i, W_{y_i}), the similarity to the true class, without a margin.

    Args:
        embeddings: x.
        labels: y, class numbers.
        classes: the classes held here.
        similarity: of embeddings and rows.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        One similarity per example; NaN where nobody holds the label, so that training stops.
    """
    embeddings, labels = vary((embeddings, labels), axis_name)
    at, held = find(classes.ids, labels)
    rows = jax.tree.map(lambda leaf: leaf[at][:, None], classes.rows)
    values = jax.vmap(similarity)(embeddings[:, None], rows)[:, 0, 0]
    values, holders = jnp.where(held, values, 0.0), held.astype(jnp.int32)
    if axis_name is not None:
        values, holders = lax.psum((values, holders), axis_name)
    return jnp.where(holders > 0, values, jnp.nan)


def negatives(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    scale: ArrayLike = 64.0,
    similarity: Similarity = cosine,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    reweight: Reweight | None = None,
) -> Negatives:
    """LSE_i = log Σ_{j≠y_i} exp(s·sim(x_i, W_j)) and max_{j≠y_i} sim(x_i, W_j).

    With chunk_size, memory beyond the gradient of the rows is O(b·chunk_size), in both directions.

    Args:
        embeddings: x.
        labels: y, class numbers.
        classes: the classes held here; their number need not be a multiple of chunk_size.
        scale: s, a scalar or one per example, [b].
        similarity: of embeddings and rows.
        chunk_size: classes visited at a time; None for all at once.
        axis_name: the mesh axis over which the classes are sharded, if any.
        reweight: changes the similarities of the negatives, elementwise, given those [b, c] and the
            targets' [b], before they are scaled and summed.

    Returns:
        Both per example. The maximum is not reweighted and carries no gradient.

    Raises:
        ValueError: chunk_size is not positive.
    """
    target = (
        target_similarity(embeddings, labels, classes, similarity=similarity, axis_name=axis_name)
        if reweight is not None
        else None
    )
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), labels.shape)[:, None]
    # Once here and not in every step, so that the gradient of x is summed over devices once.
    embeddings, labels, scale, target = vary((embeddings, labels, scale, target), axis_name)

    def visit(chunk: Classes) -> Negatives:
        similarities = similarity(embeddings, chunk.rows)
        keep = (chunk.ids != labels[:, None]) & (chunk.ids != PAD)
        hardest = jnp.max(jnp.where(keep, lax.stop_gradient(similarities), -jnp.inf), axis=1)
        if reweight is not None:
            similarities = reweight(similarities, target)
        logits = jnp.where(keep, scale * similarities, -jnp.inf)
        return Negatives(_logsumexp(logits, axis=1), hardest)

    parts = _walk(visit, classes, chunk_size, axis_name)
    hardest = jnp.max(parts.max, axis=0)
    if axis_name is not None:
        hardest = lax.pmax(hardest, axis_name)
    return Negatives(_logsumexp(parts.logsumexp, axis=0, axis_name=axis_name), hardest)


def softmax_loss(
    target: Float[Array, "b"],
    others: Negatives,
    *,
    margin: Margin = identity,
    scale: ArrayLike = 64.0,
) -> Float[Array, "b"]:
    """softplus(LSE_i − s·ψ(c_i)) = −log( exp(s·ψ) / (exp(s·ψ) + Σ_{j≠y_i} exp(s·sim_j)) ).

    Args:
        target: c, from target_similarity.
        others: from negatives, with the same scale.
        margin: ψ.
        scale: s, a scalar or one per example, [b].

    Returns:
        One loss per example.
    """
    return jax.nn.softplus(others.logsumexp - scale * margin(target))


def margin_softmax(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    margin: Margin = identity,
    scale: ArrayLike = 64.0,
    similarity: Similarity = cosine,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    reweight: Reweight | None = None,
) -> Float[Array, "b"]:
    """Softmax cross-entropy with a margin on the true class.

    softmax: linear similarity, scale 1. NormFace: cosine. A-Softmax: multiplicative_angular,
    annealed, scale similarity.norm(x). CosFace, ArcFace, combined: cosine and their margin.

    Args:
        embeddings: x.
        labels: y, class numbers.
        classes: the classes held here.
        margin: ψ, see margins.
        scale: s, a scalar or one per example, [b].
        similarity: of embeddings and rows.
        chunk_size: classes visited at a time; None for all at once.
        axis_name: the mesh axis over which the classes are sharded, if any.
        reweight: see negatives.

    Returns:
        One loss per example, never a mean; NaN where nobody holds the label.

    Raises:
        ValueError: chunk_size is not positive.
    """
    target = target_similarity(
        embeddings, labels, classes, similarity=similarity, axis_name=axis_name
    )
    others = negatives(
        embeddings,
        labels,
        classes,
        scale=scale,
        similarity=similarity,
        chunk_size=chunk_size,
        axis_name=axis_name,
        reweight=reweight,
    )
    return softmax_loss(target, others, margin=margin, scale=scale)


def vary(tree: Any, axis_name: str | None) -> Any:
    """Marks replicated arrays as one copy per device of the axis, as shard_map's checks demand."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: lax.pcast(leaf, axis_name, to="varying"), tree)


def _logsumexp(
    logits: Float[Array, "..."], *, axis: int, axis_name: str | None = None
) -> Float[Array, "..."]:
    """log Σ exp along an axis and over devices; −inf with gradient 0 where nothing is summed."""
    top = lax.stop_gradient(jnp.max(logits, axis=axis))
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
    base = jnp.where(jnp.isneginf(top), 0.0, top)
    total = jnp.sum(jnp.exp(logits - jnp.expand_dims(base, axis)), axis=axis)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)) + base)


def _walk(
    visit: Callable[[Classes], Any],
    classes: Classes,
    chunk_size: int | None,
    axis_name: str | None,
) -> Any:
    """visit(chunk) for each chunk of classes, results stacked; recomputed in the backward pass.

    The last chunk overlaps the one before if need be, with the repeated classes marked as padding,
    so the rows are never copied or padded.
    """
    c = classes.ids.shape[0]
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give a positive number or None")
    if chunk_size is None or chunk_size >= c:
        return jax.tree.map(lambda part: part[None], visit(classes))

    @jax.checkpoint
    def visit_chunk(shadow: Rows, first: Array) -> Any:
        start = jnp.minimum(first, c - chunk_size)
        rows, ids = jax.tree.map(
            lambda leaf: lax.dynamic_slice_in_dim(lax.stop_gradient(leaf), start, chunk_size),
            classes,
        )
        new = start + jnp.arange(chunk_size) >= first
        rows = jax.tree.map(jnp.add, rows, shadow)
        return visit(Classes(rows, jnp.where(new, ids, PAD)))

    def step(_: None, first: Array) -> tuple[None, Any]:
        start = jnp.minimum(first, c - chunk_size)
        shadow = jax.tree.map(
            lambda leaf: _shadow(leaf, start, chunk_size, axis_name), classes.rows
        )
        return None, visit_chunk(shadow, first)

    return lax.scan(step, None, jnp.arange(0, c, chunk_size))[1]


def _shadow(array: Array, start: Array, size: int, axis_name: str | None) -> Array:
    """Zeros with the derivative of array[start : start + size].

    The value enters the checkpointed step by a slice without derivative, the derivative by this.
    A slice with both would be saved for every step (a copy of all rows), or, if taken inside of the
    checkpoint, would add a full-sized gradient in every step instead of a chunk in place.
    """

    @jax.custom_jvp
    def zeros(array: Array, start: Array) -> Array:
        blank = jnp.zeros((size, *array.shape[1:]), array.dtype)
        return vary(blank, axis_name)

    @zeros.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        array, start = primals
        return zeros(array, start), lax.dynamic_slice_in_dim(tangents[0], start, size)

    return zeros(array, start)
