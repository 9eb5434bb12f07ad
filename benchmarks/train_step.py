"""One training step of IResNet with ArcFace and SGD, beside the same network in PyTorch.

Float32 on CPU, bfloat16 on a GPU, on both sides; images are random and already on the device.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from marginface import sharding
from marginface.models import iresnet
from marginface.training import objective
from marginface.training import step as step_of

MARGIN, SCALE, CLASSES, DIM = 0.5, 64.0, 10_572, 512
RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4


def inputs(case: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Images [b, h, w, 3] in [-1, 1] and labels [b]."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (case["batch"], case["size"], case["size"], 3))
    return images.astype(np.float32), rng.integers(0, case.get("classes", CLASSES), case["batch"])


def ours(case: Mapping[str, Any]) -> common.Step:
    """What a run of experiments/arcface.py does at each step, metrics included."""
    from experiments import arcface  # here, so that the peers need no ml_collections

    images, labels = inputs(case)
    config = arcface.get_config(f"data=casia,model=ir{case['depth']},dim={DIM}")
    config.loss.margin_kw.m, config.loss.scale, config.loss.chunk_size = MARGIN, SCALE, 0
    config.optimizer.update(learning_rate=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    config.model.kw.update(dtype="bfloat16" if common.on_gpu() else "float32", dropout=0.0)
    mesh = sharding.make_mesh(1)
    made = step_of.make(
        config,
        model=iresnet.Model(embedding_dim=DIM, **config.model.kw),
        objective=objective.make(
            config, num_classes=CLASSES, embedding_dim=DIM, mesh=mesh, total_steps=config.steps
        ),
        mesh=mesh,
        image_shape=images.shape[1:],
        total_steps=config.steps,
    )
    hyper, seed = objective.hyper(config), jnp.int32(0)
    batch = sharding.put_batch(mesh, {"images": images, "labels": labels.astype(np.int32)})
    state = made.init(seed, hyper)

    def step() -> float:
        nonlocal state
        state, metrics = made.train(state, batch["images"], batch["labels"], hyper, seed)
        jax.block_until_ready(state)
        return float(metrics["loss/total"])

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
    prototypes = torch.randn(case.get("classes", CLASSES), DIM, device=place, requires_grad=True)
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
