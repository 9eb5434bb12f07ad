"""Every loss over classes × every layout × both input types, against slow float64 forms."""

import functools
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import class_oracles as slow
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import P

from marginface.losses import class_losses, margins, similarity
from marginface.losses.class_softmax import all_classes, sample_classes

C, PADDED, D, K = 29, 32, 4, 3  # four rows a device; the last holds one class and three pads
LABELS = np.array([0, 3, 4, 7, 28, 28, 13, 20])  # the edges of shards, a repeated one, the last
B = len(LABELS)
KEY = jax.random.key(5)
RUNNING = {"adacos": {"scale": 6.0}, "curricularface": {"t": 0.2}}
RUNNING["adaface"] = {"mean": 2.0, "deviation": 0.7}
arc = partial(margins.additive_angular, m=0.4)


class Case(NamedTuple):
    """A row of the table.

    ours: (x, y, classes, m, s, **walk) → ClassLoss, m and s traced.
    slow: (x, w, y, m, s) → losses [b] in float64; w is what `rows` makes of the prototypes.
    m, s: a typical margin and scale.
    rows: which of the problem's arrays the classes carry.
    least: the margin at which the loss is plain; None where it has none.
    """

    ours: Callable
    slow: Callable
    m: float = 0.4
    s: float = 16.0
    rows: str = "plain"
    least: float | None = 0.0


def softmax(margin: Any = None, **kw: Any) -> Callable:
    def ours(x, y, classes, m, s, **walk):
        bound = partial(margin, m=m) if margin else margins.identity
        return class_losses.margin_softmax(x, y, classes, margin=bound, scale=s, **kw, **walk)

    return ours


def named(name: str, **kw: Any) -> Callable:
    function = getattr(class_losses, name)
    running = {k: jnp.float32(v) for k, v in RUNNING.get(name, {}).items()}
    kw = kw | ({"running": running} if running else {})

    def ours(x, y, classes, m, s, **walk):
        given = {"m": m, "scale": s} | kw
        if name in ("adacos", "large_margin_softmax"):
            del given["scale"]
        if name in (
            "adacos",
            "large_margin_softmax",
            "mv_softmax",
            "magface",
            "adaptive_margin_softmax",
        ):
            del given["m"]
        if name == "large_margin_softmax":
            given["margin"] = partial(margins.multiplicative_angular, m=m)
        if name == "mv_softmax":
            given["margin"] = partial(kw["margin"], m=m)
        if name == "magface":
            given |= {"lower_m": m, "upper_m": 2 * m, "lower": 1.5, "upper": 3.0}
        return function(x, y, classes, **given, **walk)

    return ours


def normface(x, w, y, m, s, at):
    return slow.softmax(x, w, y, np.cos, s)


def by_angle(psi: Callable) -> Callable:
    return lambda x, w, y, m, s, at: slow.softmax(x, w, y, lambda t: psi(t, m), s)


