"""Rendered faces: how many a second, and whether drawing them hides behind training."""

import collections
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import networks, settings, timing
from benchmarks.gpu.question import OURS, Answer, Case, Contender, Held, Question, Remark, fastest
from marginface.data.readers import synthetic

_STEPS = 4  # of the loop in one sample


def numbers(rng: np.random.Generator, batch: int, classes: int) -> dict[str, np.ndarray]:
    """A batch of records of random people and photographs, as the pipeline gives them."""
    identity = rng.integers(0, classes, batch)
    return {
        "identity": identity.astype(np.uint32),
        "sample": rng.integers(0, 2**20, batch).astype(np.uint32),
        "label": identity.astype(np.int32),
    }


def _render(batch: Mapping[str, Any], size: int) -> tuple[jax.Array, Any]:
    images = synthetic.render(0, batch["identity"], batch["sample"], size=size, difficulty=0.8)
    return images, batch["label"]


def render(case: Case) -> Answer:
    """Drawing alone, from numbers on the host to images on the device."""
    rng = np.random.default_rng(0)
    batches = itertools.cycle([numbers(rng, case["batch"], 10_000) for _ in range(8)])
    seconds = timing.seconds(lambda: _render(next(batches), case["size"]))
    return Answer(seconds, images=case["batch"])


@functools.cache
def _training(
    *, network: str, depth: int, width: float, size: int, batch: int, classes: int
) -> networks.Training:
    """Compiled once for all that is done with it."""
    kw = {"dtype": networks.dtype(), "remat": False}
    model = networks.network(network, depth=depth, width=width, embedding_dim=128, **kw)
    return networks.Training(settings.arcface(batch=batch, dim=128, **kw), model, classes, size)


def loop(case: Case) -> Answer:
    """Steps as train.py does them: two are under way while the figures of one are read."""
    size, classes = case["size"], case["classes"]
    training = _training(**{k: v for k, v in case.items() if k != "what"})
    rng = np.random.default_rng(0)
    prepare = jax.jit(lambda batch: _render(batch, size))
    held = prepare(training.place(numbers(rng, case["batch"], classes)))
    pending: collections.deque = collections.deque()

    def settle(keep: int) -> None:
        while len(pending) > keep:
            figures = pending.popleft()
            if figures and not np.isfinite(float(figures["loss/total"])):
                raise FloatingPointError("the loss is not finite")
            jax.block_until_ready(figures)

    def steps() -> None:
        for _ in range(_STEPS):
            if case["what"] == "train":
                images, labels = held
            else:
                placed = training.place(numbers(rng, case["batch"], classes))
                images, labels = prepare(placed)
            if case["what"] == "render":
                pending.append(())
                jax.block_until_ready(images)
            else:
                pending.append(training.step(images, labels))
            settle(keep=2)
        settle(keep=0)

    seconds = timing.seconds(steps, lambda _: None) / _STEPS
    return Answer(seconds, images=case["batch"])


def _loop_cases(**setting: Any) -> list[Case]:
    return [{"what": what, **setting} for what in ("train", "both", "render")]


def _remarks(answers: Sequence[Held], _: Mapping[str, float]) -> Iterator[Remark]:
    for size in (48, 112):
        found = [a for a in answers if a.get("images") and f"what=faces size={size} " in a["case"]]
        if found:
            best = max(found, key=lambda a: a["images"] / a["seconds"])
            rate = best["images"] / best["seconds"]
            yield Remark(f"{rate:,.0f} faces a second at {size}×{size} (goal 100,000)")
    train, both, render = (
        fastest(answers, OURS, what=what, size=112) for what in ("train", "both", "render")
    )
    if train and both and render:
        seen = (both["seconds"] - train["seconds"]) / render["seconds"]
        yield Remark(f"in the loop {seen:.2f} of the time to draw a batch adds to the step")


def answer(case: Case) -> Answer:
    """Faces alone, or a loop."""
    return render(case) if case["what"] == "faces" else loop(case)


FACES = Question(
    "faces",
    "Rendered faces a second at 48×48 and 112×112; does drawing hide behind training?",
    120.0,
    [
        Contender(
            OURS,
            answer,
            [
                *({"what": "faces", "size": s, "batch": b} for s in (112, 48) for b in (1024, 256)),
                *_loop_cases(
                    network="iresnet", depth=18, width=1.0, size=112, batch=512, classes=10_000
                ),
                *({"what": "faces", "size": s, "batch": 4096} for s in (48, 112)),
            ],
            [
                {"what": "faces", "size": 16, "batch": 8},
                *_loop_cases(
                    network="sphereface", depth=4, width=0.0625, size=16, batch=8, classes=40
                ),
            ],
        )
    ],
    remarks=_remarks,
)
