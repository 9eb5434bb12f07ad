"""Losses over classes, one function a paper: what each does to the target and to the others.

    softmax family:  loss_i = softplus(LSE_i − z_i),   LSE_i = log Σ_{j≠y_i} exp(s·h(cos θ_ij))
    binary family:   loss_i = f₊(cos θ_iy) + Σ_{j≠y_i} f₋(cos θ_ij)

z_i is s·ψ(cos θ_iy) with the loss's own margin. All walk over the classes with class_softmax: at
once or in chunks, on one device or sharded over several, all classes or a sample. With `axis_name`,
call them inside jax.shard_map with embeddings and labels replicated and the classes sharded.

The docstrings below leave out what all functions share:

    embeddings   x [b, d], of any norm
    labels       y [b], class numbers
    classes      those held here, rows [c, d]
    scale        s
    chunk_size   classes visited at a time; None for all at once
    precision    of the products with the other classes; the target's cosine is always float32
    axis_name    the mesh axis over which the classes are sharded, if any

Every number may be traced. All return `ClassLoss`: one loss per example, never a mean, NaN where
nobody holds the label. `learned` are a loss's own parameters, `running` is its running state, which
it returns renewed; the table LOSSES names the functions that start them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from marginface.losses.class_softmax import (
    PAD,
    Classes,
    Negatives,
    negatives,
    sum_negatives,
    target_similarity,
)
from marginface.losses.margins import Margin, additive_angular, additive_cosine, combined, identity
from marginface.losses.similarity import Precision, Rows, Similarity, cosine, dot, norm
from marginface.losses.table import Loss
from marginface.typing import Array, Float, Int, Number

State = dict[str, Any]


class ClassLoss(NamedTuple):
    """What a loss over classes gives for each example, all [b].

    loss: the loss.
    target: the similarity to the true class, without its margin.
    hardest: the largest similarity to another class; −inf where there is none.
    running: the next running state, of a loss that has one.
    """

    loss: Array
    target: Array
    hardest: Array
    running: State = {}  # noqa: RUF012  (never changed in place)


class MarginRows(NamedTuple):
    """Rows of AdaM-Softmax: prototypes W [c, d], and a learned margin for each class [c]."""

    weight: Array
    margin: Array


def margin_rows(weight: Float[Array, "c d"], *, num_classes: int, key: Array) -> MarginRows:
    """W with margins drawn evenly from [0.3, 0.4); those of padding are 0.

    Args:
        weight: W, all classes and padding.
        num_classes: how many of its rows stand for a class.
        key: for the draw.

    Returns:
        The rows at the start.
    """
    margin = jax.random.uniform(key, weight.shape[:1], minval=0.3, maxval=0.4)
    return MarginRows(weight, jnp.where(jnp.arange(len(margin)) < num_classes, margin, 0.0))


def margin_softmax(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    margin: Margin = identity,
    scale: Number = 64.0,
    similarity: Similarity = cosine,
    smoothing: Number | None = None,
    focal: Number | None = None,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """Softmax cross-entropy with a margin on the true class: softplus(LSE − s·ψ(c)).

    softmax: linear similarity, scale 1. NormFace: cosine. A-Softmax: multiplicative_angular,
    annealed, scale similarity.norm(x). CosFace, ArcFace, combined: cosine and their margin.
    Sub-center ArcFace: subcenter_cosine.

    Args:
        embeddings: x.
        labels: y, class numbers.
        classes: the classes held here.
        margin: ψ, see margins.
        scale: s, a scalar or one per example, [b].
        similarity: of embeddings and rows.
        smoothing: ε of label smoothing: the wanted probability is 1 − ε + ε/C for the true class
            and ε/C for each other one, over the classes held. None leaves out the sum it needs.
        focal: γ of the focal variant (1 − p)^γ·loss, p the probability of the true class.
        chunk_size: classes visited at a time; None for all at once.
        precision: of the products with the other classes, see similarity.product.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        One loss per example.

    Raises:
        ValueError: chunk_size is not positive.

    References:
        Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016, section 7.
        Lin et al., Focal Loss for Dense Object Detection, 2017, eq. 4.
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
        precision=precision,
        axis_name=axis_name,
        with_sum=smoothing is not None,
    )
    logit = scale * margin(target)
    loss = jax.nn.softplus(others.logsumexp - logit)
    if smoothing is not None and others.sum is not None:
        count = jnp.sum(classes.ids != PAD)  # C; of a sample, its own
        count = count if axis_name is None else lax.psum(count, axis_name)
        # ε/C Σ_j (LSE_all − z_j) + (1 − ε)(LSE_all − z_y), written as loss + ε(z_y − mean_j z_j)
        loss += smoothing * (logit - (logit + others.sum) / count)
    if focal is not None:
        miss = jnp.maximum(-jnp.expm1(-loss), jnp.finfo(jnp.float32).tiny)
        loss *= jnp.exp(focal * jnp.log(miss))
    return ClassLoss(loss, target, others.hardest)