BIAS = {"bias": jnp.float32(-3.0)}
CASES = {
    "normface": Case(softmax(), normface, least=None),
    "cosface": Case(softmax(margins.additive_cosine), by_angle(oracles.additive_cosine)),
    "arcface": Case(softmax(margins.additive_angular), by_angle(oracles.additive_angular)),
    "arcface focal": Case(
        softmax(margins.additive_angular, focal=jnp.float32(2.0)),
        lambda x, w, y, m, s, at: slow.focal(
            slow.softmax(x, w, y, lambda t: oracles.additive_angular(t, m), s), 2.0
        ),
        least=None,
    ),
    "arcface smoothed": Case(
        softmax(margins.additive_angular, smoothing=jnp.float32(0.1)),
        lambda x, w, y, m, s, at: slow.smoothed(
            x, w, y, lambda t: oracles.additive_angular(t, m), s, 0.1
        ),
        least=None,
    ),
    "sphereface_r": Case(
        lambda x, y, classes, m, s, **walk: class_losses.margin_softmax(
            x, y, classes, margin=partial(margins.combined, m1=m, m2=0.0, m3=0.0), scale=s, **walk
        ),
        by_angle(lambda t, m: oracles.combined(t, m, 0.0, 0.0)),
        m=1.35,
        least=1.0,
    ),
    "l_softmax": Case(named("large_margin_softmax"), slow.large_margin_softmax, m=3.0, least=None),
    "adam_softmax": Case(
        named("adaptive_margin_softmax"), slow.adaptive_margin_softmax, rows="margins", least=None
    ),
    "adacos": Case(
        named("adacos"),
        lambda x, w, y, m, s, at: slow.adacos(x, w, y, **RUNNING["adacos"], at=at)[0],
        least=None,
    ),
    "curricularface": Case(
        named("curricularface"),
        lambda x, w, y, m, s, at: slow.curricularface(
            x, w, y, m, s, **RUNNING["curricularface"], at=at
        )[0],
        least=None,
    ),
    "mv_am_softmax": Case(
        named("mv_softmax", margin=margins.additive_cosine, t=1.12),
        lambda x, w, y, m, s, at: slow.mv_softmax(
            x, w, y, oracles.additive_cosine, m, s, 1.12, True
        ),
        least=None,
    ),
    "mv_arc_softmax, fixed": Case(
        named("mv_softmax", margin=margins.additive_angular, t=1.12, adaptive=False),
        lambda x, w, y, m, s, at: slow.mv_softmax(
            x, w, y, oracles.additive_angular, m, s, 1.12, False
        ),
        least=None,
    ),
    "magface": Case(
        named("magface"), lambda x, w, y, m, s, at: slow.magface(x, w, y, m, 2 * m, 1.5, 3.0, s)
    ),
    "adaface": Case(
        named("adaface"),
        lambda x, w, y, m, s, at: slow.adaface(x, w, y, m, s, **RUNNING["adaface"], at=at)[0],
    ),
    **{
        f"elasticface {target}{' plus' * plus}": Case(
            named("elasticface", key=KEY, deviation=0.05, target=target, plus=plus),
            lambda x, w, y, m, s, at, target=target, plus=plus: slow.elasticface(
                x,
                w,
                y,
                m + 0.05 * np.asarray(jax.random.normal(KEY, (len(y),))),
                s,
                target,
                plus,
                at,
            ),
            least=None,
        )
        for target, plus in (
            ("additive_angular", False),
            ("additive_angular", True),
            ("additive_cosine", False),
        )
    },
    "subcenter_arcface": Case(
        softmax(margins.additive_angular, similarity=similarity.subcenter_cosine),
        lambda x, w, y, m, s, at: slow.subcenter(
            x, w, y, lambda t: oracles.additive_angular(t, m), s
        ),
        rows="subcenters",
    ),
    "circle": Case(named("circle"), slow.circle, m=0.25, least=None),
    "sphereface2": Case(
        named("sphereface2", learned=BIAS, balance=0.7, power=3.0),
        lambda x, w, y, m, s, at: slow.sphereface2(x, w, y, m, s, -3.0, 0.7, 3.0),
    ),
    "uniface": Case(
        named("uniface", learned=BIAS, balance=0.5),
        lambda x, w, y, m, s, at: slow.uniface(x, w, y, m, s, -3.0, 0.5),
    ),
}
LAYOUTS = {  # name: (rows padded, chunk_size, sharded, sampled)
    "dense": (False, None, False, False),
    "padded": (True, None, False, False),
    "chunked": (False, 7, False, False),  # 29 = 4·7 + 1
    "sharded, chunked": (True, 3, True, False),  # 4 = 3 + 1
    "sampled": (True, 7, False, True),
}
DTYPES = ("float32", "bfloat16")
every_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def problem(dtype: str = "float32"):
    """x, {rows}, example weights; one target beyond π − m, one close to its prototype."""
    rng = np.random.default_rng(0)
    x, w, sub = rng.normal(size=(B, D)), rng.normal(size=(C, D)), rng.normal(size=(C, K, D))
    x[1] = -w[LABELS[1]] + 0.1 * rng.normal(size=D)
    x[2] = 2 * w[LABELS[2]] + 0.2 * rng.normal(size=D)
    margin = rng.uniform(-0.1, 1.1, size=C)  # some beyond the ends

    def rounded(a):
        return a.astype(jnp.dtype(dtype)).astype(np.float64)

    rows = {"plain": rounded(w), "subcenters": rounded(sub)}
    rows["margins"] = class_losses.MarginRows(rounded(w), rounded(margin))
    return rounded(x), rows, rng.uniform(0.5, 1.5, size=B).astype(np.float32).astype(np.float64)


