"""Convolution, PReLU and batch normalisation in NHWC, shaped so that they are fast on CPU too."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from marginface.typing import Array, Float

Init = Callable[..., Array]


def normal(stddev: float) -> Init:
    """Gaussian start. Drawn flat: XLA compiles a draw of rank 4 several times more slowly."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return stddev * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return init


def he_normal(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Gaussian of variance 2 / fan_in (He et al., 2015)."""
    return normal((2.0 / math.prod(shape[:-1])) ** 0.5)(key, shape, dtype)


def uniform_fan_in(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Uniform within ±1/√fan_in."""
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


def _conv3x3(x: Array, kernel: Array, stride: int) -> Array:
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), None, None, dims)


def _plain_input_gradient(g: Array, kernel: Array) -> Array:
    n, h, w, _ = g.shape
    like = jax.ShapeDtypeStruct((n, 2 * h, 2 * w, kernel.shape[2]), g.dtype)
    (dx,) = jax.linear_transpose(lambda x: _conv3x3(x, kernel, 2), like)(g)
    return dx


def _phased_input_gradient(g: Array, kernel: Array) -> Array:
    """Even outputs of the transposed convolution see tap 1 only, odd ones taps 2 and 0."""
    n, h, w, _ = g.shape
    taps = (slice(1, 2), slice(2, None, -2))
    flipped = kernel.swapaxes(2, 3)

    def phase(row: int, column: int) -> Array:
        return lax.conv_general_dilated(
            g,
            flipped[taps[row], taps[column]],
            (1, 1),
            ((0, row), (0, column)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(n, 2 * h, 2 * w, kernel.shape[2])


@jax.custom_vjp
def conv3x3_stride2(
    x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "n h/2 w/2 o"]:
    """A 3×3 convolution with stride 2 and padding 1 whose input gradient is cheap on CPU.

    The usual input gradient is a convolution over an operand with a zero between all neighbours.
    CPU libraries multiply those zeros; four small convolutions, one per parity of the output's row
    and column, do not. Accelerators have kernels of their own for it and keep the usual form.

    Args:
        x: [n, h, w, i] with even h and w.
        kernel: [3, 3, i, o].

    Returns:
        [n, h / 2, w / 2, o].
    """
    return _conv3x3(x, kernel, 2)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return conv3x3_stride2(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dx = lax.platform_dependent(
        g, kernel, cpu=_phased_input_gradient, default=_plain_input_gradient
    )
    (dkernel,) = jax.linear_transpose(lambda k: _conv3x3(x, k, 2), kernel)(g)
    return dx, dkernel


conv3x3_stride2.defvjp(_forward, _backward)


class Conv(nn.Module):
    """A 3×3 (padding 1) or 1×1 convolution with stride 1 or 2; input sizes even where stride is 2.

    [n, h, w, i] → [n, h / stride, w / stride, features]. Parameters are float32.
    """

    features: int
    size: int = 3
    stride: int = 1
    use_bias: bool = False
    kernel_init: Init = he_normal
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h2 w2 o"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.size == 1:
            # A matrix product over the pixels it keeps: as fast as a convolution or faster.
            x = x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        elif self.stride == 1:
            x = _conv3x3(x, kernel, 1)
        else:
            x = conv3x3_stride2(x, kernel)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return x


class PReLU(nn.Module):
    """max(x, 0) + a·min(x, 0) with one learned slope a per channel, 0.25 at the start.

    References:
        He et al., "Delving Deep into Rectifiers", 2015, equation 1.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x >= 0, x, slope.astype(x.dtype) * x)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, in float32 inside, statistics float32.

    Under `jax.jit` with a sharded batch the statistics are those of the global batch.
    `use_scale=False` fixes the scale at 1 and keeps the bias.
    """

    train: bool
    use_scale: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return nn.BatchNorm(
            use_running_average=not self.train,
            momentum=0.9,
            epsilon=1e-5,
            use_scale=self.use_scale,
            dtype=self.dtype,
            name="norm",
        )(x)


def check_images(images: Array) -> None:
    """Raises a ValueError unless the images are [b, h, w, 3] with h and w divisible by 16."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] % 16 or images.shape[2] % 16:
        raise ValueError(
            f"images of shape {images.shape}: the networks need [b, h, w, 3] with h and w "
            "divisible by 16 (112 is usual)"
        )


def check_depth(family: str, depth: int, known: Iterable[int]) -> None:
    """Raises a ValueError that lists the known depths."""
    if depth not in known:
        raise ValueError(f"{family} has no depth {depth}: choose from {', '.join(map(str, known))}")
