"""What the losses over classes are made of: the only code that walks over all classes.

    loss_i = softplus(LSE_i − s·ψ(c_i)),  c_i = sim(x_i, W_{y_i}),
    LSE_i = log Σ_{j≠y_i} exp(s·sim(x_i, W_j))

Leaving the target out of the sum keeps a small loss exact. Which classes are held is data, not
code: `Classes`. All of them, a padded matrix, one device's shard or a sample of it go through the
same functions.
With `axis_name`, call them inside jax.shard_map with embeddings and labels replicated and the
classes sharded; take gradients outside of it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from marginface.losses.similarity import Precision, Rows, Similarity, cosine
from marginface.typing import Array, Bool, Float, Int

PAD = np.int32(np.iinfo(np.int32).max)  # the id of a row that stands for no class

Reweight = Callable[[Float[Array, "b c"], Float[Array, "b"]], Float[Array, "b c"]]


class Classes(NamedTuple):
    """The classes held here: rows (leading axis c) and ids [c], sorted class numbers, PAD last."""

    rows: Rows
    ids: Array


class Negatives(NamedTuple):
    """Over the classes other than the true one, all [b].

    logsumexp: log Σ exp(s·sim); −inf where there is no other class.
    hardest: the largest sim, −inf likewise.
    sum: Σ s·sim, where it was asked for.
    """

    logsumexp: Array
    hardest: Array
    sum: Array | None = None


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


def sample_classes(
    key: Array, labels: Int[Array, "b"], classes: Classes, num: int, *, axis_name: str | None = None
) -> Classes:
    """Partial FC: the classes of the batch and others at random, `num` of those held here.

    Every label that is held here stays, so that no target is missing: if num is smaller than the
    batch, as many as the batch has examples are taken. Which of the others stay is uniform, without
    replacement, and drawn anew on each device. The softmax over a sample is not corrected for what
    was left out (the paper's choice).

    Args:
        key: for the draw.
        labels: y, class numbers.
        classes: the classes held here.
        num: how many to keep of those held here.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        The classes kept, max(num, b) of them or all.

    Raises:
        ValueError: num is not positive.

    References:
        An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face
        Recognition CNNs by Partial FC, 2022, section 3.2.
    """
    if num < 1:
        raise ValueError(f"a sample of {num} classes; give a positive number")
    c = classes.ids.shape[0]
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    at, held = find(classes.ids, labels)
    chance = jnp.where(classes.ids == PAD, -1.0, jax.random.uniform(key, (c,)))
    chance = chance.at[jnp.where(held, at, c)].set(2.0, mode="drop")
    kept = jnp.sort(lax.top_k(chance, min(c, max(num, labels.shape[0])))[1])
    return jax.tree.map(lambda leaf: leaf[kept], classes)


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
    precision: Precision = "highest",
    axis_name: str | None = None,
    reweight: Reweight | None = None,
    target: Float[Array, "b"] | None = None,
    with_sum: bool = False,
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
        precision: of the products with the classes, see similarity.product.
        axis_name: the mesh axis over which the classes are sharded, if any.
        reweight: changes the similarities of the negatives, elementwise, given those [b, c] and
            `target` [b], before they are scaled and summed.
        target: what reweight compares with; None gives it zeros.
        with_sum: also return Σ_{j≠y_i} s·sim(x_i, W_j), as label smoothing needs it.

    Returns:
        All per example. The maximum is not reweighted and carries no gradient.

    Raises:
        ValueError: chunk_size is not positive.
    """
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), labels.shape)
    target = jnp.zeros(labels.shape) if target is None else target

    def reduce(similarities: Array, keep: Array, scale: Array, target: Array) -> tuple:
        if reweight is not None:
            similarities = reweight(similarities, target)
        logits = scale[:, None] * similarities
        logsumexp = _logsumexp(_where(keep, logits, -jnp.inf), axis=1)
        return logsumexp, jnp.sum(_where(keep, logits, 0.0), axis=1) if with_sum else None

    if precision != "highest":
        similarity = functools.partial(cast(Any, similarity), precision=precision)
    hardest, (logsumexps, sums) = _visit_negatives(
        reduce, embeddings, labels, classes, similarity, chunk_size, axis_name, (scale, target)
    )
    logsumexp = _logsumexp(logsumexps, axis=0, axis_name=axis_name)
    return Negatives(logsumexp, hardest, _sum(sums, axis_name) if with_sum else None)


def sum_negatives(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    term: Callable[[Float[Array, "b c"]], Float[Array, "b c"]],
    *,
    similarity: Similarity = cosine,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Σ_{j≠y_i} term(sim(x_i, W_j)) and max_{j≠y_i} sim(x_i, W_j): losses of one-class decisions.

    Args:
        embeddings: x.
        labels: y, class numbers.
        classes: the classes held here; their number need not be a multiple of chunk_size.
        term: elementwise.
        similarity: of embeddings and rows.
        chunk_size: classes visited at a time; None for all at once.
        precision: of the products with the classes, see similarity.product.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        Both per example. The maximum carries no gradient.

    Raises:
        ValueError: chunk_size is not positive.
    """

    def reduce(similarities: Array, keep: Array) -> Array:
        # Left out before the term: what it gives there must be finite for the gradient's sake.
        values = term(_where(keep, similarities, 0.0))
        return jnp.sum(_where(keep, values, 0.0), axis=1)

    if precision != "highest":
        similarity = functools.partial(cast(Any, similarity), precision=precision)
    hardest, sums = _visit_negatives(
        reduce, embeddings, labels, classes, similarity, chunk_size, axis_name, ()
    )
    return _sum(sums, axis_name), hardest


def vary(tree: Any, axis_name: str | None) -> Any:
    """Marks replicated arrays as one copy per device of the axis, as shard_map's checks demand."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: lax.pcast(leaf, axis_name, to="varying"), tree)


def _visit_negatives(
    reduce: Callable[..., Any],
    embeddings: Array,
    labels: Array,
    classes: Classes,
    similarity: Similarity,
    chunk_size: int | None,
    axis_name: str | None,
    per_example: tuple[Array, ...],
) -> tuple[Array, Any]:
    """The largest similarity of the negatives [b], and reduce(...) of every chunk, stacked."""
    # Once here and not in every step, so that the gradient of x is summed over devices once, and in
    # float32 over the chunks.
    embeddings = embeddings.astype(jnp.promote_types(embeddings.dtype, jnp.float32))
    embeddings, labels, per_example = vary((embeddings, labels, per_example), axis_name)

    def visit(chunk: Classes) -> tuple[Array, Any]:
        similarities = similarity(embeddings, chunk.rows)
        keep = (chunk.ids != labels[:, None]) & (chunk.ids != PAD)
        hardest = jnp.max(_where(keep, lax.stop_gradient(similarities), -jnp.inf), axis=1)
        return hardest, reduce(similarities, keep, *per_example)

    hardest, parts = _walk(visit, classes, chunk_size, axis_name)
    hardest = jnp.max(hardest, axis=0)
    return hardest if axis_name is None else lax.pmax(hardest, axis_name), parts


def _where(keep: Bool[Array, "b c"], values: Float[Array, "b c"], other: float) -> Array:
    """jnp.where with an `other` that depends on the chunk, though in form alone.

    lax.scan moves what does not out of its loop, and so would keep a whole tile of it.
    """
    return jnp.where(keep, values, jnp.where(keep[0, 0], other, other))


def _sum(parts: Float[Array, "n b"], axis_name: str | None) -> Float[Array, "b"]:
    total = jnp.sum(parts, axis=0)
    return total if axis_name is None else lax.psum(total, axis_name)


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