def pad(rows):
    """Rows up to PADDED; the padding is not zero, it must be ignored."""
    return jax.tree.map(
        lambda a: jnp.concatenate([a, jnp.ones((PADDED - C, *a.shape[1:]), a.dtype)]), rows
    )


@functools.cache
def compiled(kind, layout, mesh):
    """The program of all losses with such rows.

    Of x, rows, labels, example weights, the loss's place among them, m and s it makes the gradients
    wrt x and rows, and (losses [b], the sum of the running state).
    """
    _, chunk_size, sharded, sampled = LAYOUTS[layout]
    cases = [case for case in CASES.values() if case.rows == kind]

    def losses_of(x, rows, y, index, m, s, axis_name=None):
        classes = all_classes(rows, C, axis_name=axis_name)
        if sampled:
            classes = sample_classes(KEY, y, classes, 16)

        def branch(case):
            def run():
                found = case.ours(x, y, classes, m, s, chunk_size=chunk_size, axis_name=axis_name)
                return found.loss, sum(jax.tree.leaves(found.running), jnp.float32(0))

            return run

        return jax.lax.switch(index, [branch(case) for case in cases])

    if sharded:
        losses_of = jax.shard_map(
            partial(losses_of, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P("data"), P(), P(), P(), P()),
            out_specs=P(),
        )

    def total(x, rows, y, weights, index, m, s):
        losses, running = losses_of(x, rows, y, index, m, s)
        return (losses * weights).sum(), (losses, running)

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))


def index_of(name):
    """The place of a loss in the program of all losses with such rows."""
    return [n for n in CASES if CASES[n].rows == CASES[name].rows].index(name)


@functools.cache
def wanted(name: str, dtype: str, sampled: bool):
    """Losses and gradients wrt x and the rows in float64; of a sample, over its classes only."""
    x, rows, weights = problem(dtype)
    rows, y, kept = rows[CASES[name].rows], LABELS, None
    if sampled:
        classes = sample_classes(
            KEY, jnp.asarray(LABELS), all_classes(jnp.ones((PADDED, 1)), C), 16
        )
        kept = np.asarray(classes.ids)
        kept = kept[kept < C]
        y = np.searchsorted(kept, LABELS)
        assert (kept[y] == LABELS).all()
        rows = jax.tree.map(lambda a: a[kept], rows)
    case, (leaves, tree) = CASES[name], jax.tree.flatten(rows)
    at = x, rows

    def loss(x, *leaves):
        return case.slow(x, jax.tree.unflatten(tree, leaves), y, case.m, case.s, at)

    grads = oracles.gradient(lambda *a: (loss(*a) * weights).sum(), x, *leaves)
    if sampled:  # classes left out have gradient 0
        full = [np.zeros((C, *g.shape[1:])) for g in grads[1:]]
        for whole, part in zip(full, grads[1:], strict=True):
            whole[kept] = part
        grads = [grads[0], *full]
    return loss(x, *leaves), grads


COMPILED_LONG = [  # a program each, of what the others have as well
    *(("padded", dtype) for dtype in DTYPES),
    *((layout, "bfloat16") for layout in ("chunked", "sampled")),
]


