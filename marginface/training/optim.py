"""Optimizers and learning-rate schedules as functions of traced hyper-parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marginface.typing import Array, Float, Int

OPTIMIZERS = ("sgd", "adamw", "lamb")
SCHEDULES = ("constant", "step", "cosine", "polynomial")


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


def direction(name: str, hyper: Mapping[str, Any]) -> optax.GradientTransformation:
    """The update before the learning rate: new = old - learning_rate · direction.

    sgd is PyTorch's: weight decay joins the gradient before the momentum buffer. Weight decay
    spares vectors (norms, biases, PReLU slopes). Every value of `hyper` may be traced, so build
    this inside the jitted step; the state's structure depends on `name` alone.

    Args:
      name: one of OPTIMIZERS.
      hyper: clip_norm (0 means none), weight_decay, and momentum (sgd) or b1, b2 (adamw, lamb).

    Raises:
      ValueError: unknown name.
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    limit = jnp.where(hyper["clip_norm"] > 0, hyper["clip_norm"], jnp.inf)
    clip = optax.clip_by_global_norm(limit)
    decay = optax.add_decayed_weights(hyper["weight_decay"], mask=matrices)
    match name:
        case "sgd":
            return optax.chain(clip, decay, optax.trace(hyper["momentum"]))
        case "adamw":
            return optax.chain(clip, optax.scale_by_adam(hyper["b1"], hyper["b2"]), decay)
        case "lamb":
            adam = optax.scale_by_adam(hyper["b1"], hyper["b2"])
            return optax.chain(clip, adam, decay, optax.scale_by_trust_ratio())
        case _:
            raise ValueError(f"optimizer.name={name!r} is unknown; known: {', '.join(OPTIMIZERS)}")
