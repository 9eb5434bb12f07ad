"""Every experiment's loss on rendered faces: it compiles, stays finite, and equals the CPU's."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu import networks, settings, timing
from benchmarks.gpu.faces import _render, numbers
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

ON_CPU = "on CPU"
STEPS = 20
# The network's products are rounded to TF32 on a GPU, and every step builds on the one before.
_FIRST, _LATER = 5e-3, 0.3  # relative differences of the loss that are taken for equal
_EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
NAMES = tuple(
    path.stem
    for path in sorted(_EXPERIMENTS.glob("*.py"))
    if path.stem not in ("__init__", "common")
)
_SMOKE = ("arcface_regular", "triplet", "magface")  # a regulariser, pairs, a loss with moving state


def _batches(config: Any, count: int) -> list[dict[str, np.ndarray]]:
    """Random photographs; where pairs are asked for, so many of each person."""
    rng, people = np.random.default_rng(0), config.data.kw.identities
    found = [numbers(rng, config.batch_size, people) for _ in range(count)]
    if each := config.data.images_per_identity:
        for batch in found:
            chosen = rng.choice(people, config.batch_size // each, replace=False).repeat(each)
            batch.update(identity=chosen.astype(np.uint32), label=chosen.astype(np.int32))
    return found


def measure(case: Case) -> Answer:
    """Twenty steps of an experiment's small variant; the losses of all, the time of the later."""
    config = settings.experiment(case["experiment"], "data=small,model=sphereface4")
    config.batch_size = case["batch"]
    config.data.kw.image_size = case["size"]
    model = networks.network(
        config.model.name, embedding_dim=config.model.embedding_dim, **config.model.kw
    )
    training = networks.Training(config, model, config.data.kw.identities, case["size"])
    prepared = []
    for batch in _batches(config, case["steps"]):
        prepared.append(_render(training.place(batch), case["size"]))
    losses = [float(training.step(*batch)["loss/total"]) for batch in prepared]
    if bad := [i for i, value in enumerate(losses, 1) if not math.isfinite(value)]:
        raise FloatingPointError(f"step {bad[0]}: the loss is {losses[bad[0] - 1]}")
    batches = iter(prepared * 1000)
    seconds = timing.seconds(lambda: training.step(*next(batches)))
    figures = {f"loss_{i}": value for i, value in enumerate(losses, 1)}
    return Answer(seconds, images=case["batch"], figures=figures)


def _equal(answers: Sequence[Held], _: Mapping[str, float]) -> Iterator[Remark]:
    """Compares each experiment's losses with the CPU's."""
    cpu = {a["case"]: a.get("figures", {}) for a in answered(answers, ON_CPU)}
    largest, apart = {"first": (0.0, ""), "later": (0.0, "")}, []
    for ours in answered(answers, OURS):
        theirs, name = cpu.get(ours["case"], {}), words(ours["case"])["experiment"]
        for key, value in ours.get("figures", {}).items():
            if key not in theirs:
                continue
            difference = abs(value - theirs[key]) / max(abs(theirs[key]), 1e-3)
            which = "first" if key == "loss_1" else "later"
            largest[which] = max(largest[which], (difference, name))
            if difference > (_FIRST if which == "first" else _LATER):
                apart.append(f"{name} {key} {difference:.2g}")
    for which, (difference, name) in largest.items():
        if name:
            yield Remark(
                f"{which} steps differ from the CPU's by at most {difference:.2g} ({name})"
            )
    if apart:
        named = ", ".join(apart[:5]) + (f" and {len(apart) - 5} more" if len(apart) > 5 else "")
        yield Remark(f"unlike the CPU's: {named}", good=False)


def _cases(names: Sequence[str], **setting: Any) -> list[Case]:
    return [{"experiment": name, **setting} for name in names]


_FULL = _cases(NAMES, size=32, batch=128, steps=STEPS)
_TINY = _cases(_SMOKE, size=16, batch=8, steps=2)
LOSSES = Question(
    "losses",
    f"The losses of all {len(NAMES)} experiments on rendered faces: {STEPS} steps, finite, equal "
    "to the CPU's, images a second.",
    360.0,
    [
        Contender(OURS, measure, _FULL, _TINY),
        Contender(
            ON_CPU,
            measure,
            _FULL,
            _TINY,
            kind="cpu",
            environment={"JAX_PLATFORMS": "cpu"},
        ),
    ],
    ("experiment",),
    _equal,
)