@every_case
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param(*both, marks=[pytest.mark.exhaustive] * (both in COMPILED_LONG))
        for both in itertools.product(LAYOUTS, DTYPES)
    ],
)
def test_every_loss_in_every_layout_is_the_textbook_form(name, layout, dtype, mesh8):
    padded, _, sharded, sampled = LAYOUTS[layout]
    x, rows, weights = problem(dtype)
    case = CASES[name]
    ours = jax.tree.map(lambda a: jnp.asarray(a, dtype), rows[case.rows])
    ours = pad(ours) if padded else ours

    grads, (losses, _) = compiled(case.rows, layout, mesh8 if sharded else None)(
        jnp.asarray(x, dtype),
        ours,
        jnp.asarray(LABELS),
        jnp.float32(weights),
        index_of(name),
        case.m,
        case.s,
    )
    expected, slopes = wanted(name, dtype, sampled)
    assert oracles.relative_error(losses, expected) < 1e-5
    # A gradient is the sum of two in the inputs' type, each rounded by 2⁻⁹ in bfloat16.
    tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]
    leaves = jax.tree.leaves(grads)
    for got, want in zip(leaves, slopes, strict=True):
        assert got.dtype == dtype
        assert oracles.relative_error(got[: len(want)].astype(jnp.float32), want) < tolerance
    for got in leaves[1:]:
        np.testing.assert_array_equal(got[C:].astype(np.float32), 0)


@pytest.mark.exhaustive
@every_case
def test_a_thousand_random_cases_are_the_textbook_form(name):
    """Sizes stay, so that one program serves; all else is drawn, the hard spots among it."""
    case, count, b, c, d = CASES[name], 1000, 4, 7, 3
    rng = np.random.default_rng(len(name))
    x = rng.normal(size=(count, b, d)) * rng.choice([0.03, 1.0, 30.0], size=(count, b, 1))
    shape = (count, c, K, d) if case.rows == "subcenters" else (count, c, d)
    w = rng.normal(size=shape) * rng.choice(
        [0.1, 1.0, 10.0], size=(count, c, *(1,) * (len(shape) - 2))
    )
    y = rng.integers(0, c, size=(count, b))
    y[::10] = y[::10, :1]  # all labels equal
    if case.rows != "subcenters":
        w[1::10, 1] = w[1::10, 0]  # duplicate prototypes
        x[2::10, 0] = -np.take_along_axis(w[2::10], y[2::10, :1, None], 1)[:, 0]  # cos = −1
    if name == "l_softmax":
        w, x = w / 3, np.clip(x, -3, 3)  # it has no scale: products of 1,000 are no test
    margin = rng.uniform(0, 1, size=(count, c))
    x, w, margin = (a.astype(np.float32).astype(np.float64) for a in (x, w, margin))
    m = np.float32(rng.uniform(0.9, 1.1, size=count) * case.m).astype(np.float64)
    s = np.float32(rng.uniform(0.5, 1.5, size=count) * case.s).astype(np.float64)

    @jax.jit
    @jax.vmap
    def ours(x, w, margin, y, m, s):  # a plain loop over the cases, compiled as one
        def total(x, w):
            rows = class_losses.MarginRows(w, margin) if case.rows == "margins" else w
            losses = case.ours(x, y, all_classes(rows, c), m, s).loss
            return losses.sum(), losses

        (_, losses), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(x, w)
        return losses, grads

    single = (jnp.asarray(a, jnp.float32) for a in (x, w, margin))
    losses, grads = ours(*single, y, jnp.float32(m), jnp.float32(s))
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
    for i in range(count):
        rows = (w[i], margin[i]) if case.rows == "margins" else w[i]
        near = np.diff(np.sort(slow.split(x[i], w[i], y[i])[0])) if "plus" in name else [1]
        if min(near) < 1e-6:
            continue  # of examples equally near either may get the larger margin
        expected = case.slow(x[i], rows, y[i], m[i], s[i], (x[i], rows))
        # At cos = −1 a rounding of 2⁻²³ is one of 5e-4 in θ, times s·m sin(mθ) in the loss.
        atol = 3e-2 if i % 10 == 2 else 1e-4
        np.testing.assert_allclose(losses[i], expected, rtol=1e-4, atol=atol, err_msg=str(i))


def mean_loss(case, m, x=None, w=None, y=LABELS):
    plain, rows, _ = problem()
    w = rows[case.rows] if w is None else w
    rows = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), w)
    classes = all_classes(rows, C)
    x = jnp.float32(plain if x is None else x)
    return case.ours(x, jnp.asarray(y), classes, jnp.float32(m), jnp.float32(case.s)).loss


