"""ArcFace over many classes, forward and backward, beside PyTorch's usual two forms of it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from marginface import class_softmax, margins

MARGIN, SCALE = 0.5, 64.0


def inputs(case: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings [b, d], labels [b] and prototypes [C, d], equal for every contender."""
    rng = np.random.default_rng(0)
    batch, dim, classes = case["batch"], case["dim"], case["classes"]
    embeddings = rng.standard_normal((batch, dim), np.float32)
    prototypes = rng.standard_normal((classes, dim), np.float32)
    return embeddings, rng.integers(0, classes, batch), prototypes


def ours(case: Mapping[str, Any]) -> common.Step:
    """marginface.class_softmax; chunk_size 0 is all at once, as in the experiments' configs."""
    embeddings, labels, prototypes = map(jnp.asarray, inputs(case))
    labels = labels.astype(jnp.int32)

    @jax.jit
    def gradient(embeddings: jax.Array, prototypes: jax.Array) -> tuple:
        def loss(embeddings: jax.Array, prototypes: jax.Array) -> jax.Array:
            return class_softmax.margin_softmax(
                embeddings,
                labels,
                class_softmax.all_classes(prototypes, case["classes"]),
                margin=functools.partial(margins.additive_angular, m=MARGIN),
                scale=SCALE,
                chunk_size=case["chunk_size"] or None,
            ).mean()

        return jax.value_and_grad(loss, argnums=(0, 1))(embeddings, prototypes)

    return lambda: float(jax.block_until_ready(gradient(embeddings, prototypes))[0])


def _torch_step(
    case: Mapping[str, Any], make_loss: Callable[[Any], tuple[Any, Any]]
) -> common.Step:
    """make_loss: prototypes → (the loss of embeddings and labels, the prototypes it keeps)."""
    import torch

    place = "cuda" if common.on_gpu() else "cpu"
    x, labels, prototypes = (torch.tensor(a, device=place) for a in inputs(case))
    loss, w = make_loss(prototypes)
    x.requires_grad_()
    w.requires_grad_()

    def step() -> float:
        x.grad = w.grad = None
        value = loss(x, labels)
        value.backward()
        if place == "cuda":
            torch.cuda.synchronize()
        return value.item()

    return step


def metric_learning(case: Mapping[str, Any]) -> common.Step:
    """pytorch-metric-learning's ArcFaceLoss."""
    from pytorch_metric_learning import losses

    def make_loss(prototypes: Any) -> tuple[Any, Any]:
        loss = losses.ArcFaceLoss(1, case["dim"], margin=float(np.rad2deg(MARGIN)), scale=SCALE)
        loss.num_classes = case["classes"]
        del loss.W
        loss.W = prototypes.T.contiguous()  # it keeps them as columns
        return loss, loss.W

    return _torch_step(case, make_loss)


def full_logits(case: Mapping[str, Any]) -> common.Step:
    """Normalise, one matrix product, margin on the target logits in place, cross-entropy."""
    import torch
    from torch.nn import functional

    def make_loss(prototypes: torch.Tensor) -> tuple[Any, torch.Tensor]:
        def loss(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            cosines = functional.linear(functional.normalize(x), functional.normalize(prototypes))
            cosines = cosines.clamp(-1, 1)
            rows = torch.arange(len(labels), device=labels.device)
            cosines[rows, labels] = (cosines[rows, labels].acos() + MARGIN).cos()
            return functional.cross_entropy(cosines * SCALE, labels)

        return loss, prototypes

    return _torch_step(case, make_loss)


BENCHMARK = common.Benchmark(
    name="class_softmax",
    cases=(  # the experiments' own chunk sizes: 0 on small data sets, 4096 in the published setting
        {"batch": 512, "dim": 512, "classes": 10_000, "chunk_size": 0},
        {"batch": 512, "dim": 512, "classes": 100_000, "chunk_size": 4096},
        {"batch": 512, "dim": 512, "classes": 1_000_000, "chunk_size": 4096},
    ),
    quick=2,
    ours=ours,
    peers={"pytorch-metric-learning": metric_learning, "Partial FC form": full_logits},
    rounds=(3, 7),
)

if __name__ == "__main__":
    common.main([BENCHMARK])
