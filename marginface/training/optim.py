"""Optimizers and learning-rate schedules as functions of traced hyper-parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marginface.lookup import find, from_path, is_path
from marginface.typing import Array, Float, Int

SCHEDULES = ("constant", "step", "cosine", "polynomial")

Transformations = tuple[optax.GradientTransformation, ...]


def learning_rate_factor(
    step: Int[Array, ""],
    total: int,
    *,
    name: str,
    warmup: Float[Array, ""] | float,
    boundaries: tuple[float, ...] = (),
    factor: Float[Array, ""] | float = 0.1,
    power: Float[Array, ""] | float = 1.0,
) -> Float[Array, ""]:
    """Learning rate at `step` of `total`, as a factor of its peak.

    With t = step / total in [0, 1) and warm-up w, min(1, (step + 1) / (w total)) times

        constant: 1        step: factor^(number of boundaries <= t)
        cosine: (1 + cos(π u)) / 2        polynomial: (1 - u)^power

    where u = (t - w) / (1 - w), clipped to [0, 1].

    Args:
      step: number of updates done.
      total: number of updates of the whole run.
      name: one of SCHEDULES.
      warmup: fraction of the run over which the rate rises linearly.
      boundaries: fractions of the run at which "step" multiplies by `factor`.
      factor: of "step".
      power: of "polynomial".

    Raises:
      ValueError: unknown name.
    """
    done = step.astype(jnp.float32) / total
    rise = jnp.minimum(1.0, (step + 1) / jnp.maximum(warmup * total, 1.0))
    u = jnp.clip((done - warmup) / jnp.maximum(1.0 - warmup, 1e-6), 0.0, 1.0)
    match name:
        case "constant":
            decay = jnp.ones(())
        case "step":
            passed = sum(jnp.where(done >= b, 1.0, 0.0) for b in boundaries)
            decay = jnp.asarray(factor, jnp.float32) ** passed
        case "cosine":
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * u))
        case "polynomial":
            decay = (1.0 - u) ** power
        case _:
            raise ValueError(f"schedule.name={name!r} is unknown; known: {', '.join(SCHEDULES)}")
    return rise * decay


def sgd(hyper: Mapping[str, Any], decay: optax.GradientTransformation) -> Transformations:
    """PyTorch's: weight decay joins the gradient before the momentum buffer."""
    return decay, optax.trace(hyper["momentum"])


def adamw(hyper: Mapping[str, Any], decay: optax.GradientTransformation) -> Transformations:
    """Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019."""
    return optax.scale_by_adam(hyper["b1"], hyper["b2"]), decay


def lamb(hyper: Mapping[str, Any], decay: optax.GradientTransformation) -> Transformations:
    """You et al., Large Batch Optimization for Deep Learning, 2020."""
    return *adamw(hyper, decay), optax.scale_by_trust_ratio()


# (numbers of config.optimizer, weight decay) → what follows the clipping of gradients.
OPTIMIZERS = {"sgd": sgd, "adamw": adamw, "lamb": lamb}


def direction(name: str, hyper: Mapping[str, Any]) -> optax.GradientTransformation:
    """The update before the learning rate: new = old - learning_rate · direction.

    Weight decay spares vectors (norms, biases, PReLU slopes). Every value of `hyper` may be traced,
    so build this inside the jitted step; the state's structure depends on `name` alone.

    Args:
      name: one of OPTIMIZERS, or a function like those, see lookup.from_path.
      hyper: clip_norm (0 means none), weight_decay, and what the optimizer asks for.

    Raises:
      ValueError: unknown name.
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    key = "optimizer.name"
    optimizer = from_path(name, key) if is_path(name) else find(OPTIMIZERS, name, key)
    limit = jnp.where(hyper["clip_norm"] > 0, hyper["clip_norm"], jnp.inf)
    decay = optax.add_decayed_weights(hyper["weight_decay"], mask=matrices)
    return optax.chain(optax.clip_by_global_norm(limit), *optimizer(hyper, decay))
