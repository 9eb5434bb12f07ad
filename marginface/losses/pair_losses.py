"""Losses over pairs and triplets of a batch: no prototypes, only embeddings and their labels.

Each returns one loss per anchor, weighted so that the mean over the whole batch is the paper's
loss. Anchors are visited one after the other, in the backward pass too, so that memory is O(b²)
at most, although a batch holds O(b³) triplets. With `axis_name`, call them inside jax.shard_map
with embeddings and labels replicated: each device visits its share of the anchors, b / devices of
them, and finds their partners in the whole batch; the results are sharded along the axis. Take
gradients outside of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from marginface.losses.class_softmax import vary
from marginface.losses.similarity import norm, normalize
from marginface.losses.table import Loss
from marginface.typing import Array, Float, Int

# The bounds of gap = d_an − d_ap: low < gap ≤ high.
CATEGORIES = {
    "all": lambda margin: (-jnp.inf, jnp.inf),
    "easy": lambda margin: (margin, jnp.inf),
    "semi_hard": lambda margin: (0.0, margin),
    "hard": lambda margin: (-jnp.inf, 0.0),
}

_AT_ONCE = 2**20  # elements of the matrices [anchors, b, b] made at a time, where b² is less
_SMALLEST_SUM = 1e-12  # keeps χ² of two zeros finite; far below the rounding of any other feature


def contrastive(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    margin: ArrayLike,
    normalized: bool = False,
    axis_name: str | None = None,
) -> Float[Array, "anchors"]:
    """Same person ½d², different people ½[m − d]₊², d = ‖x_i − x_j‖; the mean over all pairs.

    Args:
        embeddings: x.
        labels: y.
        margin: m, a distance.
        normalized: compare x/‖x‖ instead of x.
        axis_name: the mesh axis over which the anchors are spread, if any.

    Returns:
        One loss per anchor, the mean over its pairs. Their mean is that over the pairs i < j.

    Raises:
        ValueError: the batch does not divide over the devices.

    References:
        Hadsell, Chopra, LeCun, Dimensionality Reduction by Learning an Invariant Mapping, 2006,
        eq. 4.
    """

    def visit(anchor: Array, points: Array, same: Array, different: Array) -> tuple[Array, Array]:
        distance = norm(points - anchor)
        attract, repel = 0.5 * distance**2, 0.5 * jax.nn.relu(margin - distance) ** 2
        losses = jnp.where(same, attract, 0.0) + jnp.where(different, repel, 0.0)
        return jnp.sum(losses), jnp.sum(same | different)

    sums, counts = _over_anchors(visit, _points(embeddings, normalized), labels, axis_name)
    return _shares(sums, counts, axis_name)


def triplet(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    margin: ArrayLike,
    triplets: str = "semi_hard",
    positives: str = "all",
    negatives: str = "all",
    active: bool = False,
    normalized: bool = True,
    axis_name: str | None = None,
) -> Float[Array, "anchors"]:
    """[d_ap − d_an + α]₊ with d = ‖·‖² of unit embeddings; the mean over the chosen triplets.

    Everything, the choice too, uses squared distances. Each triplet is in one category: easy if
    d_ap + α < d_an, semi-hard if d_ap < d_an ≤ d_ap + α, hard if d_an ≤ d_ap.

    FaceNet, online: semi_hard, all, hardest; a pair without a semi-hard negative is left out.
    Batch-hard: all, hardest, hardest. Batch-all: all, all, all. Hermans et al. measure both by
    distances that are not squared, of embeddings that are not normalized.

    Args:
        embeddings: x.
        labels: y.
        margin: α, a squared distance.
        triplets: the category to choose from: "semi_hard", "hard", "easy" (whose loss is 0) or
            "all".
        positives: "all" of an anchor, or "hardest": the farthest one alone. Earlier versions' word
            for it, "hard", is understood.
        negatives: "all" in the category, or "hardest": for each pair the nearest of them alone.
        active: the mean over the chosen triplets of positive loss alone.
        normalized: compare x/‖x‖; if not, x.
        axis_name: the mesh axis over which the anchors are spread, if any.

    Returns:
        One loss per anchor: b times the sum over its triplets, divided by the number of triplets
        of the whole batch. Their mean is that over all chosen triplets, 0 if there is none.

    Raises:
        ValueError: an unknown choice, or the batch does not divide over the devices.

    References:
        Schroff, Kalenichenko, Philbin, FaceNet, 2015, eq. 3 and 4, section 3.2.
        Hermans, Beyer, Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017,
        eq. 5 (batch-hard) and 6 (batch-all).
    """
    _check("triplets", triplets, CATEGORIES)
    positives = "hardest" if positives == "hard" else positives
    _check("positives", positives, ("all", "hardest"))
    _check("negatives", negatives, ("all", "hardest"))
    bounds = CATEGORIES[triplets](margin)

    def visit(anchor: Array, points: Array, same: Array, different: Array) -> tuple[Array, Array]:
        distances = jnp.sum(jnp.square(points - anchor), axis=-1)
        positive, negative = distances, jnp.where(different, distances, jnp.inf)
        if positives == "hardest":
            positive = jnp.max(jnp.where(same, distances, -jnp.inf), keepdims=True)
            same = jnp.any(same, keepdims=True)
        if negatives == "hardest":  # the first beyond the lower bound
            negative = jnp.sort(negative)
            at = jnp.searchsorted(negative, positive + bounds[0], side="right")
            gap = negative.at[at].get(mode="fill", fill_value=jnp.inf) - positive
        else:
            gap = negative[:, None] - positive
        chosen = same & _between(gap, *bounds)
        losses = jnp.where(chosen, jax.nn.relu(margin - gap), 0.0)
        return jnp.sum(losses), jnp.sum(losses > 0 if active else chosen)

    sums, counts = _over_anchors(visit, _points(embeddings, normalized), labels, axis_name)
    return _shares(sums, counts, axis_name)


def collapse(
    embeddings: Float[Array, "b d"], value: Float[Array, ""], margin: ArrayLike
) -> dict[str, Array]:
    """Whether a triplet loss has collapsed: it equals α, as all embeddings are the same point.

    The spread is mean ‖f − mean f‖² of the unit embeddings f: half their mean squared distance, 1
    if they point everywhere. Collapsed: spread < α/100, and |loss − α| < α/100 or loss = 0, which
    is what semi-hard mining is left with when embeddings coincide to the last bit.

    Args:
        embeddings: x, of the whole batch.
        value: the mean triplet loss of that batch.
        margin: α.

    Returns:
        {"collapsed": whether it has, "spread": the spread}.
    """
    points = normalize(lax.stop_gradient(embeddings))
    spread = jnp.mean(jnp.sum(jnp.square(points - jnp.mean(points, axis=0)), axis=-1))
    idle = (jnp.abs(value - margin) < 0.01 * margin) | (value == 0)
    return {"collapsed": idle & (spread < 0.01 * margin), "spread": spread}


def pair_features(
    a: Float[Array, "n d"], b: Float[Array, "n d"], kind: str = "difference"
) -> Float[Array, "n d"]:
    """What a logistic regression sees of two embeddings, made of unit ones f = x/‖x‖.

    "difference": |f(a) − f(b)|. "chi_square": (f(a) − f(b))² / (|f(a)| + |f(b)|), elementwise: for
    non-negative features χ² as published, for signed ones at most |f(a) − f(b)|.

    Args:
        a: embeddings, of any norm.
        b: embeddings to compare them with, row by row.
        kind: "difference" or "chi_square".

    Returns:
        Features, float32, 0 with derivative 0 where f(a) = f(b).

    Raises:
        ValueError: an unknown kind.

    References:
        Taigman, Yang, Ranzato, Wolf, DeepFace, 2014, sections 4.1 (χ²) and 4.2 (difference).
    """
    _check("features", kind, ("difference", "chi_square"))
    a, b = normalize(a), normalize(b)
    if kind == "difference":
        return jnp.abs(a - b)
    return jnp.square(a - b) / (jnp.abs(a) + jnp.abs(b) + _SMALLEST_SUM)


def siamese_start(embedding_dim: int) -> dict[str, Array]:
    """Where the logistic regression starts: all weights −10/√d, bias 9.

    The features of unrelated unit embeddings sum to about 1.1√d (difference) or 1.0√d (χ²), those
    of one person to less: so a larger sum is already less alike, on the right scale.

    Args:
        embedding_dim: d.

    Returns:
        {"weight": [d], "bias": []}.
    """
    return {"weight": jnp.full(embedding_dim, -10.0 * embedding_dim**-0.5), "bias": jnp.float32(9)}


def siamese_score(
    learned: dict[str, Array],
    a: Float[Array, "n d"],
    b: Float[Array, "n d"],
    *,
    features: str = "difference",
) -> Float[Array, "n"]:
    """weight · features(a, b) + bias: the logit of being the same person.

    Args:
        learned: {"weight": [d], "bias": []}.
        a: embeddings, of any norm.
        b: embeddings to compare them with, row by row.
        features: a kind of pair_features.

    Returns:
        Logits, float32, symmetric in a and b: larger is more alike, 0 is undecided.

    Raises:
        ValueError: an unknown kind of features.
    """
    values = pair_features(a, b, features)
    return jnp.matmul(values, learned["weight"], precision="highest") + learned["bias"]


def siamese(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    learned: dict[str, Array],
    features: str = "difference",
    frozen: bool = False,
    axis_name: str | None = None,
) -> Float[Array, "anchors"]:
    """−log σ(score) for the same person, −log(1 − σ(score)) for different people, balanced.

    ½ the mean over the same pairs + ½ the mean over the different pairs: a batch has far more
    different pairs, and a verification test as many of each.

    Args:
        embeddings: x.
        labels: y.
        learned: {"weight": [d], "bias": []}, see siamese_start.
        features: a kind of pair_features.
        frozen: trains `learned` alone; no gradient reaches the embeddings.
        axis_name: the mesh axis over which the anchors are spread, if any.

    Returns:
        One loss per anchor: b/2 times the sum over its same pairs, divided by the number of same
        pairs of the whole batch, and likewise the different ones. Their mean is the sum above.

    Raises:
        ValueError: an unknown kind of features, or the batch does not divide over the devices.

    References:
        Taigman, Yang, Ranzato, Wolf, DeepFace, 2014, section 4.2.
    """
    if frozen:
        embeddings = lax.stop_gradient(embeddings)
    learned = vary(learned, axis_name)

    def visit(anchor: Array, points: Array, same: Array, different: Array) -> tuple[Array, Array]:
        anchors = jnp.broadcast_to(anchor, points.shape)
        logits = siamese_score(learned, anchors, points, features=features)
        kinds = jnp.stack([same, different])
        losses = jnp.stack([jax.nn.softplus(-logits), jax.nn.softplus(logits)])
        return jnp.sum(jnp.where(kinds, losses, 0.0), axis=1), jnp.sum(kinds, axis=1)

    sums, counts = _over_anchors(visit, _points(embeddings, False), labels, axis_name)
    return jnp.mean(_shares(sums, counts, axis_name), axis=1)


def _points(embeddings: Array, normalized: bool) -> Array:
    """What is compared: the embeddings or their directions, in float32 at least."""
    if normalized:
        return normalize(embeddings)
    return embeddings.astype(jnp.promote_types(embeddings.dtype, jnp.float32))


def _over_anchors(
    visit: Callable[..., Any], points: Array, labels: Array, axis_name: str | None
) -> Any:
    """visit(anchor [d], points [b, d], same [b], different [b]) for each anchor held here, stacked.

    An anchor is neither the same as itself nor different. Visits are recomputed in the backward
    pass, so that nothing of theirs is kept but the results.
    """
    b = labels.shape[0]
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if b % devices:
        raise ValueError(f"a batch of {b} does not divide over {devices} devices")
    first = 0 if axis_name is None else lax.axis_index(axis_name) * (b // devices)
    # Once here and not in every step, so that the gradient is summed over devices once.
    points, labels = vary((points, labels), axis_name)

    @jax.checkpoint
    def one(i: Array) -> Any:
        same = labels == labels[i]
        return visit(points[i], points, same.at[i].set(False), ~same)

    at_once = min(max(1, _AT_ONCE // b**2), b // devices)
    return lax.map(one, first + jnp.arange(b // devices), batch_size=at_once)


def _between(gap: Array, low: ArrayLike, high: ArrayLike) -> Array:
    """low < gap ≤ high, never inf (no negative); so written, NaN is in every category."""
    return ~(gap <= low) & ~(gap > high) & (gap != jnp.inf)


def _total(counts: Int[Array, "anchors *kinds"], axis_name: str | None) -> Float[Array, "*kinds"]:
    """Σ over all anchors of all devices, in float32: the triplets of a batch may exceed int32."""
    total = jnp.sum(counts.astype(jnp.float32), axis=0)
    return total if axis_name is None else lax.psum(total, axis_name)


def _shares(
    sums: Float[Array, "anchors *kinds"],
    counts: Int[Array, "anchors *kinds"],
    axis_name: str | None,
) -> Float[Array, "anchors *kinds"]:
    """b · sum_i / Σ counts: their mean over the whole batch is Σ sums / Σ counts."""
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return sums * (devices * sums.shape[0] / jnp.maximum(_total(counts, axis_name), 1.0))


def _check(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")


LOSSES = {
    "contrastive": Loss(contrastive),
    "triplet": Loss(triplet, figures=collapse),
    "siamese": Loss(siamese, learned=siamese_start),
}