def losses_of(name, m, s, x=None, w=None, y=LABELS):
    """As mean_loss, by the program that all of them share."""
    plain, rows, _ = problem()
    rows = rows[CASES[name].rows] if w is None else w
    rows = jax.tree.map(jnp.float32, rows)
    x = jnp.float32(plain if x is None else x)
    _, (losses, _) = compiled(CASES[name].rows, "dense", None)(
        x, rows, jnp.asarray(y), jnp.ones(B), index_of(name), m, s
    )
    return losses


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.least is not None])
def test_without_its_margin_each_is_the_plain_loss_and_with_more_it_is_larger(name):
    case = CASES[name]
    plain = name if name in ("subcenter_arcface", "sphereface2", "uniface") else "normface"
    none = losses_of(name, case.least, case.s)
    np.testing.assert_allclose(none, losses_of(plain, 0.0, case.s), rtol=1e-5, atol=1e-6)
    steps = [losses_of(name, case.least + k * 0.1, case.s) for k in range(5)]
    for before, after in itertools.pairwise(steps):
        assert (np.asarray(after - before) >= -1e-5).all()
        assert (after - before).sum() > 0.01


def test_with_all_that_sets_them_apart_at_zero_they_are_normface():
    plain = mean_loss(CASES["normface"], 0.0)
    x, rows, _ = problem()
    margin_rows = class_losses.MarginRows(rows["plain"], np.zeros(C))
    for losses in (
        mean_loss(CASES["adam_softmax"], 0.0, w=margin_rows),
        mean_loss(Case(named("mv_softmax", margin=margins.additive_cosine, t=1.0), None), 0.0),
        mean_loss(Case(named("elasticface", key=KEY, deviation=0.0), None), 0.0),
        mean_loss(Case(softmax(lambda c, m: margins.combined(c, m1=1.0, m2=m, m3=m)), None), 0.0),
    ):
        np.testing.assert_allclose(losses, plain, rtol=1e-5, atol=1e-6)
    products = x @ rows["plain"].T
    np.testing.assert_allclose(
        mean_loss(CASES["l_softmax"], 1.0), oracles.cross_entropy(products, LABELS), rtol=1e-5
    )
    length = np.linalg.norm(x, axis=1, keepdims=True)
    modified = oracles.cross_entropy(length * oracles.cosines(x, rows["plain"]), LABELS)
    sphereface = Case(
        lambda x, y, classes, m, s: class_losses.margin_softmax(
            x,
            y,
            classes,
            margin=partial(margins.multiplicative_angular, m=m),
            scale=similarity.norm(x),
        ),
        None,
    )
    np.testing.assert_allclose(mean_loss(sphereface, 1.0), modified, rtol=1e-5, atol=1e-6)
    for case in (CASES["l_softmax"], sphereface, CASES["curricularface"], CASES["mv_am_softmax"]):
        start = 1.0 if case in (CASES["l_softmax"], sphereface) else 0.0
        steps = [mean_loss(case, start + k * 0.2) for k in range(4)]
        for before, after in itertools.pairwise(steps):
            assert (np.asarray(after - before) >= -1e-5).all()
            assert (after - before).sum() > 0.01


