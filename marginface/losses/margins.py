"""Margins: ψ, the only place where softmax-family face losses differ on the true class.

A margin ψ is a scalar function of one cosine, [b] → [b]. It replaces the target's cosine
c = cos θ by a smaller value, so that the loss softplus(LSE − s·ψ(c)) is small only where θ is small
by a margin. It never sees the class axis. ψ must be continuous and non-increasing in θ on [0, π],
with a finite derivative in c on [−1, 1]. Every parameter may be a Python number, a traced scalar,
or one value per example, [b]; bind it with functools.partial.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from marginface.typing import Array, Float

Margin = Callable[[Float[Array, "b"]], Float[Array, "b"]]


def identity(c: Float[Array, "b"]) -> Float[Array, "b"]:
    """No margin: ψ(θ) = cos θ (softmax, NormFace).

    Args:
        c: cosines of the targets.

    Returns:
        The same cosines.

    References:
        Wang et al., NormFace: L2 Hypersphere Embedding for Face Verification, 2017, eq. 6.
    """
    return c


def multiplicative_angular(c: Float[Array, "b"], *, m: ArrayLike) -> Float[Array, "b"]:
    """A-Softmax: ψ(θ) = (−1)^k cos(mθ) − 2k with k = ⌊mθ/π⌋, for any real m ≥ 1.

    Args:
        c: cosines of the targets.
        m: factor on the angle; 4 in the paper, 1 is the identity.

    Returns:
        ψ, in [1 − 2m, 1] for a whole m.

    References:
        Liu et al., SphereFace: Deep Hypersphere Embedding for Face Recognition, 2017, eq. 7.
    """
    angle = m * _angle(c)
    k = lax.stop_gradient(jnp.floor(angle / jnp.pi))
    return (1 - 2 * (k % 2)) * jnp.cos(angle) - 2 * k


def additive_cosine(c: Float[Array, "b"], *, m: ArrayLike) -> Float[Array, "b"]:
    """CosFace: ψ(θ) = cos θ − m.

    Args:
        c: cosines of the targets.
        m: margin on the cosine; 0.35 in the paper.

    Returns:
        ψ, in [−1 − m, 1 − m].

    References:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018, eq. 4.
    """
    return c - m


def additive_angular(c: Float[Array, "b"], *, m: ArrayLike) -> Float[Array, "b"]:
    """ArcFace: ψ(θ) = cos(clip(θ + m, 0, π)).

    The paper leaves θ + m > π open. Clipped there, ψ stays non-increasing, and continuous together
    with its derivative: it reaches −1 with slope 0. The true derivative is used; the authors' code
    behaves as detach(additive_angular) instead.

    Args:
        c: cosines of the targets.
        m: margin on the angle, radians; 0.5 in the paper. May be negative.

    Returns:
        ψ, in [−1, 1].

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, eq. 3.
    """
    return combined(c, m1=1.0, m2=m, m3=0.0)


def combined(
    c: Float[Array, "b"], *, m1: ArrayLike, m2: ArrayLike, m3: ArrayLike
) -> Float[Array, "b"]:
    """All three margins at once: ψ(θ) = cos(clip(m1·θ + m2, 0, π)) − m3.

    Args:
        c: cosines of the targets.
        m1: factor on the angle.
        m2: margin on the angle, radians.
        m3: margin on the cosine.

    Returns:
        ψ, in [−1 − m3, 1 − m3].

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, eq. 4.
    """
    return jnp.cos(jnp.clip(m1 * _angle(c) + m2, 0.0, jnp.pi)) - m3


def detach(margin: Margin) -> Margin:
    """The margin's value with the identity's derivative: ψ = c + stop_gradient(ψ(c) − c).

    Args:
        margin: any margin.

    Returns:
        A margin as arcface_torch and OpenSphere compute it.
    """
    return lambda c: c + lax.stop_gradient(margin(c) - c)


def anneal(margin: Margin, lam: ArrayLike) -> Margin:
    """A blend of no margin and a margin: ψ' = (λ·c + ψ(c)) / (1 + λ).

    Args:
        margin: any margin.
        lam: λ ≥ 0; large at the start of training, small at its end.

    Returns:
        The blended margin.

    References:
        Liu et al., SphereFace: Deep Hypersphere Embedding for Face Recognition, 2017, section 4.1.
    """
    return lambda c: (lam * c + margin(c)) / (1 + lam)


def _angle(c: Float[Array, "b"]) -> Float[Array, "b"]:
    """θ = arccos c with a finite derivative everywhere: 0 where |c| ≥ 1, the true one elsewhere.

    At |c| = 1 the cosine itself has derivative 0 in x and W, so nothing is lost.
    """
    squared_sine = (1 - c) * (1 + c)
    inside = squared_sine > 0
    sine = jnp.where(inside, jnp.sqrt(jnp.where(inside, squared_sine, 1.0)), 0.0)
    return jnp.arctan2(sine, c)


MARGINS = {
    "identity": identity,
    "multiplicative_angular": multiplicative_angular,
    "additive_cosine": additive_cosine,
    "additive_angular": additive_angular,
    "combined": combined,
}
