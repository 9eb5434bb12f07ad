"""The only place that turns config into a loss: terms → (scalar, metrics)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from marginface import class_softmax, margins, regularizers, sharding
from marginface import similarity as similarities
from marginface.config import Config, check_arguments, find_function
from marginface.typing import Array, Float, Int

Hyper = dict[str, Any]
Metrics = dict[str, Array]


class Objective(NamedTuple):
    """What is minimised: how its prototypes start, and the loss itself.

    init: key → prototypes (rows padded to divide over the mesh).
    loss: (prototypes, embeddings [b, d], labels [b], hyper, step) → (scalar, metrics), where the
      metrics are "loss/<term>" before its weight, "train/top1" and "train/target_angle" (degrees).
    """

    init: Callable[[Array], Any]
    loss: Callable[..., tuple[Array, Metrics]]


def hyper(config: Config) -> Hyper:
    """Every number that a sweep may vary, as float32: they reach the step as traced values."""

    def numbers(section: Any) -> dict[str, Any]:
        return {k: jnp.float32(v) for k, v in section.items() if isinstance(v, float)}

    terms = {name: numbers(kw) for name, kw in config.regularizers.items()}
    return {
        "margin": {k: jnp.float32(v) for k, v in config.loss.margin_kw.items()},
        "scale": jnp.float32(config.loss.scale),
        "anneal": numbers(config.loss.get("anneal", {})),
        "regularizers": terms,
        "optimizer": numbers(config.optimizer),
        "schedule": numbers(config.schedule),
    }


def weights(prototypes: Any) -> Float[Array, "c d"]:
    """W, without the bias that the linear similarity keeps beside it."""
    return getattr(prototypes, "weight", prototypes)


def annealed_weight(step: Int[Array, ""], anneal: Hyper) -> Float[Array, ""]:
    """λ = max(least, start (1 + rate step)^-power), the weight of the plain cosine in A-Softmax.

    References:
      Liu et al., SphereFace, 2017, section 4.1 and the authors' training files.
    """
    decayed = anneal["start"] * (1.0 + anneal["rate"] * step) ** -anneal["power"]
    return jnp.maximum(anneal["least"], decayed)


def make(config: Config, *, num_classes: int, embedding_dim: int, mesh: Mesh) -> Objective:
    """margin softmax + Σ weight · regulariser, as config.loss and config.regularizers say.

    Raises:
      ValueError: unknown margin, similarity or regulariser, or arguments it does not take.
    """
    loss, axis = config.loss, sharding.AXIS
    margin_of = find_function(margins, loss.margin, "loss.margin", but_not=("detach", "anneal"))
    check_arguments(margin_of, loss.margin_kw, "loss.margin_kw")
    similarity = find_function(
        similarities, loss.similarity, "loss.similarity", but_not=("normalize", "norm")
    )
    terms = {}
    for name, kw in config.regularizers.items():
        term = find_function(regularizers, name, "regularizers")
        static = {k: v or None for k, v in kw.items() if k == "chunk_size"}
        terms[name] = functools.partial(term, axis_name=axis, **static)
    rows = sharding.padded_rows(num_classes, mesh.size)

    def init(key: Array) -> Any:
        # Short rows turn quickly at first; 0.01 is what arcface_torch starts with too.
        weight = 0.01 * jax.random.normal(key, (rows, embedding_dim))
        weight = jnp.where(jnp.arange(rows)[:, None] < num_classes, weight, 0.0)
        if similarity is similarities.linear:
            return similarities.Linear(weight, jnp.zeros(rows))
        return weight

    def one_shard(prototypes: Any, embeddings: Array, labels: Array, scale: Array) -> tuple:
        classes = class_softmax.all_classes(prototypes, num_classes, axis_name=axis)
        with jax.named_scope("class_walk"):
            target = class_softmax.target_similarity(
                embeddings, labels, classes, similarity=similarity, axis_name=axis
            )
            others = class_softmax.negatives(
                embeddings,
                labels,
                classes,
                scale=scale,
                similarity=similarity,
                chunk_size=loss.chunk_size or None,
                axis_name=axis,
            )
        directions = class_softmax.Classes(weights(prototypes), classes.ids)
        return target, others, {name: term(directions) for name, term in terms.items()}

    walk = jax.shard_map(
        one_shard, mesh=mesh, in_specs=(P(axis), P(), P(), P()), out_specs=(P(), P(), P(axis))
    )

    def objective(
        prototypes: Any, embeddings: Array, labels: Array, hyper: Hyper, step: Array
    ) -> tuple[Array, Metrics]:
        scale = hyper["scale"]
        if loss.norm_as_scale:
            scale = scale * similarities.norm(embeddings)
        margin = functools.partial(margin_of, **hyper["margin"])
        if loss.detach:
            margin = margins.detach(margin)
        if hyper["anneal"]:
            margin = margins.anneal(margin, annealed_weight(step, hyper["anneal"]))
        target, others, per_class = walk(prototypes, embeddings, labels, scale)
        losses = class_softmax.softmax_loss(target, others, margin=margin, scale=scale)
        total = jnp.mean(losses)
        metrics = {"loss/margin_softmax": total}
        for name, values in per_class.items():
            value = jnp.sum(values) / num_classes
            total += hyper["regularizers"][name]["weight"] * value
            metrics[f"loss/{name}"] = value
        metrics["loss/total"] = total
        metrics["train/top1"] = jnp.mean(target > others.max)
        if similarity is similarities.cosine:
            angle = jnp.arccos(jnp.clip(target, -1.0, 1.0))
            metrics["train/target_angle"] = jnp.mean(jnp.degrees(angle))
        return total, jax.lax.stop_gradient(metrics)

    return Objective(init, objective)
