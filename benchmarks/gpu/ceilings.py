"""What the card can do at most: matrix products, a copy; and IResNet's convolutions one by one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.gpu import timing
from benchmarks.gpu.question import (
    OURS,
    Answer,
    Case,
    Contender,
    Held,
    Question,
    Remark,
    answered,
    words,
)
from marginface.losses import similarity
from marginface.models import iresnet, layers

_FAR_BELOW = 0.5  # of the best convolution's rate
_SHORT = 3e-5  # seconds in which a program is barely started


class Convolution(NamedTuple):
    """One of a network's convolutions; `edge` is that of its input, `count` how often it occurs."""

    name: str
    edge: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    count: int

    @property
    def flops(self) -> float:
        """Of one image, forward."""
        pixels = (self.edge // self.stride) ** 2
        return 2.0 * pixels * self.kernel**2 * self.inputs * self.outputs


def convolutions(depth: int, size: int) -> list[Convolution]:
    """IResNet's different convolutions."""
    first, edge = iresnet.CHANNELS[0], size
    found = [Convolution("conv", edge, 3, first, 3, 1, 1)]
    inputs = first
    stages = zip(iresnet.CHANNELS, iresnet.BLOCKS[depth], strict=True)
    for stage, (outputs, blocks) in enumerate(stages, 1):
        for name, *shape in (
            ("first", edge, inputs, outputs, 3, 1, 1),
            ("down", edge, outputs, outputs, 3, 2, 1),
            ("shortcut", edge, inputs, outputs, 1, 2, 1),
            ("rest", edge // 2, outputs, outputs, 3, 1, 2 * (blocks - 1)),
        ):
            if shape[-1]:
                found.append(Convolution(f"stage{stage}_{name}", *shape))
        inputs, edge = outputs, edge // 2
    return found


def forward_flops(depth: int, size: int, dim: int) -> float:
    """Of IResNet's products for one image: convolutions and the last dense layer."""
    dense = 2.0 * (size // 16) ** 2 * iresnet.CHANNELS[-1] * dim
    return sum(c.count * c.flops for c in convolutions(depth, size)) + dense


def _product_cases(*shapes: tuple[int, int, int]) -> Iterator[Case]:
    for m, k, n in shapes:
        for precision in ("bfloat16", "tf32", "highest"):
            yield {"what": "product", "m": m, "k": k, "n": n, "precision": precision}


def measure(case: Case) -> Answer:
    """A matrix product a bᵀ of random factors, or a copy of random numbers."""
    keys = jax.random.split(jax.random.key(0))
    if case["what"] == "copy":
        x = jax.random.normal(keys[0], (case["mib"] * 2**18,))
        negated = jax.jit(jnp.negative)  # a plain copy may be left out
        return Answer(timing.seconds(lambda: negated(x)), bytes=2.0 * x.nbytes)
    m, k, n = case["m"], case["k"], case["n"]
    kind = jnp.bfloat16 if case["precision"] == "bfloat16" else jnp.float32
    a = jax.random.normal(keys[0], (m, k), kind)
    b = jax.random.normal(keys[1], (n, k), kind)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        if kind == jnp.bfloat16:
            return a @ b.T
        return similarity.product(a, b, precision=case["precision"])

    program = jax.jit(product)  # called so it starts sooner than a program compiled ahead
    seconds = timing.seconds(lambda: program(a, b))
    return Answer(seconds, flops=2.0 * m * k * n, precision=case["precision"])


def convolve(case: Case) -> Answer:
    """A convolution as IResNet calls it, in bfloat16: forward, or the gradient of one operand."""
    conv = Convolution(*(case[field] for field in Convolution._fields[:-1]), count=1)
    shape = (case["batch"], conv.edge, conv.edge, conv.inputs)
    keys = jax.random.split(jax.random.key(0), 3)
    layer = layers.Conv(conv.outputs, conv.kernel, conv.stride, dtype=jnp.bfloat16)
    x = jax.random.normal(keys[0], shape, jnp.bfloat16)
    kernel = (conv.kernel, conv.kernel, conv.inputs, conv.outputs)
    params = {"params": {"kernel": jax.random.normal(keys[1], kernel)}}
    edge = conv.edge // conv.stride
    g = jax.random.normal(keys[2], (case["batch"], edge, edge, conv.outputs), jnp.bfloat16)

    def forward(x: jax.Array, params: Any, g: jax.Array) -> Any:
        return layer.apply(params, x)

    def of_input(x: jax.Array, params: Any, g: jax.Array) -> Any:
        return jax.vjp(lambda x: layer.apply(params, x), x)[1](g)

    def of_kernel(x: jax.Array, params: Any, g: jax.Array) -> Any:
        return jax.vjp(lambda params: layer.apply(params, x), params)[1](g)

    function = {"forward": forward, "input": of_input, "kernel": of_kernel}[case["pass"]]
    program = jax.jit(function)
    seconds = timing.seconds(lambda: program(x, params, g))
    return Answer(seconds, flops=case["batch"] * conv.flops, precision="bfloat16")


def _convolution_cases(depth: int, size: int, batch: int) -> Iterator[Case]:
    """The most expensive first."""
    everything = convolutions(depth, size)
    for conv in sorted(everything, key=lambda c: -c.count * c.flops):
        for one in ("forward", "input", "kernel"):
            if one == "input" and conv.name == "conv":
                continue  # images have no gradient
            yield {**conv._asdict(), "batch": batch, "pass": one}


def _far_below(answers: Sequence[Held], _: Mapping[str, float]) -> Iterator[Remark]:
    rated = [(a["flops"] / a["seconds"], a) for a in answered(answers) if a.get("flops")]
    if not rated:
        return

    def name(rate: float, answer: Held) -> str:
        found = words(answer["case"])
        return f"{found['name']} {found['pass']} {rate / 1e12:.4g}"

    best, fastest = max(rated, key=lambda pair: pair[0])
    slow = [
        name(rate, a)
        for rate, a in sorted(rated, key=lambda pair: pair[0])
        if rate < _FAR_BELOW * best and a["flops"] / best > _SHORT
    ]
    yield Remark(
        f"the best is {name(best, fastest)} TFLOP/s; below {_FAR_BELOW} of it, those too short to "
        f"tell left out: {', '.join(slow) or 'none'}"
    )


CEILINGS = Question(
    "ceilings",
    "Matrix products in bfloat16, TF32 and float32, and a copy within the device's memory.",
    60.0,
    [
        Contender(
            OURS,
            measure,
            [
                *_product_cases((8192, 8192, 8192)),
                {"what": "copy", "mib": 2048},
                *_product_cases((1024, 512, 65_536), (1024, 512, 1_000_000)),
            ],
            [*_product_cases((64, 128, 192)), {"what": "copy", "mib": 2}],
        )
    ],
)
CONVOLUTIONS = Question(
    "convolutions",
    "IResNet-50's convolutions one by one at 112×112, forward and both gradients, in bfloat16.",
    120.0,
    [
        Contender(
            OURS,
            convolve,
            list(_convolution_cases(50, 112, 256)),
            list(_convolution_cases(18, 32, 2))[:4],
        )
    ],
    remarks=_far_below,
)