@every_case
def test_the_order_of_classes_and_of_examples_changes_nothing(name):
    case = CASES[name]
    x, rows, _ = problem()
    order = np.random.default_rng(1).permutation(C)
    w = jax.tree.map(lambda a: a[order], rows[case.rows])
    losses = partial(losses_of, name, case.m, case.s)
    before = losses(x, rows[case.rows], LABELS)
    np.testing.assert_allclose(
        losses(x, w, np.argsort(order)[LABELS]), before, rtol=2e-6, atol=1e-6
    )
    if not name.startswith("elasticface"):  # its draws stay with the places
        after = losses(x[::-1], rows[case.rows], LABELS[::-1])
        np.testing.assert_allclose(after[::-1], before, rtol=2e-6, atol=1e-6)


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_where_cosines_end_norms_vanish_and_prototypes_coincide(name, dtype):
    """cos = ±1, x = 0, W = 0, equal prototypes; batches of eight, of one, of one label."""
    case, rng = CASES[name], np.random.default_rng(1)
    w = rng.normal(size=(C, D))
    w[3], w[4] = w[2], 0
    x = np.stack([w[0], -w[1], 3 * w[2], w[4], w[5], np.zeros(D), 30 * w[7], 1e-30 * w[8]])
    if case.rows == "subcenters":
        w = np.repeat(w[:, None], K, axis=1)
    rows = jnp.asarray(w, dtype)
    if case.rows == "margins":
        rows = class_losses.MarginRows(rows, jnp.full(C, 0.3, dtype))
    run = compiled(case.rows, "dense", None)
    batches = [(slice(None), [0, 1, 2, 4, 4, 6, 7, 8]), (slice(0, 1), [1])]
    for some, labels in batches[: 2 if dtype == "float32" else 1]:
        for y in (labels, [labels[0]] * len(labels)):
            given = jnp.asarray(x[some], dtype), rows, jnp.asarray(y), jnp.ones(len(y))
            for leaf in jax.tree.leaves(run(*given, index_of(name), case.m, case.s)):
                assert np.isfinite(leaf.astype(np.float32)).all(), y


