"""Terms of embeddings and labels that stand beside a class loss: (embeddings, labels, ...) → [b].

With axis_name, call them inside jax.shard_map with embeddings and labels replicated and all that
has the classes as its leading axis sharded; take gradients outside of it.

A term asks by keyword for what it needs: `classes`, the prototypes held here; `num_classes`;
`learned`, its own parameters; `running`, its running state, which it returns renewed beside its
values; hyper-parameters, which may be traced. The table LOSSES names the functions that start
parameters and state.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from marginface.losses import groups
from marginface.losses.class_softmax import (
    PAD,
    Classes,
    all_classes,
    find,
    sum_negatives,
    target_similarity,
    vary,
)
from marginface.losses.margins import _angle
from marginface.losses.regularizers import Potential, _inverse_angle, _others
from marginface.losses.similarity import norm
from marginface.losses.table import Loss
from marginface.typing import Array, Float, Int


def center(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    running: dict[str, Array],
    num_classes: int,
    rate: ArrayLike = 0.5,
    axis_name: str | None = None,
) -> tuple[Float[Array, "b"], dict[str, Array]]:
    """½‖x_i − c_{y_i}‖², with centers that follow the embeddings and take no gradient.

    c_j ← c_j − rate·Σ_{i: y_i=j} (c_j − x_i) / (1 + n_j), with n_j the examples of class j here.

    Args:
        embeddings: x, of any norm.
        labels: y, class numbers.
        running: "centers" [c, d], those held here.
        num_classes: how many of all centers stand for a class.
        rate: α in [0, 1]; 0.5 in the paper.
        axis_name: the mesh axis over which the centers are sharded, if any.

    Returns:
        One loss per example, by the centers as they were, NaN where nobody holds the label; and
        the moved centers.

    References:
        Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, 2016,
        eq. 2 and 4.
    """
    centers = lax.stop_gradient(running["centers"])
    classes = all_classes(centers, num_classes, axis_name=axis_name)
    offsets = embeddings - _rows_of(labels, classes, axis_name)
    at = _positions(labels, classes.ids, axis_name)
    moves, none = vary((lax.stop_gradient(offsets), jnp.zeros(centers.shape[0])), axis_name)
    counts = none.at[at].add(1.0, mode="drop")
    moves = rate * moves / (1 + counts[at])[:, None]
    moved = centers.at[at].add(moves.astype(centers.dtype), mode="drop")
    return 0.5 * jnp.sum(offsets**2, axis=1), {"centers": moved}


def centers_at_origin(rows: int, embedding_dim: int) -> dict[str, Array]:
    """{"centers": 0 [rows, embedding_dim]}: each is pulled to its own class from anywhere."""
    return {"centers": jnp.zeros((rows, embedding_dim))}


def learned_center(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    learned: dict[str, Array],
    num_classes: int,
    axis_name: str | None = None,
) -> Float[Array, "b"]:
    """½‖x_i − c_{y_i}‖², with centers that are trained by gradient like any parameter.

    Args:
        embeddings: x, of any norm.
        labels: y, class numbers.
        learned: "centers" [c, d], those held here.
        num_classes: how many of all centers stand for a class.
        axis_name: the mesh axis over which the centers are sharded, if any.

    Returns:
        One loss per example; NaN where nobody holds the label.

    References:
        Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, 2016,
        eq. 2.
    """
    classes = all_classes(learned["centers"], num_classes, axis_name=axis_name)
    offsets = embeddings - _rows_of(labels, classes, axis_name)
    return 0.5 * jnp.sum(offsets**2, axis=1)


def intra(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    classes: Classes,
    axis_name: str | None = None,
) -> Float[Array, "b"]:
    """θ_i/π, with θ_i the angle between x_i and its own prototype W_{y_i}.

    Args:
        embeddings: x, of any norm.
        labels: y, class numbers.
        classes: the prototypes held here.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        One loss per example, in [0, 1]; NaN where nobody holds the label.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, eq. 5.
    """
    classes = _directions(classes)
    return _angle(target_similarity(embeddings, labels, classes, axis_name=axis_name)) / jnp.pi


def inter(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    classes: Classes,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "b"]:
    """−1/(C−1) Σ_{j≠y_i} θ_ij/π, with θ_ij the angle between W_{y_i} and W_j.

    Args:
        embeddings: not looked at: the prototypes alone are pushed.
        labels: y, class numbers.
        classes: the prototypes held here.
        chunk_size: classes visited at a time; None for all at once.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        One loss per example, in [−1, 0]; NaN where nobody holds the label.

    Raises:
        ValueError: chunk_size is not positive.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, eq. 6.
    """
    return _mean_over_others(
        lambda cosines: -jax.vmap(_angle)(cosines) / jnp.pi, labels, classes, chunk_size, axis_name
    )


def energy(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    classes: Classes,
    power: ArrayLike = 2.0,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "b"]:
    """1/(C−1) Σ_{j≠y_i} θ_ij^−power: regularizers.hyperspherical_energy of the batch's classes.

    Args:
        embeddings: not looked at: the prototypes alone are pushed.
        labels: y, class numbers.
        classes: the prototypes held here.
        power: how fast the energy falls with the angle, in radians; 2 in SphereFace+.
        chunk_size: classes visited at a time; None for all at once.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        One loss per example; NaN where nobody holds the label.

    Raises:
        ValueError: chunk_size is not positive.

    References:
        Liu et al., Learning towards Minimum Hyperspherical Energy, 2018, eq. 1, with angles.
    """
    return _mean_over_others(
        lambda cosines: _inverse_angle(cosines, power), labels, classes, chunk_size, axis_name
    )


def ring(
    embeddings: Float[Array, "b d"], labels: Int[Array, "b"], *, learned: dict[str, Array]
) -> Float[Array, "b"]:
    """½(‖x_i‖ − R)², with a radius R that is learned.

    Args:
        embeddings: x.
        labels: not looked at.
        learned: "radius" [], R.

    Returns:
        One loss per example.

    References:
        Zheng et al., Ring loss: Convex Feature Normalization for Face Recognition, 2018, eq. 1.
    """
    return norm_penalty(embeddings, labels, radius=learned["radius"])


def ring_start(embedding_dim: int) -> dict[str, Array]:
    """R = √embedding_dim, the norm of an embedding whose entries have unit variance."""
    return {"radius": jnp.sqrt(jnp.float32(embedding_dim))}


def norm_penalty(
    embeddings: Float[Array, "b d"], labels: Int[Array, "b"], *, radius: ArrayLike
) -> Float[Array, "b"]:
    """½(‖x_i‖ − radius)², with a given radius; 0 makes it ½‖x_i‖².

    Args:
        embeddings: x; the gradient of one of norm 0 is 0.
        labels: not looked at.
        radius: the norm to reach.

    Returns:
        One loss per example.
    """
    return 0.5 * (norm(embeddings) - radius) ** 2


def magnitude(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    lower: ArrayLike = 10.0,
    upper: ArrayLike = 110.0,
) -> Float[Array, "b"]:
    """g(a) = a/upper² + 1/a, with a = ‖x_i‖ clipped to [lower, upper]: long embeddings are cheap.

    As in the authors' code, beyond the bounds there is no gradient.

    Args:
        embeddings: x.
        labels: not looked at.
        lower: smaller norms count as this one; 10 in the paper.
        upper: larger norms count as this one, at which g is least; 110 in the paper.

    Returns:
        One loss per example.

    References:
        Meng et al., MagFace: A Universal Representation for Face Recognition and Quality
        Assessment, 2021, section 3.
    """
    length = jnp.clip(norm(embeddings), lower, upper)
    return length / jnp.square(upper) + 1 / length


def mean_margin(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    *,
    classes: Classes,
    num_classes: int,
    axis_name: str | None = None,
) -> Float[Array, "b"]:
    """1 − (1/C) Σ_j m_j, the same for every example: what AdaM-Softmax pays for small margins.

    Args:
        embeddings: not looked at.
        labels: not looked at.
        classes: the classes held here, their rows with a field margin [c].
        num_classes: C.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        The same value for every example.

    Raises:
        ValueError: the rows have no margins.

    References:
        Liu et al., AdaptiveFace: Adaptive Margin and Sampling for Face Recognition, 2019.
    """
    if not hasattr(classes.rows, "margin"):
        raise ValueError("mean_margin needs rows with margins, as adaptive_margin_softmax has")
    total = jnp.sum(jnp.where(classes.ids != PAD, classes.rows.margin, 0.0), dtype=jnp.float32)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    return jnp.broadcast_to(1 - total / num_classes, labels.shape)


def grouping(
    group_logits: Float[Array, "b k"],
    *,
    running: dict[str, Array],
    momentum: float | Array = 0.9,
    self_distributed: bool = True,
) -> tuple[Float[Array, "b"], dict[str, Array]]:
    """−log p(G*(x)|x), p = softmax(logits): the loss of the groups, and the new running mean.

    G* is a constant; the gradient goes through the logits to all that made them.

    Args:
        group_logits: of the decision network.
        running: {"expectation": [K]}, at first `grouping_start`. This batch is in the mean that its
            own labels are compared with.
        momentum: of the running mean, 0 <= momentum < 1.
        self_distributed: False takes the group of the largest p as the label: the paper's naive
            labelling, under which groups die.

    Returns:
        Loss per example, float32, and `running` after this batch.

    References:
        Kim et al., "GroupFace: Learning Latent Groups and Constructing Group-based Representations
        for Face Recognition", 2020, sections 3.2 and 3.3.
    """
    logs = jax.nn.log_softmax(group_logits.astype(jnp.float32))
    p = jnp.exp(logs)
    expectation = groups.update_expectation(running["expectation"], p, momentum=momentum)
    expected = expectation / jnp.sum(expectation) if self_distributed else jnp.zeros(p.shape[1])
    labels = groups.self_distributed_labels(p, expected)
    losses = -jnp.take_along_axis(logs, labels[:, None], axis=1)[:, 0]
    return losses, {"expectation": expectation}


def grouping_start(num_groups: int) -> dict[str, Array]:
    """What `grouping` carries from batch to batch, before the first: {"expectation": 0 [K]}."""
    return {"expectation": jnp.zeros(num_groups)}


def group_figures(group_logits: Float[Array, "b k"]) -> dict[str, Array]:
    """{"group_entropy", "group_largest"}: how evenly a batch uses the groups, see groups.usage."""
    used = groups.usage(jnp.argmax(group_logits, axis=1), group_logits.shape[1])
    return {"group_entropy": used.entropy, "group_largest": used.largest}


def _directions(classes: Classes) -> Classes:
    """The prototypes alone, without the bias or the margins that some losses keep beside them."""
    return Classes(getattr(classes.rows, "weight", classes.rows), classes.ids)


def _positions(
    labels: Int[Array, "b"], ids: Int[Array, "c"], axis_name: str | None
) -> Int[Array, "b"]:
    """Where each label is held, and c, out of range, where it is not."""
    at, held = find(ids, vary(labels, axis_name))
    return jnp.where(held, at, ids.shape[0])


def _rows_of(
    labels: Int[Array, "b"], classes: Classes, axis_name: str | None
) -> Float[Array, "b d"]:
    """The row of each label, on every device, float32; NaN where nobody holds it."""
    at = _positions(labels, classes.ids, axis_name)
    rows = classes.rows.at[at].get(mode="fill", fill_value=0).astype(jnp.float32)
    holders = (at < classes.ids.shape[0]).astype(jnp.int32)
    if axis_name is not None:
        rows, holders = lax.psum((rows, holders), axis_name)
    return jnp.where(holders[:, None] > 0, rows, jnp.nan)


def _mean_over_others(
    potential: Potential,
    labels: Int[Array, "b"],
    classes: Classes,
    chunk_size: int | None,
    axis_name: str | None,
) -> Float[Array, "b"]:
    """1/(C−1) Σ_{j≠y} potential(cos(W_y, W_j)) for each label y."""
    classes = _directions(classes)
    own = _rows_of(labels, classes, axis_name)
    sums, _ = sum_negatives(
        own, labels, classes, potential, chunk_size=chunk_size, axis_name=axis_name
    )
    return sums / _others(classes, axis_name)


LOSSES = {
    "center": Loss(center, running=centers_at_origin),
    "learned_center": Loss(learned_center, learned=centers_at_origin),
    "intra": Loss(intra),
    "inter": Loss(inter),
    "energy": Loss(energy),
    "ring": Loss(ring, learned=ring_start),
    "norm_penalty": Loss(norm_penalty),
    "magnitude": Loss(magnitude),
    "mean_margin": Loss(mean_margin),
    "grouping": Loss(
        grouping, running=grouping_start, outputs=("group_logits",), figures=group_figures
    ),
}
