"""The improved residual networks that ArcFace's authors train."""

import flax.linen as nn
import jax.numpy as jnp

from marginface.models import layers
from marginface.typing import Array, Float

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
CHANNELS = (64, 128, 256, 512)

_conv_init = layers.normal(0.1)


class _Block(nn.Module):
    """BN, conv, BN, PReLU, conv (strided), BN, plus the input or its 1×1 projection."""

    features: int
    stride: int
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        def norm(name: str) -> layers.BatchNorm:
            return layers.BatchNorm(self.train, dtype=self.dtype, name=name)

        def conv(name: str, size: int, stride: int) -> layers.Conv:
            return layers.Conv(
                self.features,
                size,
                stride,
                kernel_init=_conv_init,
                dtype=self.dtype,
                name=name,
            )

        y = conv("conv1", 3, 1)(norm("norm1")(x))
        y = layers.PReLU(name="prelu")(norm("norm2")(y))
        y = norm("norm3")(conv("conv2", 3, self.stride)(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = norm("shortcut_norm")(conv("shortcut", 1, self.stride)(x))
        return x + y


class Model(nn.Module):
    """IResNet-18, 34, 50 or 100: [b, h, w, 3] in [-1, 1] → [b, embedding_dim] float32.

    A 3×3 convolution at full resolution, four stages of blocks whose first has stride 2, batch
    normalisation, one dense layer, and batch normalisation with the scale fixed at 1.

    Attributes:
        depth: 18, 34, 50 or 100.
        embedding_dim: length of an embedding.
        dtype: "float32" or "bfloat16", what the convolutions compute in. Parameters, statistics and
            the last layer stay float32.
        remat: recompute each block in the backward pass instead of keeping it.
        width: multiplies all channel counts.
        dropout: rate before the dense layer.

    Raises:
        ValueError: unknown depth, image size not divisible by 16.

    References:
        Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019,
        section 3.1; blocks from Duta et al., "Improved Residual Networks for Image and Video
        Recognition", 2020.
    """

    depth: int
    embedding_dim: int = 512
    dtype: str = "float32"
    remat: bool = False
    width: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        layers.check_depth("IResNet", self.depth, BLOCKS)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], train: bool = False
    ) -> Float[Array, "b {self.embedding_dim}"]:
        layers.check_images(images)
        dtype = jnp.dtype(self.dtype)
        widths = [max(1, round(channels * self.width)) for channels in CHANNELS]
        block = nn.remat(_Block) if self.remat else _Block

        x = layers.Conv(widths[0], kernel_init=_conv_init, dtype=dtype, name="conv")(images)
        x = layers.PReLU(name="prelu")(layers.BatchNorm(train, dtype=dtype, name="norm")(x))
        for stage, (features, blocks) in enumerate(zip(widths, BLOCKS[self.depth], strict=True), 1):
            for i in range(1, blocks + 1):
                stride = 2 if i == 1 else 1
                x = block(features, stride, train, dtype, name=f"stage{stage}_block{i}")(x)
        x = layers.BatchNorm(train, dtype=dtype, name="last_norm")(x)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(
            self.embedding_dim,
            kernel_init=layers.uniform_fan_in,
            bias_init=nn.initializers.zeros,
            name="embedding",
        )(x)
        return layers.BatchNorm(train, use_scale=False, name="embedding_norm")(x)
