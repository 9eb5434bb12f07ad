"""What rounding the products with the other classes costs: loss and gradients beside float64.

    python -m benchmarks.precision            # makes the tables of docs/precision.md
    python -m benchmarks.precision --smoke    # seconds: tiny problems, only printed

ArcFace, m = 0.5, on CPU, where a rounding is emulated and the sums are float32. The exact
values are numpy's in float64, of a form written without a look at the walk. One problem is a
network trained by the first call; its run folder, runs/precision, is kept and the next call only
reads it.
"""

import argparse
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from marginface import build
from marginface.launch import results
from marginface.losses import class_losses, margins
from marginface.losses.class_softmax import all_classes
from marginface.losses.similarity import cosine, normalize

PAGE = common.ROOT / "docs" / "precision.md"
RUN = pathlib.Path("runs") / "precision"
RECIPE = (
    "--config",
    "experiments/arcface.py:data=small,dim=512",
    f"--workdir={RUN}",
    "--config.data.kw.identities=10000",
    "--config.data.kw.samples=8",
    "--config.data.kw.difficulty=0.5",
    "--config.data.kw.test_identities=20",
    "--config.data.kw.pairs=100",
    "--config.loss.scale=64.0",
    "--config.loss.margin_kw.m=0.5",
    "--config.steps=5500",
    "--config.log_every=100",
    "--config.checkpoint_every=1000",
)
MARGIN = 0.5
LIMIT = 1e-3  # of a gradient's relative error
USUAL_DIM, USUAL_SCALE = 512, 64.0  # from here, and up to here, auto takes TF32
SIZES = (  # classes, examples, embedding's length, scale, draws
    (10_000, 512, 512, 64.0, 8),
    (100_000, 512, 512, 64.0, 2),
    (1_000_000, 128, 512, 64.0, 1),
    (10_000, 512, 256, 64.0, 8),
    (10_000, 512, 128, 64.0, 8),
    (10_000, 512, 128, 32.0, 8),
    (10_000, 512, 32, 64.0, 8),
    (10_000, 512, 512, 256.0, 8),
)
SMOKE_SIZES = ((60, 8, 512, 64.0, 2),)
CHUNK = 2048
FAMILY = 10  # prototypes of a family are each other's nearest

Array = np.ndarray


class Problem(NamedTuple):
    """Embeddings x [b, d], their labels [b] and prototypes W [c, d], float32; the scale s."""

    name: str
    x: Array
    labels: Array
    w: Array
    scale: float = 64.0


class Exact(NamedTuple):
    """In float64: the mean loss, its gradients, and what kind of problem it is.

    angle: the mean angle to the target, degrees.
    sep: the mean cosine of the batch's prototypes to the nearest other one.
    """

    loss: float
    x: Array
    w: Array
    angle: float
    sep: float


class Errors(NamedTuple):
    """Relative errors: of the mean loss; of both gradients by norms; of x's worst example."""

    loss: float
    x: float
    w: float
    worst: float


class Measured(NamedTuple):
    """A line of the tables: a problem, its mean exact figures, the errors of all WAYS.

    Of several draws the errors are the largest.
    """

    name: str
    classes: int
    examples: int
    dim: int
    scale: float
    draws: int
    angle: float
    sep: float
    loss: float
    errors: dict[str, Errors]


# ---- problems ------------------------------------------------------------------------------------


def at_random(rng: np.random.Generator, b: int, c: int, d: int) -> Problem:
    """Everything independent: all angles near 90°."""
    x, w = (rng.standard_normal((n, d), dtype=np.float32) for n in (b, c))
    return Problem("random", x, rng.integers(0, c, b), w)


def untrained(rng: np.random.Generator, b: int, c: int, d: int) -> Problem:
    """The same, with embeddings close together, as a network gives them before it learns."""
    problem = at_random(rng, b, c, d)
    shared = np.float32(3) * rng.standard_normal(d, dtype=np.float32)
    return problem._replace(name="random, embeddings alike", x=shared + problem.x)


