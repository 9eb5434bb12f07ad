"""One training step of IResNet with ArcFace and SGD, beside the same network in PyTorch.

Float32 on CPU, bfloat16 on a GPU, on both sides; images are random and already on the device.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from marginface import class_losses, class_softmax, margins
from marginface.models import iresnet

MARGIN, SCALE, CLASSES, DIM = 0.5, 64.0, 10_572, 512
RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4


def inputs(case: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Images [b, h, w, 3] in [-1, 1] and labels [b]."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (case["batch"], case["size"], case["size"], 3))
    return images.astype(np.float32), rng.integers(0, CLASSES, case["batch"])


def ours(case: Mapping[str, Any]) -> common.Step:
    """marginface's network and loss, one jitted function."""
    images, labels = map(jnp.asarray, inputs(case))
    labels = labels.astype(jnp.int32)
    dtype = "bfloat16" if common.on_gpu() else "float32"
    model = iresnet.Model(depth=case["depth"], embedding_dim=DIM, dtype=dtype)
    optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))

    @jax.jit
    def start(key: jax.Array) -> tuple:
        variables = model.init(key, images[:1])
        prototypes = jax.random.normal(key, (CLASSES * DIM,)).reshape(CLASSES, DIM)
        params = {"network": variables["params"], "prototypes": prototypes}
        return params, variables["batch_stats"], optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state: tuple, images: jax.Array) -> tuple:
        params, stats, momentum = state

        def loss(params: Any) -> tuple:
            embeddings, update = model.apply(
                {"params": params["network"], "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            values = class_losses.margin_softmax(
                embeddings,
                labels,
                class_softmax.all_classes(params["prototypes"], CLASSES),
                margin=functools.partial(margins.additive_angular, m=MARGIN),
                scale=SCALE,
            )
            return values.loss.mean(), update["batch_stats"]

        (value, new_stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(gradient, momentum, params)
        return (optax.apply_updates(params, updates), new_stats, momentum), value

    state = start(jax.random.key(0))

    def step() -> float:
        nonlocal state
        state, value = train(state, images)
        jax.block_until_ready(state)
        return float(value)

    return step


def _torch(case: Mapping[str, Any], *, compiled: bool) -> common.Step:
    import torch
    from torch.nn import functional

    from benchmarks.torch_iresnet import IResNet

    place = "cuda" if common.on_gpu() else "cpu"
    torch.set_float32_matmul_precision("high")  # as JAX does
    torch.manual_seed(0)
    images, labels = (torch.tensor(a, device=place) for a in inputs(case))
    images = images.permute(0, 3, 1, 2)  # channels last in memory
    net = IResNet(case["depth"], case["size"], DIM).to(place)
    net.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    prototypes = torch.randn(CLASSES, DIM, device=place, requires_grad=True)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        [*params, prototypes], RATE, momentum=MOMENTUM, weight_decay=DECAY, fused=True
    )
    rows = torch.arange(len(labels), device=place)
    forward = torch.compile(net) if compiled else net

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(place, torch.bfloat16, enabled=place == "cuda"):
            embeddings = forward(images)
        normalized = functional.normalize(embeddings.float())
        cosines = functional.linear(normalized, functional.normalize(prototypes)).clamp(-1, 1)
        cosines[rows, labels] = (cosines[rows, labels].acos() + MARGIN).cos()
        value = functional.cross_entropy(cosines * SCALE, labels)
        value.backward()
        optimizer.step()
        if place == "cuda":
            torch.cuda.synchronize()
        return value.item()

    return step


def channels_last(case: Mapping[str, Any]) -> common.Step:
    """PyTorch, eager."""
    return _torch(case, compiled=False)


def channels_last_compiled(case: Mapping[str, Any]) -> common.Step:
    """PyTorch through torch.compile."""
    return _torch(case, compiled=True)


PEERS: dict[str, common.Build] = {"PyTorch channels-last": channels_last}
if common.on_gpu():
    PEERS["PyTorch channels-last, compiled"] = channels_last_compiled

BENCHMARK = common.Benchmark(
    name="train_step",
    cases=({"depth": 18, "size": 112, "batch": 32}, {"depth": 50, "size": 112, "batch": 32}),
    quick=1,
    ours=ours,
    peers=PEERS,
    rounds=(5, 11),
)

if __name__ == "__main__":
    common.main([BENCHMARK])