def test_the_running_state_follows_the_papers():
    x, rows, _ = problem()
    w = rows["plain"]
    given = jnp.float32(x), jnp.asarray(LABELS), all_classes(jnp.float32(w), C)

    def after(name):
        case = CASES[name]
        return jax.jit(lambda: case.ours(*given, case.m, case.s).running)()

    np.testing.assert_allclose(
        after("adacos")["scale"], slow.adacos_scale(x, w, LABELS, 6.0), rtol=1e-5
    )
    wanted = slow.curricularface(x, w, LABELS, 0.4, 16.0, 0.2)[1]
    np.testing.assert_allclose(after("curricularface")["t"], wanted, rtol=1e-5)
    _, mean, deviation = slow.adaface(x, w, LABELS, 0.4, 16.0, 2.0, 0.7)
    np.testing.assert_allclose(after("adaface")["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(after("adaface")["deviation"], deviation, rtol=1e-5)


def test_combined_margins_are_three_different_losses():
    """CM1, CM2 and SphereFace(1.35), which arcface_torch runs as one when m3 > 0."""
    values = [
        mean_loss(
            Case(softmax(lambda c, m, given=given: margins.combined(c, **given)), None), 0.0
        ).mean()
        for given in (
            {"m1": 1.0, "m2": 0.3, "m3": 0.2},
            {"m1": 0.9, "m2": 0.4, "m3": 0.15},
            {"m1": 1.35, "m2": 0.0, "m3": 0.0},
            {"m1": 1.0, "m2": 0.0, "m3": 0.2},
        )
    ]
    assert len({round(float(v), 3) for v in values}) == 4


def test_exact_over_detached_arcface_is_sin_of_theta_plus_m_over_sin_of_theta():
    theta = np.linspace(0.1, np.pi - 0.6, 20)
    exact = partial(margins.additive_angular, m=0.5)

    def slope(margin):
        return jax.vmap(jax.grad(lambda c: margin(c[None])[0]))(jnp.cos(theta))

    ratio = slope(exact) / slope(margins.detach(exact))
    np.testing.assert_allclose(ratio, np.sin(theta + 0.5) / np.sin(theta), rtol=1e-4)


def test_what_a_loss_starts_with():
    assert float(class_losses.adacos_start(400)["scale"]) == pytest.approx(
        math.sqrt(2) * math.log(399), rel=1e-6
    )
    for num_classes in (2, 400, 1_000_000):
        given = {"m": 0.4, "scale": 40.0, "balance": 0.7, "power": 3.0}
        bias = float(class_losses.sphereface2_start(num_classes, **given)["bias"])
        g = 2 * 0.5**3 - 1
        pull = 0.7 / (1 + math.exp(40 * (g - 0.4) + bias))
        push = 0.3 * (num_classes - 1) / (1 + math.exp(-(40 * (g + 0.4) + bias)))
        assert pull == pytest.approx(push, rel=1e-3)
    bias = class_losses.uniface_start(400, sample_rate=0.5)["bias"]
    assert float(bias) == pytest.approx(math.log(2000), rel=1e-6)


def test_an_unknown_target_of_elasticface_is_named():
    with pytest.raises(ValueError, match="target='sin' is unknown; known: additive_angular, add"):
        mean_loss(Case(named("elasticface", key=KEY, target="sin"), None), 0.5)


@pytest.mark.parametrize("word", ["angular", "cosine"])
def test_the_targets_of_elasticface_have_an_earlier_word(word):
    words = (f"additive_{word}", {"angular": "arc", "cosine": "cos"}[word])
    now, before = (
        mean_loss(Case(named("elasticface", key=KEY, target=target), None), 0.5) for target in words
    )
    np.testing.assert_array_equal(now, before)


def test_a_sample_holds_every_label_and_is_drawn_without_replacement():
    labels = jnp.asarray(LABELS)
    classes = all_classes(jnp.arange(PADDED, dtype=jnp.float32)[:, None], C)
    seen = set()
    for seed in range(20):
        rows, ids = sample_classes(jax.random.key(seed), labels, classes, 12)
        assert len(ids) == 12
        assert set(LABELS) <= set(np.asarray(ids))
        assert (np.diff(ids) > 0).all()
        np.testing.assert_array_equal(rows[:, 0], ids)
        seen |= set(np.asarray(ids).tolist())
    assert seen == set(range(C))  # and never padding while classes are left
    assert len(sample_classes(KEY, labels, classes, 3).ids) == B  # never fewer than the batch
    assert len(sample_classes(KEY, labels, classes, 99).ids) == PADDED
    with pytest.raises(ValueError, match="a sample of 0 classes; give a positive number"):
        sample_classes(KEY, labels, classes, 0)


@pytest.mark.parametrize("name", ["SubCenterArcFace", "LargeMarginSoftmax", "SphereFace"])
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_equals_pytorch_metric_learning(name):
    """The losses of this module that it has and test_class_softmax does not compare."""
    torch = pytest.importorskip("torch", reason="the `peers` extra is not installed")
    peers = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="the `peers` extra is not installed"
    )
    x, rows, _ = problem()
    near = np.arange(B) != 1  # beyond π − m that code falls back to c − m·sin m, ours is clipped
    x, y = x[near], LABELS[near]
    if name == "SubCenterArcFace":
        w = rows["subcenters"]
        peer = peers.SubCenterArcFaceLoss(
            num_classes=C, embedding_size=D, margin=math.degrees(0.4), scale=16, sub_centers=K
        ).double()
        columns = w.reshape(C * K, D).T  # class by class, as its reshape(-1, C, K) reads them
        case, back = CASES["subcenter_arcface"], lambda g: g.T.reshape(C, K, D)
    else:
        w = rows["plain"]
        kind = {
            "LargeMarginSoftmax": peers.LargeMarginSoftmaxLoss,
            "SphereFace": peers.SphereFaceLoss,
        }[name]
        peer, columns, back = kind(C, D, margin=3, scale=1).double(), w.T, lambda g: g.T
        case = CASES["l_softmax"]
        if name == "SphereFace":
            case = Case(
                lambda x, y, classes, m, s: class_losses.margin_softmax(
                    x,
                    y,
                    classes,
                    margin=partial(margins.multiplicative_angular, m=m),
                    scale=similarity.norm(x),
                ),
                None,
                m=3.0,
            )
    peer.W.data = torch.tensor(np.ascontiguousarray(columns))
    inputs = torch.tensor(x, requires_grad=True)
    value = peer(inputs, torch.tensor(y))
    value.backward()

    def mean(x, w):
        return case.ours(x, jnp.asarray(y), all_classes(w, C), case.m, case.s).loss.mean()

    loss, (gx, gw) = jax.jit(jax.value_and_grad(mean, (0, 1)))(jnp.float32(x), jnp.float32(w))
    assert oracles.relative_error(loss, value.item()) < 1e-5
    assert oracles.relative_error(gx, inputs.grad) < 1e-5
    assert oracles.relative_error(gw, back(peer.W.grad.numpy())) < 1e-5