def as_trained(rng: np.random.Generator, b: int, c: int, d: int) -> Problem:
    """Prototypes in families of ten, so that Sep is about 0.4; targets about 38° away."""
    w = rng.standard_normal((c, d), dtype=np.float32)
    w *= np.float32(0.6**0.5)
    families = np.float32(0.4**0.5) * rng.standard_normal((c // FAMILY, d), dtype=np.float32)
    w.reshape(-1, FAMILY, d)[:] += families[:, None]
    labels = rng.integers(0, c, b)
    target = _unit(w[labels].astype(np.float64))
    beside = rng.standard_normal((b, d))
    beside = _unit(beside - np.sum(beside * target, axis=1, keepdims=True) * target)
    angle = np.radians(rng.normal(38.0, 6.0, (b, 1)))
    x = np.cos(angle) * target + np.sin(angle) * beside
    return Problem("as trained", x.astype(np.float32), labels, w)


def trained(b: int) -> Problem:
    """Images that a network was trained on, and its prototypes; trains it if need be."""
    folder = common.ROOT / RUN
    if not (folder / "summary.json").exists():
        say(f"training {RUN}, about a quarter of an hour")
        command = [sys.executable, "-m", "marginface.main", *RECIPE]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run(command, cwd=common.ROOT, check=True, env=environment)
    from marginface import config as configs
    from marginface import sharding
    from marginface.evaluators.common import embed_all
    from marginface.training import objective
    from marginface.training.checkpoint import Checkpoints

    config = configs.from_json((folder / "config.json").read_text(encoding="utf-8"))
    faces, _ = build.load_data(config)
    mesh = sharding.make_mesh(1)
    steps = build.make_steps(config, faces, mesh, 1)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        restored = checkpoints.restore(steps.like)
    assert restored is not None, f"{folder} is complete but has no checkpoint"
    _, state, _ = restored
    to_images = jax.jit(faces.to_images)

    def embed(state: Any, batch: dict[str, Array]) -> dict[str, Any]:
        images = to_images(sharding.put_global_batch(mesh, batch))
        return steps.embed(state, images)

    chosen = np.random.default_rng(0).choice(len(faces.source), b, replace=False)
    source = [faces.source[int(i)] for i in chosen]
    x = embed_all(embed, state, source, faces.decode, 128)["embedding"]
    w = np.asarray(objective.weights(state["params"]["prototypes"]))[: faces.num_classes]
    return Problem("trained", x, faces.labels()[chosen], w)


def problems(smoke: bool) -> Iterator[Iterator[Problem]]:
    """The draws of each; one after the other, as the largest takes two GiB."""
    if not smoke:
        yield iter([trained(512)])
    for c, b, d, scale, draws in SMOKE_SIZES if smoke else SIZES:
        for make in (at_random, untrained, as_trained):
            yield (
                make(np.random.default_rng([c, draw]), b, c, d)._replace(scale=scale)
                for draw in range(draws)
            )


# ---- float64 -------------------------------------------------------------------------------------


def exact(problem: Problem, *, m: float = MARGIN, chunk: int = 8192) -> Exact:
    """ArcFace's mean loss and its gradients by hand, chunk by chunk."""
    _, x, y, w, s = problem
    (b, d), c = x.shape, len(w)
    unit = _unit(x.astype(np.float64))
    target = _unit(w[y].astype(np.float64))
    cos = np.sum(unit * target, axis=1)
    theta = np.arccos(np.clip(cos, -1.0, 1.0))
    inside = theta + m < np.pi
    psi = np.where(inside, np.cos(theta + m), -1.0)
    slope = np.where(inside, np.sin(theta + m) / np.maximum(np.sin(theta), 1e-300), 0.0)  # ψ'(cos)

    parts = [slice(first, first + chunk) for first in range(0, c, chunk)]
    logits, sep = np.empty((b, c)), np.full(b, -np.inf)
    for part in parts:
        both = np.concatenate([unit, target]) @ _unit(w[part].astype(np.float64)).T
        both.reshape(2, b, -1)[:, np.arange(c)[part] == y[:, None]] = -np.inf
        logits[:, part] = s * both[:b]
        sep = np.maximum(sep, both[b:].max(axis=1))
    top = logits.max(axis=1)
    total = np.zeros(b)
    for part in parts:
        logits[:, part] = np.exp(logits[:, part] - top[:, None])  # from here on not yet normalised
        total += logits[:, part].sum(axis=1)
    excess = top + np.log(total) - s * psi
    loss = np.logaddexp(0.0, excess)
    push = np.exp(-np.logaddexp(0.0, -excess)) * s / b  # s·dL/d(LSE) of the mean loss L

    of_target = -push * slope
    towards = of_target[:, None] * target  # dL/d(x/‖x‖)
    gradient = np.zeros((c, d))
    for part in parts:
        rows = w[part].astype(np.float64)
        g = logits[:, part] * (push / total)[:, None]
        g[np.arange(c)[part] == y[:, None]] = 0.0
        towards += g @ _unit(rows)
        gradient[part] = g.T @ unit
    np.add.at(gradient, y, of_target[:, None] * unit)
    for part in parts:
        gradient[part] = _through_unit(w[part].astype(np.float64), gradient[part])
    x_gradient = _through_unit(x.astype(np.float64), towards)
    angle = float(np.degrees(theta).mean())
    return Exact(float(loss.mean()), x_gradient, gradient, angle, float(sep.mean()))


def _unit(a: Array) -> Array:
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def _through_unit(a: Array, g: Array) -> Array:
    """The gradient wrt a of what has the gradient g wrt a/‖a‖."""
    unit = _unit(a)
    beside = g - np.sum(g * unit, axis=1, keepdims=True) * unit
    return beside / np.linalg.norm(a, axis=1, keepdims=True)


# ---- ours ----------------------------------------------------------------------------------------


@jax.custom_vjp
def three_products(x: jax.Array, w: jax.Array) -> jax.Array:
    """x Wᵀ of factors in two bfloat16 parts, without the product of the two small ones.

    So a TPU computes Precision.HIGH, which similarity.product takes there for "tf32".
    """
    (x, x_rest), (w, w_rest) = _split(x), _split(w)
    exactly = functools.partial(jnp.matmul, precision="highest")
    return exactly(x_rest, w.T) + exactly(x, w_rest.T) + exactly(x, w.T)


def _split(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    large = jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
    return large, jax.lax.reduce_precision(a - large, exponent_bits=8, mantissa_bits=7)


three_products.defvjp(
    lambda x, w: (three_products(x, w), (x, w)),
    lambda factors, g: (
        three_products(g, factors[1].T),
        three_products(g.T, factors[0].T),
    ),
)


def cosine_on_tpu(x: jax.Array, rows: jax.Array, *, precision: str = "highest") -> jax.Array:
    """similarity.cosine as a TPU computes it with precision "tf32"."""
    if precision == "highest":
        return cosine(x, rows)
    return three_products(normalize(x), normalize(rows))


def _target_too(precision: Any) -> dict[str, Any]:
    return {"similarity": functools.partial(cosine, precision=precision)}


WAYS: dict[str, dict[str, Any]] = {  # what is compared: arguments of margin_softmax
    "highest": {"precision": "highest"},
    "TPU, three bfloat16 products": {"precision": "tf32", "similarity": cosine_on_tpu},
    "tf32": {"precision": "tf32"},
    "bfloat16": {"precision": "bfloat16"},
    "tf32, the target too": _target_too("tf32"),
    "bfloat16, the target too": _target_too("bfloat16"),
}


def ours(problem: Problem, way: str) -> tuple[Any, Any, Any]:
    """The mean loss and its gradients by the walk."""
    labels = jnp.asarray(problem.labels, jnp.int32)
    step = _step(way)
    loss, (x, w) = step(jnp.asarray(problem.x), jnp.asarray(problem.w), labels, problem.scale)
    return float(loss), np.asarray(x), np.asarray(w)


@functools.cache
def _step(way: str) -> Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]:
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def mean(x: jax.Array, w: jax.Array, labels: jax.Array, scale: jax.Array) -> jax.Array:
        margin = functools.partial(margins.additive_angular, m=MARGIN)
        kw: Any = {"margin": margin, "scale": scale, "chunk_size": CHUNK, **WAYS[way]}
        return class_losses.margin_softmax(x, labels, all_classes(w, len(w)), **kw).loss.mean()

    return mean


def errors(got: tuple[Any, Any, Any], want: Exact, chunk: int = 8192) -> Errors:
    """How far the loss and the gradients are from the exact ones."""
    loss, x, w = got
    off, norm = 0.0, 0.0
    for first in range(0, len(w), chunk):
        part = slice(first, first + chunk)
        off += float(np.sum((w[part].astype(np.float64) - want.w[part]) ** 2))
        norm += float(np.sum(want.w[part] ** 2))
    each = np.linalg.norm(x - want.x, axis=1)
    return Errors(
        abs(loss - want.loss) / want.loss,
        float(np.linalg.norm(x - want.x) / np.linalg.norm(want.x)),
        (off / norm) ** 0.5,
        float((each / np.linalg.norm(want.x, axis=1)).max()),
    )


# ---- page ----------------------------------------------------------------------------------------

_STARTED = time.monotonic()


def say(words: str) -> None:
    """A line of progress."""
    print(f"[{time.monotonic() - _STARTED:6.0f} s] {words}", flush=True)


def number(value: float) -> str:
    """2.5e-4, and 25e-4 never."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def tables(found: list[Measured]) -> str:
    """The largest errors, what the problems are, all errors; in Markdown."""
    heads = ("mean loss", "gradient of x", "gradient of W", "gradient of x, worst example")
    rule = "|---|" + "---:|" * len(heads)
    usual = [row for row in found if row.dim >= USUAL_DIM and row.scale <= USUAL_SCALE]
    lines = [
        f"The largest relative errors over the {len(usual)} problems with d ≥ {USUAL_DIM} and "
        f"s ≤ {USUAL_SCALE:.0f}:",
        "",
        _row("products", *heads, f"both gradients below {number(LIMIT)}"),
        rule + "---|",
    ]
    for way in WAYS:
        most = _largest([row.errors[way] for row in usual])
        passes = "yes" if max(most.x, most.w) < LIMIT else "no"
        lines.append(_row(way, *map(number, most), passes))
    lines += ["", "The problems, as they came out:", ""]
    kinds = "x and W", "classes", "d", "s"
    lines += [_row(*kinds, "examples", "draws", "target angle", "Sep", "mean loss")]
    lines += ["|---|" + "---:|" * 8]
    for row in found:
        measured = f"{row.angle:.1f}°", f"{row.sep:.3f}", f"{row.loss:.3f}"
        lines.append(_row(*_of(row), f"{row.examples:,}", f"{row.draws}", *measured))
    lines += ["", "All relative errors, the largest of the draws:", ""]
    lines += [_row(*kinds, "products", *heads)]
    lines += ["|---|---:|---:|---:|---|" + "---:|" * len(heads)]
    for row in found:
        for way, error in row.errors.items():
            lines.append(_row(*_of(row), way, *map(number, error)))
    return "\n".join(lines)


def _of(row: Measured) -> tuple[str, ...]:
    return row.name, f"{row.classes:,}", f"{row.dim}", f"{row.scale:.0f}"


def measure(draws: Iterator[Problem]) -> Measured:
    """Every way's errors on a problem."""
    return _together(list(map(_measure_one, draws)))


def _measure_one(problem: Problem) -> Measured:
    (b, d), c = problem.x.shape, len(problem.w)
    name = f"{problem.name}, {c:,} classes, d = {d}, s = {problem.scale:.0f}"
    want, found = exact(problem), {}
    say(f"{name}: loss {want.loss:.3f}, angle {want.angle:.1f}, Sep {want.sep:.3f}")
    for way in WAYS:
        found[way] = errors(ours(problem, way), want)
        say(f"{name}, {way}: {' '.join(map(number, found[way]))}")
    figures = want.angle, want.sep, want.loss
    return Measured(problem.name, c, b, d, problem.scale, 1, *figures, found)


def _together(draws: list[Measured]) -> Measured:
    return draws[0]._replace(
        draws=len(draws),
        angle=statistics.fmean(row.angle for row in draws),
        sep=statistics.fmean(row.sep for row in draws),
        loss=statistics.fmean(row.loss for row in draws),
        errors={way: _largest([row.errors[way] for row in draws]) for way in WAYS},
    )


def _largest(found: list[Errors]) -> Errors:
    return Errors(*map(max, zip(*found, strict=True)))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny problems, in seconds")
    parser.add_argument("--out", type=pathlib.Path, help="page whose tables are made anew")
    options = parser.parse_args(argv)
    out = options.out or (None if options.smoke else PAGE)
    jax.config.update("jax_platforms", "cpu")
    made = f"Commit {common.commit()}; {common.device()}; {_versions()}."
    text = tables(list(map(measure, problems(options.smoke))))
    print(text)
    if out:
        results.update(out, "precision", f"\n{made}\n\n{text}\n")
        say(f"tables: {out}")


def _versions() -> str:
    return f"{common.versions().split(' flax')[0]} numpy {np.__version__}"


if __name__ == "__main__":
    main()
