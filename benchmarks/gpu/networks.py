"""The train step of IResNet with ArcFace over 100,000 classes, beside PyTorch's."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import settings, timing
from benchmarks.gpu.ceilings import forward_flops
from benchmarks.gpu.question import (
    OURS,
    Answer,
    Case,
    Contender,
    Held,
    Question,
    Remark,
    fastest,
    others,
)
from marginface import sharding
from marginface.training import objective
from marginface.training import step as step_of

DIM = 512
TOTAL = 1000  # updates of the run that the schedule thinks it is in
EAGER, COMPILED = "PyTorch channels-last", "PyTorch channels-last, compiled"


class Training:
    """A run's train step on one device, and its state.

    Compiled `ahead` it tells its memory, and starts later than a run's: that counts where steps
    are short.
    """

    def __init__(
        self, config: Any, model: Any, classes: int, size: int, *, ahead: bool = False
    ) -> None:
        self.mesh = sharding.make_mesh(1)
        self.batch = config.batch_size
        losses = objective.make(
            config,
            num_classes=classes,
            embedding_dim=model.embedding_dim,
            mesh=self.mesh,
            total_steps=TOTAL,
        )
        made = step_of.make(
            config,
            model=model,
            objective=losses,
            mesh=self.mesh,
            image_shape=(size, size, 3),
            total_steps=TOTAL,
        )
        self._hyper, self._seed = objective.hyper(config), jnp.int32(0)
        self.program: Any = made.train
        if ahead:
            images = jax.ShapeDtypeStruct((self.batch, size, size, 3), jnp.float32)
            labels = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
            lowered = self.program.lower(made.like, images, labels, self._hyper, self._seed)
            self.program = lowered.compile()
        self.state = made.init(self._seed, self._hyper)

    def step(self, images: Any, labels: Any) -> dict[str, jax.Array]:
        """One update; returns its figures."""
        self.state, figures = self.program(self.state, images, labels, self._hyper, self._seed)
        return figures

    def place(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """A batch on the device."""
        return sharding.put_batch(self.mesh, batch)


def network(name: str, **kw: Any) -> Any:
    """A network of marginface.models."""
    return importlib.import_module(f"marginface.models.{name}").Model(**kw)


def dtype() -> str:
    """bfloat16, but float32 on CPU, which is slow at it."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def arcface(case: Case) -> Training:
    """The step that a case asks for."""
    kw = {"dtype": dtype(), "remat": bool(case.get("remat"))}
    model = network("iresnet", depth=case["depth"], embedding_dim=DIM, **kw)
    config = settings.arcface(batch=case["batch"], dim=DIM, **kw)
    return Training(config, model, case["classes"], case["size"], ahead=True)


def _flops(case: Case) -> float:
    """Forward and two gradients of the network, and of the product with all prototypes."""
    head = 2.0 * DIM * case["classes"]
    return 3.0 * case["batch"] * (forward_flops(case["depth"], case["size"], DIM) + head)


def measure(case: Case) -> Answer:
    """What a run does at each step, figures included; images are on the device."""
    training = arcface(case)
    keys = jax.random.split(jax.random.key(1))
    shape = (case["batch"], case["size"], case["size"], 3)
    images = jax.random.uniform(keys[0], shape, minval=-1.0, maxval=1.0)
    labels = jax.random.randint(keys[1], (case["batch"],), 0, case["classes"])
    by_batch = training.place({"images": images, "labels": labels})
    images, labels = by_batch["images"], by_batch["labels"]
    seconds = timing.seconds(lambda: training.step(images, labels))
    loss = float(training.step(images, labels)["loss/total"])
    return Answer(
        seconds,
        timing.mib(training.program),
        _flops(case),
        "bfloat16" if dtype() == "bfloat16" else "highest",
        images=case["batch"],
        figures={"loss": loss},
    )


def _in_torch(name: str) -> Callable[[Case], Answer]:
    def answer(case: Case) -> Answer:
        import torch

        # Not above: it asks JAX what it computes on, and the queue must keep off the card.
        from benchmarks import train_step

        build = getattr(train_step, name)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step = build(case)
        seconds = timing.seconds(step, lambda _: None)
        mib = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
        return Answer(seconds, mib, _flops(case), "bfloat16", images=case["batch"])

    return answer


def _cases(depth: int, *batches: int, **more: Any) -> list[Case]:
    return [
        {"depth": depth, "size": 112, "batch": batch, "classes": 100_000, **more}
        for batch in batches
    ]


def _goal(answers: Sequence[Held], peaks: Mapping[str, float]) -> Iterator[Remark]:
    for depth in (18, 50, 100):
        ours = [
            a
            for batch in (256, 512, 1024)
            if (a := fastest(answers, OURS, depth=depth, batch=batch, size=112))
        ]
        if not ours:
            continue
        best = min(ours, key=lambda a: a["seconds"] / a.get("images", 1))
        said = [f"IResNet-{depth}: most images a second with {best['case']}"]
        batch = best["case"].split("batch=")[1].split()[0]
        if theirs := fastest(others(answers), depth=depth, batch=batch, size=112):
            ratio = theirs["seconds"] / best["seconds"]
            said.append(f"{ratio:.2f} × {theirs['contender']} (goal 1.2)")
        if best.get("flops") and (peak := peaks.get("bfloat16")):
            said.append(f"{best['flops'] / best['seconds'] / peak:.2f} of the peak (goal 0.45)")
        yield Remark(", ".join(said))


def _question(
    name: str,
    asks: str,
    limit: float,
    ours: Sequence[Case],
    eager: Sequence[Case],
    compiled: Sequence[Case],
    smoke_remat: bool,
) -> Question:
    small = {"depth": 18, "size": 32, "batch": 4, "classes": 300}
    return Question(
        name,
        f"Train step at 112×112, 100,000 classes, bfloat16, beside PyTorch: {asks}.",
        limit,
        [
            Contender(OURS, measure, ours, [small | {"remat": smoke_remat}]),
            Contender(EAGER, _in_torch("channels_last"), eager, [small], ("torch",), "torch"),
            Contender(
                COMPILED,
                _in_torch("channels_last_compiled"),
                compiled,
                [],  # a compiler for it is not everywhere
                ("torch",),
                "torch",
            ),
        ],
        ("depth", "size", "batch"),
        _goal,
    )


# What is compiled for each case takes longer than what is measured: the rest comes last.
TRAIN_IR50 = _question(
    "train_ir50",
    "IResNet-50",
    300.0,
    [*_cases(50, 512, 256, remat=False), *_cases(50, 512, remat=True)],
    _cases(50, 512, 256),
    _cases(50, 512),
    False,
)
TRAIN_OTHERS = _question(
    "train_others",
    "IResNet-18 and -100, and IResNet-50's other cases",
    400.0,
    [
        *_cases(50, 1024, remat=False),
        *_cases(100, 512, 256, remat=False),
        *_cases(18, 512, 1024, 256, remat=False),
        *_cases(50, 1024, 256, remat=True),
        *_cases(100, 1024, 512, 256, remat=True),
        *_cases(100, 1024, remat=False),
        *_cases(18, 1024, 512, 256, remat=True),
    ],
    [*_cases(50, 1024), *_cases(100, 512, 256, 1024), *_cases(18, 512, 1024, 256)],
    [*_cases(100, 512), *_cases(18, 512)],
    True,
)
