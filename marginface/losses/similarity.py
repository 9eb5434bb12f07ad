"""Similarities between embeddings and class rows: (x [b, d], rows [c, ...]) → [b, c].

All are computed in float32, whatever the inputs' type: a scale of 64 turns bfloat16's rounding of a
cosine into a quarter of a logit. Where a caller allows it, the factors of the product may be
rounded; docs/precision.md says what that costs.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from marginface.typing import Array, Float, PyTree

Precision = Literal["highest", "tf32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Rows = PyTree  # one array or several, each with the classes as its leading axis
Similarity = Callable[[Float[Array, "b d"], Rows], Float[Array, "b c"]]

_SMALLEST_SQUARE = 1e-24  # below it 1/‖x‖³ in the derivative overflows float32


class Linear(NamedTuple):
    """Rows of a linear classifier: weight [c, d] and bias [c]."""

    weight: Array
    bias: Array


def unbiased(weight: Float[Array, "c d"]) -> Linear:
    """W with a bias of 0 for each class, as `linear` starts."""
    return Linear(weight, jnp.zeros(len(weight)))


def cosine(
    x: Float[Array, "b d"], rows: Float[Array, "c d"], *, precision: Precision = "highest"
) -> Float[Array, "b c"]:
    """cos(x_i, W_j) = x_i·W_j / (‖x_i‖ ‖W_j‖), and 0 with derivative 0 where a norm is 0.

    Args:
        x: embeddings, of any norm.
        rows: prototypes W, of any norm.
        precision: of the matrix product, see `product`.

    Returns:
        Cosines, float32.
    """
    return product(normalize(x), normalize(rows), precision=precision)


def linear(
    x: Float[Array, "b d"], rows: Linear, *, precision: Precision = "highest"
) -> Float[Array, "b c"]:
    """W_j·x_i + b_j: the similarity of the plain softmax loss, with scale 1.

    Args:
        x: embeddings.
        rows: weight and bias.
        precision: of the matrix product, see `product`.

    Returns:
        Similarities, float32.
    """
    products = product(_wide(x), _wide(rows.weight), precision=precision)
    return products + _wide(rows.bias)


def dot(
    x: Float[Array, "b d"], rows: Float[Array, "c d"], *, precision: Precision = "highest"
) -> Float[Array, "b c"]:
    """W_j·x_i: the similarity of L-Softmax.

    Args:
        x: embeddings.
        rows: prototypes W.
        precision: of the matrix product, see `product`.

    Returns:
        Products, float32.
    """
    return product(_wide(x), _wide(rows), precision=precision)


def subcenter_cosine(
    x: Float[Array, "b d"], rows: Float[Array, "c k d"], *, precision: Precision = "highest"
) -> Float[Array, "b c"]:
    """max_k cos(x_i, W_jk): the cosine to the nearest of a class's K prototypes.

    Args:
        x: embeddings, of any norm.
        rows: K prototypes for each class, of any norm.
        precision: of the matrix product, see `product`.

    Returns:
        Cosines, float32.

    References:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces,
        2020, eq. 2.
    """
    c, k, d = rows.shape
    cosines = cosine(x, rows.reshape(c * k, d), precision=precision)
    return jnp.max(cosines.reshape(-1, c, k), axis=2)


def product(
    x: Float[Array, "b d"], w: Float[Array, "c d"], *, precision: Precision = "highest"
) -> Float[Array, "b c"]:
    """x Wᵀ, summed in float32; its factors, and those of its two gradients, rounded if so wanted.

    "highest" rounds nothing, "tf32" to 10 bits of mantissa, "bfloat16" to 7. A GPU multiplies such
    factors by units of their own; a CPU has none for TF32 and rounds before it multiplies; a TPU
    takes three bfloat16 products in place of TF32, which is no less exact.

    Args:
        x: float32.
        w: float32.
        precision: one of PRECISIONS.

    Returns:
        Products, float32.

    Raises:
        ValueError: another precision.
    """
    if precision == "highest":
        return jnp.matmul(x, w.T, precision="highest")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; known: {', '.join(PRECISIONS)}")
    return _rounded_product(x, w, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x: Array, w: Array, precision: Precision) -> Array:
    return _multiply(x, w, precision)


def _rounded_product_forward(x: Array, w: Array, precision: Precision) -> tuple[Array, tuple]:
    return _multiply(x, w, precision), (x, w)


def _rounded_product_backward(precision: Precision, factors: tuple, g: Array) -> tuple:
    x, w = factors
    return _multiply(g, w.T, precision), _multiply(g.T, x.T, precision)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def _multiply(a: Array, b: Array, precision: Precision) -> Array:
    """a bᵀ of rounded factors, summed in float32."""

    def dot(a: Array, b: Array, how: lax.PrecisionLike = None) -> Array:
        by_columns = (((1,), (1,)), ((), ()))
        return lax.dot_general(a, b, by_columns, how, preferred_element_type=jnp.float32)

    def emulated(a: Array, b: Array) -> Array:
        a, b = (lax.reduce_precision(f, exponent_bits=8, mantissa_bits=10) for f in (a, b))
        return dot(a, b, lax.Precision.HIGHEST)

    if precision == "bfloat16":
        return dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    return lax.platform_dependent(
        a,
        b,
        cpu=emulated,
        tpu=lambda a, b: dot(a, b, lax.Precision.HIGH),
        default=lambda a, b: dot(a, b, lax.DotAlgorithmPreset.TF32_TF32_F32),
    )


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
    return x * jnp.where(safe, lax.rsqrt(jnp.where(safe, square, 1.0)), 0.0)


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


class Kind(NamedTuple):
    """A similarity that a config may name.

    function: the similarity.
    rows: weight → the rows that are trained, where they are more than W.
    cosine: whether it is a cosine.
    subcenters: whether a class has several prototypes, rows [c, k, d].
    """

    function: Similarity
    rows: Callable | None = None
    cosine: bool = True
    subcenters: bool = False


SIMILARITIES = {
    "cosine": Kind(cosine),
    "linear": Kind(linear, rows=unbiased, cosine=False),
    "subcenter_cosine": Kind(subcenter_cosine, subcenters=True),
}
