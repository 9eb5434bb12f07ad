"""Similarities between embeddings and class rows: (x [b, d], rows [c, ...]) → [b, c].

All are computed in float32 at full precision, whatever the inputs' type: a scale of 64 turns
bfloat16's rounding of a cosine into a quarter of a logit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike

from marginface.typing import Array, Float, PyTree

Rows = PyTree  # one array or several, each with the classes as its leading axis
Similarity = Callable[[Float[Array, "b d"], Rows], Float[Array, "b c"]]

_SMALLEST_SQUARE = 1e-24  # below it 1/‖x‖³ in the derivative overflows float32


class Linear(NamedTuple):
    """Rows of a linear classifier: weight [c, d] and bias [c]."""

    weight: Array
    bias: Array


def cosine(
    x: Float[Array, "b d"], rows: Float[Array, "c d"], *, precision: PrecisionLike = "highest"
) -> Float[Array, "b c"]:
    """cos(x_i, W_j) = x_i·W_j / (‖x_i‖ ‖W_j‖), and 0 with derivative 0 where a norm is 0.

    Args:
        x: embeddings, of any norm.
        rows: prototypes W, of any norm.
        precision: of the matrix product, as in jax.numpy.matmul; "default" lets accelerators round.

    Returns:
        Cosines, float32.
    """
    return jnp.matmul(normalize(x), normalize(rows).T, precision=precision)


def linear(
    x: Float[Array, "b d"], rows: Linear, *, precision: PrecisionLike = "highest"
) -> Float[Array, "b c"]:
    """W_j·x_i + b_j: the similarity of the plain softmax loss, with scale 1.

    Args:
        x: embeddings.
        rows: weight and bias.
        precision: of the matrix product, as in jax.numpy.matmul; "default" lets accelerators round.

    Returns:
        Similarities, float32.
    """
    products = jnp.matmul(_wide(x), _wide(rows.weight).T, precision=precision)
    return products + _wide(rows.bias)


def dot(
    x: Float[Array, "b d"], rows: Float[Array, "c d"], *, precision: PrecisionLike = "highest"
) -> Float[Array, "b c"]:
    """W_j·x_i: the similarity of L-Softmax.

    Args:
        x: embeddings.
        rows: prototypes W.
        precision: of the matrix product, as in jax.numpy.matmul; "default" lets accelerators round.

    Returns:
        Products, float32.
    """
    return jnp.matmul(_wide(x), _wide(rows).T, precision=precision)


def subcenter_cosine(
    x: Float[Array, "b d"], rows: Float[Array, "c k d"], *, precision: PrecisionLike = "highest"
) -> Float[Array, "b c"]:
    """max_k cos(x_i, W_jk): the cosine to the nearest of a class's K prototypes.

    Args:
        x: embeddings, of any norm.
        rows: K prototypes for each class, of any norm.
        precision: of the matrix product, as in jax.numpy.matmul; "default" lets accelerators round.

    Returns:
        Cosines, float32.

    References:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces,
        2020, eq. 2.
    """
    c, k, d = rows.shape
    cosines = cosine(x, rows.reshape(c * k, d), precision=precision)
    return jnp.max(cosines.reshape(-1, c, k), axis=2)


def normalize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """x/‖x‖, and 0 with derivative 0 where ‖x‖ < 1e-12: such an x has no direction.

    Args:
        x: vectors along the last axis.

    Returns:
        Unit vectors, float32.
    """
    x = _wide(x)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    safe = ~(square <= _SMALLEST_SQUARE)  # so written, NaN stays NaN and stops the training
    return jnp.where(safe, x * lax.rsqrt(jnp.where(safe, square, 1.0)), 0.0)


def norm(x: Float[Array, "*n d"]) -> Float[Array, "*n"]:
    """‖x‖, and 0 with derivative 0 where ‖x‖ < 1e-12: the scale of A-Softmax, per example.

    Args:
        x: vectors along the last axis.

    Returns:
        Norms, float32.
    """
    x = _wide(x)
    square = jnp.sum(x * x, axis=-1)
    safe = ~(square <= _SMALLEST_SQUARE)  # so written, NaN stays NaN and stops the training
    return jnp.where(safe, jnp.sqrt(jnp.where(safe, square, 1.0)), 0.0)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