def large_margin_softmax(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    margin: Margin,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """L-Softmax: target ‖W_y‖‖x‖ψ(θ_y), others ‖W_j‖‖x‖cos θ_j.

    Args:
        margin: ψ; multiplicative_angular with m = 4 in the paper, annealed as A-Softmax is.

    Returns:
        One loss per example; target and hardest are products W·x.

    References:
        Liu et al., Large-Margin Softmax Loss for Convolutional Neural Networks, 2016, eq. 4-6.
    """
    cos = target_similarity(embeddings, labels, classes, axis_name=axis_name)
    length = norm(embeddings) * target_similarity(
        embeddings, labels, classes, similarity=_row_norms, axis_name=axis_name
    )
    others = negatives(
        embeddings,
        labels,
        classes,
        scale=1.0,
        similarity=dot,
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
    )
    loss = jax.nn.softplus(others.logsumexp - length * margin(cos))
    return ClassLoss(loss, length * cos, others.hardest)


def adaptive_margin_softmax(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    scale: Number,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """AdaM-Softmax: target s(cos θ_y − m_y) with a margin learned for each class, in [0, 1].

    Goes with the term joint_losses.mean_margin, 1 − mean m, of weight 70 in the paper; without it
    the margins fall to 0.

    Args:
        classes: the classes held here, rows `MarginRows`.
        scale: s; 32.

    Returns:
        One loss per example.

    References:
        Liu et al., AdaptiveFace: Adaptive Margin and Sampling for Face Recognition, 2019, eq. 4, 6.
    """
    m = target_similarity(embeddings, labels, classes, similarity=_row_margins, axis_name=axis_name)
    # Held in [0, 1] with the derivative of the identity, so that a margin at an end can come back.
    m = m + lax.stop_gradient(jnp.clip(m, 0.0, 1.0) - m)
    margin = functools.partial(additive_cosine, m=m)
    return margin_softmax(
        embeddings,
        labels,
        Classes(classes.rows.weight, classes.ids),
        margin=margin,
        scale=scale,
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
    )


def adacos(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    running: State,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """AdaCos: softmax over s_t·cos θ, whose scale follows the angles.

        s_t = log(B) / cos(min(π/4, θ_med)),   B = mean_i Σ_{j≠y_i} exp(s_{t−1} cos θ_ij)

    θ_med is the median of the targets' angles over the batch. No gradient enters s_t.

    Args:
        running: {"scale": s_{t−1}}.

    Returns:
        One loss per example, and {"scale": s_t}.

    References:
        Zhang et al., AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep Face
        Representations, 2019, eq. 8, 13, 15.
    """
    walk: Any = {"chunk_size": chunk_size, "precision": precision, "axis_name": axis_name}
    x, rows = lax.stop_gradient((embeddings, classes.rows))
    still = Classes(rows, classes.ids)
    before = negatives(x, labels, still, scale=running["scale"], **walk).logsumexp
    cos = target_similarity(x, labels, still, axis_name=axis_name)
    average = jax.nn.logsumexp(before) - jnp.log(labels.shape[0])
    median = jnp.minimum(jnp.median(jnp.arccos(jnp.clip(cos, -1.0, 1.0))), jnp.pi / 4)
    # B ≤ 1 would end in a scale of 0 or less: with a handful of classes it can come to that.
    scale = jnp.maximum(average, 1e-3) / jnp.cos(median)
    loss = margin_softmax(embeddings, labels, classes, scale=scale, **walk)
    return loss._replace(running={"scale": scale})


def adacos_start(num_classes: int) -> State:
    """{"scale": √2 log(C − 1)}, the fixed scale of eq. 8 (C = 2 starts as 3 does)."""
    return {"scale": jnp.sqrt(2.0) * jnp.log(jnp.float32(max(num_classes, 3) - 1))}


def curricularface(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    m: Number,
    scale: Number,
    running: State,
    rate: Number = 0.01,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """CurricularFace: ArcFace's target; hard negatives weigh more as training goes on.

        T_i = cos(θ_y + m);   h(cos θ_j) = cos θ_j where T_i ≥ cos θ_j, else cos θ_j (t + cos θ_j)
        t ← (1 − α) t + α mean_i cos θ_y

    t is updated before it is used, over the whole batch, without gradient.

    Args:
        m: margin on the angle, radians; 0.5 in the paper.
        scale: s; 64 in the paper.
        running: {"t": t}.
        rate: α of the moving average.

    Returns:
        One loss per example, and the next {"t": t}.

    References:
        Huang et al., CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition,
        2020, eq. 3, 5, 8.
    """
    cos = target_similarity(embeddings, labels, classes, axis_name=axis_name)
    psi = additive_angular(cos, m=m)
    t = (1 - rate) * running["t"] + rate * lax.stop_gradient(jnp.mean(cos))

    def harder(c: Array, easiest: Array) -> Array:
        return jnp.where(c > easiest[:, None], c * (t + c), c)

    others = negatives(
        embeddings,
        labels,
        classes,
        scale=scale,
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
        reweight=harder,
        target=psi,
    )
    return _softmax(cos, psi, others, scale)._replace(running={"t": t})


def curricularface_start() -> State:
    """{"t": 0}: easy examples first."""
    return {"t": jnp.float32(0.0)}


def mv_softmax(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    margin: Margin,
    t: Number,
    scale: Number,
    adaptive: bool = True,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """MV-Softmax: negatives that beat the target with its margin are raised.

        h(cos θ_j) = cos θ_j where ψ(θ_y) ≥ cos θ_j, else
        adaptive: t cos θ_j + t − 1        fixed: cos θ_j + t − 1

    Args:
        margin: ψ of the target; additive_cosine (MV-AM, m 0.35) or additive_angular (MV-Arc, 0.5).
        t: 1.12 in the paper's experiments; 1 changes nothing. The paper's t is this one less 1.
        scale: s; 32 in the paper.
        adaptive: whether hard negatives rise with their cosine.

    Returns:
        One loss per example.

    References:
        Wang et al., Mis-classified Vector Guided Softmax Loss for Face Recognition, 2020, eq. 7-10.
    """
    cos = target_similarity(embeddings, labels, classes, axis_name=axis_name)
    psi = margin(cos)

    def harder(c: Array, easiest: Array) -> Array:
        raised = (t if adaptive else 1.0) * c + t - 1.0
        return jnp.where(c > easiest[:, None], raised, c)

    others = negatives(
        embeddings,
        labels,
        classes,
        scale=scale,
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
        reweight=harder,
        target=psi,
    )
    return _softmax(cos, psi, others, scale)


def magface(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    scale: Number,
    lower_m: Number = 0.45,
    upper_m: Number = 0.8,
    lower: Number = 10.0,
    upper: Number = 110.0,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """MagFace: ArcFace whose margin grows with the embedding's norm a = clip(‖x‖, l_a, u_a).

        m(a) = l_m + (u_m − l_m)(a − l_a)/(u_a − l_a),   target s cos(θ_y + m(a))

    Goes with the term joint_losses.magnitude, a/u_a² + 1/a, of weight 35 in the paper; the two
    together let good images grow. Norms are in the units of the embedding.

    Args:
        scale: s; 64.
        lower_m: l_m, radians.
        upper_m: u_m, radians.
        lower: l_a.
        upper: u_a.

    Returns:
        One loss per example.

    References:
        Meng et al., MagFace: A Universal Representation for Face Recognition and Quality
        Assessment, 2021, eq. 3-4 and section 3.3.
    """
    a = jnp.clip(norm(embeddings), lower, upper)
    m = lower_m + (upper_m - lower_m) * (a - lower) / (upper - lower)
    return margin_softmax(
        embeddings,
        labels,
        classes,
        margin=functools.partial(additive_angular, m=m),
        scale=scale,
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
    )


def adaface(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    m: Number,
    scale: Number,
    running: State,
    concentration: Number = 0.333,
    rate: Number = 0.01,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """AdaFace: the norm tells an image's quality, and quality which kind of margin it gets.

        ẑ = clip(h (‖x‖ − μ)/(σ + 0.001), −1, 1),   target s(cos(θ_y − m ẑ) − (m ẑ + m))

    μ and σ follow the mean and the standard deviation of the batch's norms, each clipped to
    [0.001, 100]; they are updated before they are used. No gradient enters ẑ.

    Args:
        m: margin; 0.4 in the paper.
        scale: s; 64.
        running: {"mean": μ, "deviation": σ}.
        concentration: h.
        rate: of the moving averages.

    Returns:
        One loss per example, and the next running state.

    References:
        Kim et al., AdaFace: Quality Adaptive Margin for Face Recognition, 2022, eq. 13-16.
    """
    length = lax.stop_gradient(jnp.clip(norm(embeddings), 0.001, 100.0))
    b = labels.shape[0]
    mean = (1 - rate) * running["mean"] + rate * jnp.mean(length)
    # Of a batch of one there is no deviation: the running one stays.
    deviation = jnp.std(length, ddof=1) if b > 1 else running["deviation"]
    deviation = (1 - rate) * running["deviation"] + rate * deviation
    z = jnp.clip(concentration * (length - mean) / (deviation + 0.001), -1.0, 1.0)
    loss = margin_softmax(
        embeddings,
        labels,
        classes,
        margin=functools.partial(combined, m1=1.0, m2=-m * z, m3=m * z + m),
        scale=scale,
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
    )
    return loss._replace(running={"mean": mean, "deviation": deviation})


def adaface_start() -> State:
    """{"mean": 20, "deviation": 100}, as the authors' code starts."""
    return {"mean": jnp.float32(20.0), "deviation": jnp.float32(100.0)}


def elasticface(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    m: Number,
    scale: Number,
    key: Array,
    deviation: Number = 0.0125,
    target: str = "additive_angular",
    plus: bool = False,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """ElasticFace: a margin drawn for each example, m_i ~ N(m, σ²).

    With `plus` the same draws are handed out by difficulty: the largest margin goes to the example
    furthest from its prototype (paper, section 3.3).

    Args:
        m: mean of the margins; 0.5 (radians) or 0.35 (of the cosine) in the paper.
        scale: s; 64.
        key: for the draw.
        deviation: σ.
        target: which margin, "additive_angular", cos(θ_y + m_i), the paper's ElasticFace-Arc; or
            "additive_cosine", cos θ_y − m_i, its ElasticFace-Cos. Earlier versions' words for them,
            "arc" and "cos", are understood.
        plus: sort the draws.

    Returns:
        One loss per example.

    Raises:
        ValueError: another target.

    References:
        Boutros et al., ElasticFace: Elastic Margin Loss for Deep Face Recognition, 2022, eq. 5-6.
    """
    known = {"additive_angular": additive_angular, "additive_cosine": additive_cosine}
    psi = {"arc": additive_angular, "cos": additive_cosine, **known}.get(target)
    if psi is None:
        raise ValueError(f"target={target!r} is unknown; known: {', '.join(known)}")
    drawn = m + deviation * jax.random.normal(key, labels.shape)

    def margin(c: Array) -> Array:
        given = drawn
        if plus:
            rank = jnp.argsort(jnp.argsort(-lax.stop_gradient(c)))  # 0: the nearest
            given = jnp.sort(drawn)[rank]
        return psi(c, m=given)

    return margin_softmax(
        embeddings,
        labels,
        classes,
        margin=margin,
        scale=scale,
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
    )


def circle(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    m: Number,
    scale: Number,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """Circle loss with class labels: each similarity is pulled as strongly as it is wrong.

        target s[1 + m − c_y]₊(c_y − 1 + m),   others s[c_j + m]₊(c_j − m)

    The weights [·]₊ carry no gradient, as in the authors' code.

    Args:
        m: relaxation margin; 0.25 in the paper.
        scale: γ; 256 in the paper.

    Returns:
        One loss per example.

    References:
        Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, 2020,
        eq. 5-8.
    """
    cos = target_similarity(embeddings, labels, classes, axis_name=axis_name)
    psi = lax.stop_gradient(jax.nn.relu(1 + m - cos)) * (cos - 1 + m)

    def paced(c: Array, _: Array) -> Array:
        return lax.stop_gradient(jax.nn.relu(c + m)) * (c - m)

    others = negatives(
        embeddings,
        labels,
        classes,
        scale=scale,
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
        reweight=paced,
    )
    return _softmax(cos, psi, others, scale)


def sphereface2(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    m: Number,
    scale: Number,
    learned: State,
    balance: Number = 0.7,
    power: Number = 3.0,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """SphereFace2-C: C binary decisions for each example, summed.

        (α/r) log(1 + exp(−r(g(cos θ_y) − m) − b))
          + ((1 − α)/r) Σ_{j≠y} log(1 + exp(r(g(cos θ_j) + m) + b)),   g(z) = 2((z + 1)/2)^t − 1

    Args:
        m: margin on either side; 0.4.
        scale: r; 40.
        learned: {"bias": b}.
        balance: α, the weight of the true class; 0.7.
        power: t; 3.

    Returns:
        One loss per example.

    References:
        Wen et al., SphereFace2: Binary Classification is All You Need for Deep Face Recognition,
        2022, eq. 5-8 and appendix (margin type C).
    """
    bias = learned["bias"]

    def g(c: Array) -> Array:
        return 2 * _half(c) ** power - 1

    def push(c: Array) -> Array:
        return jax.nn.softplus(scale * (g(c) + m) + bias)

    cos = target_similarity(embeddings, labels, classes, axis_name=axis_name)
    pushes, hardest = sum_negatives(
        embeddings,
        labels,
        classes,
        push,
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
    )
    pull = jax.nn.softplus(-scale * (g(cos) - m) - bias)
    return ClassLoss((balance * pull + (1 - balance) * pushes) / scale, cos, hardest)


def sphereface2_start(
    num_classes: int,
    *,
    m: Number,
    scale: Number,
    balance: Number = 0.7,
    power: Number = 3.0,
) -> State:
    """{"bias": b} such that at cos θ = 0 the pull of one class equals the push of C − 1.

    α σ(−a_y − b) = (1 − α)(C − 1) σ(a_j + b) with a_y = r(g(0) − m), a_j = r(g(0) + m): quadratic
    in exp(b).
    """
    g = 2 * 0.5**power - 1
    pull, push = scale * (g - m), scale * (g + m)
    z = balance / ((1 - balance) * max(num_classes - 1, 1))
    root = jnp.sqrt((1 - z) ** 2 + 4 * z * jnp.exp(pull - push))
    # Of the two forms of the root the one that does not subtract near-equal numbers.
    bias = jnp.where(
        z < 1,
        jnp.log(2 * z) - push - jnp.log(jnp.abs(1 - z) + root),
        jnp.log(jnp.abs(1 - z) + root) - jnp.log(2.0) - pull,
    )
    return {"bias": jnp.asarray(bias, jnp.float32)}


def uniface(
    embeddings: Float[Array, "b d"],
    labels: Int[Array, "b"],
    classes: Classes,
    *,
    m: Number,
    scale: Number,
    learned: State,
    balance: Number = 1.0,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> ClassLoss:
    """UniFace's unified cross-entropy: one learned threshold parts all true from all false pairs.

        log(1 + exp(−s(cos θ_y − m) + b)) + l Σ_{j≠y} log(1 + exp(s cos θ_j − b))

    b/s is the threshold on the cosine that the trained network is to be used with.

    Args:
        m: margin on the cosine; 0.4 in the authors' code.
        scale: s; 64.
        learned: {"bias": b}.
        balance: l, the weight of the negatives.

    Returns:
        One loss per example.

    References:
        Zhou et al., UniFace: Unified Cross-Entropy Loss for Deep Face Recognition, 2023, eq. 7-9.
        Li et al., UniTSFace: Unified Threshold Integrated Sample-to-Sample Loss for Face
        Recognition, 2023, eq. 10 (its class-level part).
    """
    bias = learned["bias"]
    cos = target_similarity(embeddings, labels, classes, axis_name=axis_name)
    pushes, hardest = sum_negatives(
        embeddings,
        labels,
        classes,
        lambda c: jax.nn.softplus(scale * c - bias),
        chunk_size=chunk_size,
        precision=precision,
        axis_name=axis_name,
    )
    pull = jax.nn.softplus(bias - scale * (cos - m))
    return ClassLoss(pull + balance * pushes, cos, hardest)


def uniface_start(num_classes: int, *, sample_rate: float = 1.0) -> State:
    """{"bias": log(10·C·r)}: at the start the C·r negatives together weigh a tenth."""
    return {"bias": jnp.log(jnp.float32(10.0 * num_classes * sample_rate))}


def _softmax(cos: Array, psi: Array, others: Negatives, scale: Number) -> ClassLoss:
    return ClassLoss(jax.nn.softplus(others.logsumexp - scale * psi), cos, others.hardest)


def _half(c: Array) -> Array:
    """(c + 1)/2 in (0, 1]: rounding may leave a cosine below −1, where a real power is NaN."""
    return jnp.maximum((c + 1) / 2, 1e-6)


def _row_norms(x: Array, rows: Rows) -> Array:
    return jnp.broadcast_to(norm(rows), (x.shape[0], rows.shape[0]))


def _row_margins(x: Array, rows: MarginRows) -> Array:
    margins = rows.margin.astype(jnp.float32)
    return jnp.broadcast_to(margins, (x.shape[0], margins.shape[0]))


LOSSES = {
    "margin_softmax": Loss(margin_softmax),
    "large_margin_softmax": Loss(large_margin_softmax, cosine=False),
    "adaptive_margin_softmax": Loss(adaptive_margin_softmax, rows=margin_rows),
    "adacos": Loss(adacos, running=adacos_start),
    "curricularface": Loss(curricularface, running=curricularface_start),
    "mv_softmax": Loss(mv_softmax),
    "magface": Loss(magface),
    "adaface": Loss(adaface, running=adaface_start),
    "elasticface": Loss(elasticface),
    "circle": Loss(circle),
    "sphereface2": Loss(sphereface2, learned=sphereface2_start),
    "uniface": Loss(uniface, learned=uniface_start),
}
