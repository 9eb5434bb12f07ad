"""What walks over all classes: the class softmax, ten million classes, Lr(W)."""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import class_softmax as beside
from benchmarks.gpu import networks, timing
from benchmarks.gpu.ceilings import forward_flops
from benchmarks.gpu.question import (
    OURS,
    AbsentError,
    Answer,
    Case,
    Contender,
    Held,
    Question,
    Remark,
    answered,
    fastest,
)
from marginface import devices
from marginface.losses import class_losses, class_softmax, margins, regularizers
from marginface.losses.similarity import PRECISIONS

DIM = 512
CHUNKS = (8192, 16_384, 65_536, 32_768, 4096, 2048)
PARTIAL_FC = "arcface_torch Partial FC"
MOMENTUM, RATE = 0.9, 0.1
HOLDS = tuple(range(500_000, 10_000_001, 250_000))  # among these the most that fits is sought


def _drawn(classes: int, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings [b, d], labels [b], prototypes [C, d], drawn on the device."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, DIM))
    return x, jax.random.randint(keys[1], (batch,), 0, classes), rows(keys[2], classes)


@functools.partial(jax.jit, static_argnums=1)
def rows(key: jax.Array, classes: int) -> jax.Array:
    """Random prototypes [C, d], drawn part by part: the bits of all would be as large as they."""
    parts = next(n for n in (1000, 100, 10, 1) if classes % n == 0)
    drawn = jax.lax.map(
        lambda key: 0.01 * jax.random.normal(key, (classes // parts, DIM)),
        jax.random.split(key, parts),
    )
    return drawn.reshape(classes, DIM)


def _flops(case: Case) -> float:
    """Of the three products that every exact gradient needs; a walk in chunks takes a fourth."""
    return 3.0 * 2.0 * case["batch"] * DIM * case["classes"]


def _loss(x: Any, w: Any, labels: Any, *, chunk_size: int | None, precision: str) -> jax.Array:
    return class_losses.margin_softmax(
        x,
        labels,
        class_softmax.all_classes(w, w.shape[0]),
        margin=functools.partial(margins.additive_angular, m=beside.MARGIN),
        scale=beside.SCALE,
        chunk_size=chunk_size,
        precision=precision,  # ty: ignore[invalid-argument-type]
    ).loss.mean()


def softmax(case: Case) -> Answer:
    """Value and both gradients of ArcFace; chunk_size 0 is all at once."""
    x, labels, w = _drawn(case["classes"], case["batch"])
    loss = functools.partial(
        _loss, chunk_size=case["chunk_size"] or None, precision=case["precision"]
    )
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, w, labels).compile()
    seconds = timing.seconds(lambda: program(x, w, labels))
    return Answer(seconds, timing.mib(program), _flops(case), case["precision"])


def _torch_place() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_drawn(classes: int, batch: int) -> tuple[Any, Any, Any]:
    import torch

    place = _torch_place()
    if place == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    x = torch.randn(batch, DIM, device=place)
    labels = torch.randint(0, classes, (batch,), device=place)
    return x, labels, torch.randn(classes, DIM, device=place)


def _torch_mib() -> float | None:
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def _in_torch(case: Case, make_loss: beside.MakeLoss) -> Answer:
    import torch

    # TF32 is what "high" stands for.
    how = "highest" if case["precision"] == "highest" else "high"
    torch.set_float32_matmul_precision(how)
    step = beside.gradient_step(*_torch_drawn(case["classes"], case["batch"]), make_loss)
    seconds = timing.seconds(step, lambda _: None)
    return Answer(seconds, _torch_mib(), _flops(case), case["precision"])


def partial_fc(case: Case) -> Answer:
    """Partial FC's steps at sampling rate 1."""
    mixed = case["precision"] == "bfloat16"
    return _in_torch(case, functools.partial(beside.partial_fc_loss, autocast=mixed))


def metric_learning(case: Case) -> Answer:
    """pytorch-metric-learning's ArcFaceLoss."""
    return _in_torch(case, beside.metric_learning_loss)


def _without_logits(cross_entropy: Callable[[Any, Any, Any], Any]) -> beside.MakeLoss:
    """NormFace by a function of (embeddings, classifier, labels): such a library has no margin."""
    from torch.nn import functional

    if _torch_place() != "cuda":
        raise AbsentError("its kernels need a GPU")

    def make_loss(prototypes: Any) -> tuple[Any, Any]:
        def loss(x: Any, labels: Any) -> Any:
            scaled = functional.normalize(x) * beside.SCALE
            return cross_entropy(
                scaled.bfloat16(), functional.normalize(prototypes).bfloat16(), labels
            )

        return loss, prototypes

    return make_loss


def cut_cross_entropy(case: Case) -> Answer:
    """Apple's cut-cross-entropy, without margin."""
    import cut_cross_entropy as library  # ty: ignore[import-not-found]

    return _in_torch(case, _without_logits(library.linear_cross_entropy))


def liger(case: Case) -> Answer:
    """Liger's fused linear cross-entropy, without margin."""
    from liger_kernel.transformers import (  # ty: ignore[import-not-found]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss()
    return _in_torch(case, _without_logits(lambda x, w, labels: loss(w, x, labels)))


def _softmax_cases(classes: int, batch: int, chunks: Sequence[int]) -> Iterator[Case]:
    """The first chunk size and all at once in every precision first."""
    order = [chunks[0], 0, *chunks[1:]]
    for size in order:
        for precision in ("tf32", "bfloat16", "highest"):
            yield {
                "batch": batch,
                "classes": classes,
                "chunk_size": size,
                "precision": precision,
            }


def _softmax(name: str, classes: int, limit: float, goal: Callable | None = None) -> Question:
    def peers(classes: int, batch: int, *precisions: str) -> list[Case]:
        return [{"batch": batch, "classes": classes, "precision": p} for p in precisions]

    def contender(
        name: str, answer: Callable[[Case], Answer], *precisions: str, needs: Sequence[str] = ()
    ) -> Contender:
        full, smoke = peers(classes, 1024, *precisions), peers(classes // 1000, 8, precisions[0])
        return Contender(name, answer, full, smoke, ("torch", *needs), "torch")

    return Question(
        name,
        f"Class softmax (ArcFace) of {classes:,} classes, b = 1,024, d = 512, loss and gradients: "
        "all at once and in chunks, each precision; memory.",
        limit,
        [
            Contender(
                OURS,
                softmax,
                list(_softmax_cases(classes, 1024, CHUNKS)),
                list(_softmax_cases(classes // 1000, 8, (classes // 4000,)))[:4],
            ),
            contender(PARTIAL_FC, partial_fc, "tf32", "bfloat16", "highest"),
            contender(
                "pytorch-metric-learning",
                metric_learning,
                "tf32",
                "highest",
                needs=("pytorch_metric_learning",),
            ),
            contender(
                "cut_cross_entropy", cut_cross_entropy, "bfloat16", needs=("cut_cross_entropy",)
            ),
            contender("Liger", liger, "bfloat16", needs=("liger_kernel",)),
        ],
        ("classes", "batch", "precision"),
        goal or (lambda *_: ()),
    )


def _goal_1m(answers: Sequence[Held], peaks: Mapping[str, float]) -> Iterator[Remark]:
    for precision in PRECISIONS:
        ours = fastest(answers, OURS, classes=1_000_000, precision=precision)
        if not ours:
            continue
        said = [f"{precision}: fastest with {ours['case']}"]
        theirs = fastest(answers, PARTIAL_FC, classes=1_000_000, precision=precision)
        if theirs:
            said.append(f"{theirs['seconds'] / ours['seconds']:.2f} × Partial FC (goal 2)")
        if ours.get("flops") and (peak := peaks.get(precision)):
            share = ours["flops"] / ours["seconds"] / peak
            said.append(f"{share:.2f} of its peak (goal 0.60)")
        yield Remark(", ".join(said))


def ten_million(case: Case) -> Answer:
    """Forward, backward and SGD with momentum in one program that writes over what it is given.

    With network=0 there is none: the embeddings themselves are trained.
    """
    classes, batch, depth = case["classes"], case["batch"], case["network"]
    device = jax.devices()[0]
    x, labels, w = _drawn(classes, batch)
    size = devices.chunk_size("auto", examples=batch, classes=classes, device=device)
    cut = f"chunks of {size}" if size else "all at once"
    loss = functools.partial(_loss, chunk_size=size, precision=case["precision"])
    own, stats, embed = _network(depth, case.get("size", 0), x)

    def step(params: dict, momentum: dict, stats: Any, labels: jax.Array) -> tuple:
        def total(params: dict) -> tuple:
            embeddings, after = embed(params["network"], stats)
            return loss(embeddings, params["prototypes"], labels), after

        (value, after), found = jax.value_and_grad(total, has_aux=True)(params)
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, found)
        params = jax.tree.map(lambda p, m: p - RATE * m, params, momentum)
        return params, momentum, after, value

    params = {"network": own, "prototypes": w}
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, like, stats, labels).compile()
    momentum, value = jax.tree.map(jnp.zeros_like, params), jnp.nan
    kept = 3 * w.nbytes / 2**20
    del x, w, own

    def call() -> jax.Array:
        nonlocal params, momentum, stats, value
        params, momentum, stats, value = program(params, momentum, stats, labels)
        return value

    seconds = timing.seconds(call)
    if not jnp.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    found = device.memory_stats() or {}
    peak = found["peak_bytes_in_use"] / 2**20 if found else timing.mib(program)
    flops = _flops(case)
    if depth:
        flops += 3.0 * batch * forward_flops(depth, case["size"], DIM)
    return Answer(
        seconds,
        peak,
        flops,
        "" if depth else case["precision"],
        note=f"{cut}; W, its gradient and momentum are {kept:.0f} MiB",
        figures={"loss": float(value)},
    )


def _network(depth: int, size: int, x: jax.Array) -> tuple[Any, Any, Callable]:
    """(parameters, statistics, (parameters, statistics) → embeddings, statistics)."""
    if not depth:
        return x, {}, lambda own, stats: (own, stats)
    model = networks.network(
        "iresnet", depth=depth, embedding_dim=DIM, dtype=networks.dtype(), remat=True
    )
    keys = jax.random.split(jax.random.key(1))
    images = jax.random.uniform(keys[0], (len(x), size, size, 3), minval=-1.0, maxval=1.0)
    variables = jax.jit(model.init)(keys[1], images[:2])

    def embed(own: Any, stats: dict) -> tuple[jax.Array, Any]:
        # The images are an argument of the program, not a constant in it.
        variables = {"params": own, "batch_stats": stats["batch_stats"]}
        found, after = model.apply(variables, stats["images"], train=True, mutable=["batch_stats"])
        return found, {"images": stats["images"], **after}

    return variables["params"], {"images": images, "batch_stats": variables["batch_stats"]}, embed


def most_of_partial_fc(case: Case) -> Answer:
    """The same step in PyTorch with the most classes that fit, found by halving."""
    import torch

    torch.set_float32_matmul_precision("high")
    sizes = tuple(size // case["divided_by"] for size in HOLDS)
    fits, fails, best = -1, len(sizes), None
    if _torch_place() == "cpu":
        fits, fails = 0, 2  # nothing is sought where nothing is refused
    while fails - fits > 1:
        middle = (fits + fails) // 2
        found = _torch_step(sizes[middle], case["batch"])
        fits, fails = (middle, fails) if found else (fits, middle)
        best = found or best
    if best is None:
        raise RuntimeError(f"not even {sizes[0]:,} classes fit")
    seconds, mib = best
    return Answer(
        seconds, mib, note=f"{sizes[fits]:,} classes fit", figures={"classes": sizes[fits]}
    )


def _torch_step(classes: int, batch: int) -> tuple[float, float | None] | None:
    """(seconds, MiB) of Partial FC's step with momentum; None where it does not fit."""
    import torch

    try:
        return _time_torch_step(classes, batch)
    except torch.OutOfMemoryError:
        pass  # its frames, which hold the tensors, are gone behind this
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _time_torch_step(classes: int, batch: int) -> tuple[float, float | None]:
    import torch

    x, labels, w = _torch_drawn(classes, batch)
    step = beside.gradient_step(x, labels, w, beside.partial_fc_loss)
    optimizer = torch.optim.SGD([w], RATE, momentum=MOMENTUM)

    def whole() -> float:
        value = step()
        optimizer.step()
        if w.is_cuda:
            torch.cuda.synchronize()
        return value

    return timing.seconds(whole, lambda _: None), _torch_mib()


def _exact(answers: Sequence[Held], _: Mapping[str, float]) -> Iterator[Remark]:
    if ours := answered(answers, OURS, classes=10_000_000):
        best = min(ours, key=lambda a: a["seconds"])
        said = f"10,000,000 classes exact: {best['seconds']:.3g} s a step with {best['case']}"
        for theirs in answered(answers, PARTIAL_FC):
            if most := theirs.get("figures", {}).get("classes"):
                said += f"; Partial FC holds {most:,.0f}"
        yield Remark(said)


def exclusive(case: Case) -> Answer:
    """Value and gradient of Lr(W); chunk_size 0 is what devices.chunk_size_between chooses."""
    classes = case["classes"]
    w = rows(jax.random.key(0), classes)
    size = case["chunk_size"] or devices.chunk_size_between(
        "auto", classes=classes, device=jax.devices()[0]
    )

    def mean(w: jax.Array) -> jax.Array:
        held = class_softmax.all_classes(w, classes)
        return regularizers.exclusive(held, chunk_size=size, precision=case["precision"]).mean()

    program = jax.jit(jax.value_and_grad(mean)).lower(w).compile()
    seconds = timing.seconds(lambda: program(w))
    flops = DIM * float(classes) ** 2  # every pair of classes once
    note = f"chunks of {size}" if not case["chunk_size"] else ""
    return Answer(seconds, timing.mib(program), flops, case["precision"], note=note)


def _exclusive_cases(*settings: tuple[int, int]) -> list[Case]:
    precisions = ("tf32", "bfloat16", "highest")
    return [
        {"classes": classes, "chunk_size": size, "precision": precision}
        for classes, size in settings
        for precision in precisions
        # In float32 a million takes so long that it is measured once.
        if (precision, classes, bool(size)) != ("highest", 1_000_000, True)
    ]


def _goal_exclusive(answers: Sequence[Held], _: Mapping[str, float]) -> Iterator[Remark]:
    if best := fastest(answers, OURS, classes=1_000_000):
        yield Remark(f"1,000,000 classes: {best['seconds']:.3g} s (goal below 3)")


SOFTMAX_1M = _softmax("softmax_1m", 1_000_000, 180.0, _goal_1m)
SOFTMAX_100K = _softmax("softmax_100k", 100_000, 120.0)
TEN_MILLION = Question(
    "ten_million",
    "10,000,000 classes exact, a whole training step with momentum; the most Partial FC holds.",
    120.0,
    [
        Contender(
            OURS,
            ten_million,
            [
                {"network": 0, "batch": 1024, "classes": 10_000_000, "precision": "tf32"},
                {"network": 18, "size": 112, "batch": 256, "classes": 10_000_000}
                | {"precision": "tf32"},
                {"network": 0, "batch": 1024, "classes": 10_000_000, "precision": "bfloat16"},
                {"network": 0, "batch": 1024, "classes": 10_000_000, "precision": "highest"},
            ],
            [{"network": 0, "batch": 8, "classes": 3000, "precision": "tf32"}],
            environment={
                "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
                "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95",
            },
        ),
        Contender(
            PARTIAL_FC,
            most_of_partial_fc,
            [{"batch": 1024, "divided_by": 1}],
            [{"batch": 8, "divided_by": 1000}],
            ("torch",),
            "torch",
        ),
    ],
    remarks=_exact,
)
EXCLUSIVE = Question(
    "exclusive",
    "Lr(W) of RegularFace, value and gradient, at 100,000 and 1,000,000 classes.",
    150.0,
    [
        Contender(
            OURS,
            exclusive,
            _exclusive_cases((100_000, 0), (1_000_000, 0), (100_000, 8192), (1_000_000, 8192)),
            _exclusive_cases((600, 256)),
        )
    ],
    remarks=_goal_exclusive,
)
