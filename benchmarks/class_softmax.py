"""ArcFace over many classes, forward and backward, beside PyTorch's usual two forms of it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from marginface.losses import class_losses, class_softmax, margins

MARGIN, SCALE = 0.5, 64.0


def inputs(case: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings [b, d], labels [b] and prototypes [C, d], equal for every contender."""
    rng = np.random.default_rng(0)
    batch, dim, classes = case["batch"], case["dim"], case["classes"]
    embeddings = rng.standard_normal((batch, dim), np.float32)
    prototypes = rng.standard_normal((classes, dim), np.float32)
    return embeddings, rng.integers(0, classes, batch), prototypes


def ours(case: Mapping[str, Any]) -> common.Step:
    """marginface's form; chunk_size 0 is all at once, as in the experiments' configs."""
    embeddings, labels, prototypes = map(jnp.asarray, inputs(case))
    labels = labels.astype(jnp.int32)

    @jax.jit
    def gradient(embeddings: jax.Array, prototypes: jax.Array) -> tuple:
        def loss(embeddings: jax.Array, prototypes: jax.Array) -> jax.Array:
            return class_losses.margin_softmax(
                embeddings,
                labels,
                class_softmax.all_classes(prototypes, case["classes"]),
                margin=functools.partial(margins.additive_angular, m=MARGIN),
                scale=SCALE,
                chunk_size=case["chunk_size"] or None,
            ).loss.mean()

        return jax.value_and_grad(loss, argnums=(0, 1))(embeddings, prototypes)

    return lambda: float(jax.block_until_ready(gradient(embeddings, prototypes))[0])


def three_products(case: Mapping[str, Any]) -> common.Step:
    """x Wᵀ, G W and Gᵀ x alone, which every exact gradient needs."""
    return _products(case, again=False)


def four_products(case: Mapping[str, Any]) -> common.Step:
    """The same and x Wᵀ once more, which a walk needs that keeps no logits."""
    return _products(case, again=True)


def _products(case: Mapping[str, Any], *, again: bool) -> common.Step:
    embeddings, _, prototypes = map(jnp.asarray, inputs(case))

    @jax.jit
    def multiply(x: jax.Array, w: jax.Array) -> tuple:
        with jax.default_matmul_precision("highest"):  # as similarity.cosine
            g = x @ w.T
            once_more = (2 * x) @ w.T if again else None  # of other numbers: it is not left out
            return g @ w, g.T @ x, once_more

    def step() -> float:
        jax.block_until_ready(multiply(embeddings, prototypes))
        return 0.0

    return step


# prototypes → (the loss of embeddings and labels, the prototypes it keeps)
MakeLoss = Callable[[Any], tuple[Any, Any]]


def _torch_step(case: Mapping[str, Any], make_loss: MakeLoss) -> common.Step:
    import torch

    place = "cuda" if common.on_gpu() else "cpu"
    x, labels, prototypes = (torch.tensor(a, device=place) for a in inputs(case))
    return gradient_step(x, labels, prototypes, make_loss)


def gradient_step(x: Any, labels: Any, prototypes: Any, make_loss: MakeLoss) -> common.Step:
    """Forward and backward in PyTorch, of tensors that are on their device already."""
    import torch

    loss, w = make_loss(prototypes)
    x.requires_grad_()
    w.requires_grad_()

    def step() -> float:
        x.grad = w.grad = None
        value = loss(x, labels)
        value.backward()
        if x.is_cuda:
            torch.cuda.synchronize()
        return value.item()

    return step


def metric_learning(case: Mapping[str, Any]) -> common.Step:
    """pytorch-metric-learning's ArcFaceLoss."""
    return _torch_step(case, metric_learning_loss)


def metric_learning_loss(prototypes: Any) -> tuple[Any, Any]:
    """The loss with these prototypes [C, d]."""
    from pytorch_metric_learning import losses

    classes, dim = prototypes.shape
    loss = losses.ArcFaceLoss(1, dim, margin=float(np.rad2deg(MARGIN)), scale=SCALE)
    loss.num_classes = classes
    del loss.W
    loss.W = prototypes.T.contiguous()  # it keeps them as columns
    return loss, loss.W


def partial_fc(case: Mapping[str, Any]) -> common.Step:
    """What arcface_torch's Partial FC computes at sampling rate 1 on one device, step by step."""
    return _torch_step(case, partial_fc_loss)


def partial_fc_loss(prototypes: Any, *, autocast: bool = False) -> tuple[Any, Any]:
    """The loss with these prototypes [C, d].

    Its margin is written into the matrix of cosines, its softmax replaces the logits in place and
    is kept for the gradient, from which a dense one-hot matrix is taken. With `autocast` the
    cosines are products in bfloat16, made float32 at once, as it does with mixed precision.
    """
    import torch
    from torch.nn import functional

    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Any, labels: Any) -> Any:
            logits.sub_(logits.max(dim=1, keepdim=True)[0]).exp_()
            logits.div_(logits.sum(dim=1, keepdim=True))
            held = torch.where(labels != -1)[0]
            likelihood = torch.zeros(len(logits), 1, device=logits.device)
            likelihood[held] = logits[held].gather(1, labels[held])
            ctx.save_for_backward(held, logits, labels)
            return -likelihood.clamp_min(1e-30).log().mean()

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            held, softmax, labels = ctx.saved_tensors
            one_hot = torch.zeros(len(held), softmax.shape[1], device=softmax.device)
            one_hot.scatter_(1, labels[held], 1)
            softmax[held] -= one_hot
            softmax.div_(len(softmax))
            return softmax * cotangents[0].item(), None

    def loss(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = labels[:, None]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            cosines = functional.linear(functional.normalize(x), functional.normalize(prototypes))
        cosines = cosines.float()
        cosines = cosines.clamp(-1, 1)
        held = torch.where(labels != -1)[0]
        target = cosines[held, labels[held, 0]]
        sine = torch.sqrt(1 - target**2)
        moved = target * np.cos(MARGIN) - sine * np.sin(MARGIN)
        far = target > np.cos(np.pi - MARGIN)
        cosines[held, labels[held, 0]] = torch.where(far, moved, target - MARGIN * np.sin(MARGIN))
        return CrossEntropy.apply(cosines * SCALE, labels)

    return loss, prototypes


BENCHMARK = common.Benchmark(
    name="class_softmax",
    cases=(  # all at once, and in the chunks that loss.chunk_size=auto takes
        {"batch": 512, "dim": 512, "classes": 10_000, "chunk_size": 0},
        {"batch": 512, "dim": 512, "classes": 100_000, "chunk_size": 0},
        {"batch": 512, "dim": 512, "classes": 100_000, "chunk_size": 768},
        {"batch": 512, "dim": 512, "classes": 1_000_000, "chunk_size": 768},
    ),
    quick=3,
    ours=ours,
    peers={"pytorch-metric-learning": metric_learning, "arcface_torch Partial FC": partial_fc},
    rounds=(5, 15),
    floors={
        "the three matrix products alone": three_products,
        "the four matrix products alone": four_products,
    },
)

if __name__ == "__main__":
    common.main([BENCHMARK])
