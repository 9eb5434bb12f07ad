"""The plain residual networks of SphereFace."""

import flax.linen as nn
import jax.numpy as jnp

from marginface.models import layers
from marginface.typing import Array, Float

PAIRS = {4: (0, 0, 0, 0), 10: (0, 1, 2, 0), 20: (1, 2, 4, 1), 36: (2, 4, 8, 2), 64: (3, 8, 16, 3)}
CHANNELS = (64, 128, 256, 512)
NORMS = ("none", "batch")


class _Unit(nn.Module):
    """Convolution, norm if asked for, PReLU."""

    features: int
    stride: int
    norm: str
    train: bool
    kernel_init: layers.Init
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = layers.Conv(
            self.features,
            stride=self.stride,
            use_bias=self.norm == "none" and self.stride == 2,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        if self.norm == "batch":
            x = layers.BatchNorm(self.train, dtype=self.dtype, name="norm")(x)
        return layers.PReLU(name="prelu")(x)


class _Pair(nn.Module):
    """Two units with a shortcut around them."""

    features: int
    norm: str
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        # Without normalisation the branch must start near zero, or depth multiplies the variance.
        init = layers.normal(0.01) if self.norm == "none" else layers.he_normal
        y = x
        for i in (1, 2):
            y = _Unit(self.features, 1, self.norm, self.train, init, self.dtype, name=f"unit{i}")(y)
        return x + y


class Model(nn.Module):
    """SphereFace-4, 10, 20, 36 or 64: [b, h, w, 3] in [-1, 1] → [b, embedding_dim] float32.

    Four stages, each a stride-2 convolution (64, 128, 256, 512 channels) and its residual pairs,
    PReLU after every convolution, then one dense layer. With norm="batch" every layer, the
    embedding included, is followed by batch normalisation (not in the paper; trains with any loss).

    Attributes:
        depth: 4, 10, 20, 36 or 64.
        embedding_dim: length of an embedding.
        dtype: "float32" or "bfloat16", what the convolutions compute in. Parameters, statistics and
            the last layer stay float32.
        remat: recompute each residual pair in the backward pass instead of keeping it.
        width: multiplies all channel counts.
        dropout: rate before the dense layer.
        norm: "none" (the paper) or "batch".

    Raises:
        ValueError: unknown depth or norm, image size not divisible by 16.

    References:
        Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", 2017, table 2.
    """

    depth: int
    embedding_dim: int = 512
    dtype: str = "float32"
    remat: bool = False
    width: float = 1.0
    dropout: float = 0.0
    norm: str = "none"

    def __post_init__(self) -> None:
        layers.check_depth("SphereFace", self.depth, PAIRS)
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r}: choose from {', '.join(NORMS)}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], train: bool = False
    ) -> Float[Array, "b {self.embedding_dim}"]:
        layers.check_images(images)
        dtype = jnp.dtype(self.dtype)
        pair = nn.remat(_Pair) if self.remat else _Pair
        x = images
        for stage, (channels, pairs) in enumerate(zip(CHANNELS, PAIRS[self.depth], strict=True), 1):
            features = max(1, round(channels * self.width))
            x = _Unit(features, 2, self.norm, train, layers.he_normal, dtype, name=f"stage{stage}")(
                x
            )
            for i in range(1, pairs + 1):
                x = pair(features, self.norm, train, dtype, name=f"stage{stage}_pair{i}")(x)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(self.embedding_dim, kernel_init=layers.uniform_fan_in, name="embedding")(x)
        if self.norm == "batch":
            x = layers.BatchNorm(train, name="embedding_norm")(x)
        return x
