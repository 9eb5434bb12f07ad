"""RegularFace's Lr(W), value and gradient, beside pytorch-metric-learning's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from marginface import devices
from marginface.losses import class_softmax, regularizers


def inputs(case: Mapping[str, Any]) -> np.ndarray:
    """Prototypes [C, d], equal for every contender."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((case["classes"], case["dim"]), np.float32)


def ours(case: Mapping[str, Any]) -> common.Step:
    """marginface.losses.regularizers.exclusive, as loss.chunk_size=auto cuts it."""
    prototypes = jnp.asarray(inputs(case))
    size = devices.chunk_size_between("auto", classes=len(prototypes), device=jax.devices()[0])

    @jax.jit
    def gradient(w: jax.Array) -> tuple:
        def loss(w: jax.Array) -> jax.Array:
            classes = class_softmax.all_classes(w, case["classes"])
            return regularizers.exclusive(classes, chunk_size=size).mean()

        return jax.value_and_grad(loss)(w)

    return lambda: float(jax.block_until_ready(gradient(prototypes))[0])


def half_product(case: Mapping[str, Any]) -> common.Step:
    """W Wᵀ for half of the rows alone: every pair of classes once."""
    w = jnp.asarray(inputs(case))
    multiply = jax.jit(lambda w: jnp.matmul(w[: len(w) // 2], w.T, precision="highest"))

    def step() -> float:
        jax.block_until_ready(multiply(w))
        return 0.0

    return step


def metric_learning(case: Mapping[str, Any]) -> common.Step:
    """pytorch-metric-learning's RegularFaceRegularizer."""
    import torch
    from pytorch_metric_learning import regularizers as peers

    place = "cuda" if common.on_gpu() else "cpu"
    w = torch.tensor(inputs(case), device=place, requires_grad=True)
    regularizer = peers.RegularFaceRegularizer()

    def step() -> float:
        w.grad = None
        value = regularizer(w)
        value.backward()
        if place == "cuda":
            torch.cuda.synchronize()
        return value.item()

    return step


BENCHMARK = common.Benchmark(
    name="exclusive",
    cases=({"dim": 512, "classes": 10_000}, {"dim": 512, "classes": 20_000}),
    quick=1,
    ours=ours,
    peers={"pytorch-metric-learning": metric_learning},
    rounds=(5, 7),
    floors={"half of the product alone": half_product},
)

if __name__ == "__main__":
    common.main([BENCHMARK])
