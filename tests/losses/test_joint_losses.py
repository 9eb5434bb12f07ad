import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import P

from marginface.losses import joint_losses
from marginface.losses.class_softmax import PAD, all_classes
from marginface.losses.similarity import Linear

C, PADDED, D, DEVICES = 29, 32, 6, 8  # four rows a device; the last holds one class and three pads
LABELS = np.array([0, 3, 4, 7, 28, 28, 13, 20])  # the edges of shards, a repeated one, the last
B = len(LABELS)


class Rows(NamedTuple):
    """Prototypes with margins beside them."""

    weight: Any
    margin: Any


def angle(a, b):
    return np.arccos(np.clip(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))


def pull_to_centers(x, w, centers, margin, radius, labels=LABELS, **hyper):
    return np.array(
        [((each - centers[y]) ** 2).sum() / 2 for each, y in zip(x, labels, strict=True)]
    )


def own_angle(x, w, centers, margin, radius, labels=LABELS, **hyper):
    return np.array([angle(each, w[y]) / np.pi for each, y in zip(x, labels, strict=True)])


def mean_over_others(potential, x, w, centers, margin, radius, labels=LABELS, power=1.5, **hyper):
    c = len(w)
    return np.array(
        [
            sum(potential(angle(w[y], w[j]), power) for j in range(c) if j != y) / (c - 1)
            for y in range(c)
        ]
    )[labels]


def to_radius(x, w, centers, margin, radius, **hyper):
    return (np.linalg.norm(x, axis=1) - radius) ** 2 / 2


def long_is_cheap(x, w, centers, margin, radius, lower=1.0, upper=3.0, **hyper):
    values = []
    for length in np.linalg.norm(x, axis=1):
        length = min(max(length, lower), upper)
        values.append(length / upper**2 + 1 / length)
    return np.array(values)


def one_minus_mean_margin(x, w, centers, margin, radius, **hyper):
    return np.full(len(x), 1 - sum(margin) / len(margin))


def moved_centers(x, centers, rate, labels=LABELS):
    """Wen et al., eq. 4, class by class."""
    moved = centers.copy()
    for j in range(len(centers)):
        mine = [i for i in range(len(x)) if labels[i] == j]
        moved[j] -= rate * sum(centers[j] - x[i] for i in mine) / (1 + len(mine))
    return moved


TERMS = {  # what it asks for, textbook, the arrays it moves
    "center": ({"running", "num_classes", "axis_name"}, pull_to_centers, {"x"}),
    "learned_center": ({"learned", "num_classes", "axis_name"}, pull_to_centers, {"x", "centers"}),
    "intra": ({"classes", "axis_name"}, own_angle, {"x", "w"}),
    "inter": (
        {"classes", "chunk_size", "axis_name"},
        partial(mean_over_others, lambda theta, power: -theta / np.pi),
        {"w"},
    ),
    "energy": (
        {"classes", "chunk_size", "axis_name", "power"},
        partial(mean_over_others, lambda theta, power: theta**-power),
        {"w"},
    ),
    "ring": ({"learned"}, to_radius, {"x", "radius"}),
    "norm_penalty": ({"radius"}, to_radius, {"x"}),
    "magnitude": ({"lower", "upper"}, long_is_cheap, {"x"}),
    "mean_margin": (
        {"classes", "num_classes", "axis_name"},
        one_minus_mean_margin,
        {"margin"},
    ),
}
HYPER = {"rate": 0.3, "power": 1.5, "radius": 2.0, "lower": 1.0, "upper": 3.0}
BY_CLASS = ("w", "centers", "margin")
LAYOUTS = {  # name: (rows padded, chunk_size, sharded)
    "dense": (False, None, False),
    "padded": (True, None, False),
    "chunked": (False, 7, False),  # 29 = 4·7 + 1
    "sharded": (True, None, True),
    "sharded, chunked": (True, 3, True),  # 4 = 3 + 1
}


@functools.cache
def problem():
    """Arrays by name, one example shorter and one longer than the bounds; example weights."""
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(B, D)),
        "w": rng.normal(size=(C, D)) * rng.uniform(0.5, 3, size=(C, 1)),
        "centers": rng.normal(size=(C, D)),
        "margin": rng.uniform(0.3, 0.4, size=C),
        "radius": np.array(HYPER["radius"]),
    }
    arrays["x"][1] *= 0.1
    arrays["x"][4] *= 10
    single = {name: a.astype(np.float32).astype(np.float64) for name, a in arrays.items()}
    return single, rng.uniform(0.5, 1.5, size=B)


@functools.cache
def textbook(name):
    """Losses, and the gradients of their weighted sum with respect to the arrays it moves."""
    _, oracle, moves = TERMS[name]
    arrays, weights = problem()

    def total(*moved):
        return (oracle(**arrays | dict(zip(sorted(moves), moved, strict=True))) * weights).sum()

    moved = [arrays[each] for each in sorted(moves)]
    grads = oracles.gradient(total, *moved)
    return oracle(**arrays), dict(zip(sorted(moves), grads, strict=True))


def evaluate(name, arrays, labels, hyper, chunk_size=None, axis_name=None, num_classes=C):
    """One term, given what it asks for by name: (losses, new running state or None)."""
    rows = Rows(arrays["w"], arrays["margin"])
    offered = {
        "classes": all_classes(rows, num_classes, axis_name=axis_name),
        "num_classes": num_classes,
        "learned": {"centers": arrays["centers"], "radius": arrays["radius"]},
        "running": {"centers": arrays["centers"]},
        "chunk_size": chunk_size,
        "axis_name": axis_name,
        **hyper,
    }
    asked = TERMS[name][0] | ({"rate"} if name == "center" else set())
    term = getattr(joint_losses, name)
    got = term(arrays["x"], labels, **{key: offered[key] for key in asked})
    return got if "running" in asked else (got, {})


@functools.cache
def compiled(layout, mesh):
    """{term: (gradients by array, (losses, new running state))}, one program for all terms."""
    _, chunk_size, sharded = LAYOUTS[layout]

    def total(arrays, labels, weights, hyper, name):
        run = partial(evaluate, name, chunk_size=chunk_size)
        if sharded:
            run = jax.shard_map(
                partial(run, axis_name="data"),
                mesh=mesh,
                in_specs=({k: P("data") if k in BY_CLASS else P() for k in arrays}, P(), P()),
                out_specs=(P(), P("data")),
            )
        losses, running = run(arrays, labels, hyper)
        return (losses * weights).sum(), (losses, running)

    return jax.jit(
        lambda *args: {name: jax.grad(total, has_aux=True)(*args, name) for name in TERMS}
    )


def single(padded=False):
    """The problem in float32; the padding is not zero, it must be ignored."""
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in problem()[0].items()}
    for name in BY_CLASS if padded else ():
        blank = jnp.ones((PADDED - C, *arrays[name].shape[1:]))
        arrays[name] = jnp.concatenate([arrays[name], blank])
    return arrays


@functools.cache
def results(layout, mesh, rounded=None, dtype="float32"):
    """What compiled gives for the problem, first rounded to a type, then given as another."""
    arrays = single(LAYOUTS[layout][0])
    arrays = {name: a.astype(rounded or dtype).astype(dtype) for name, a in arrays.items()}
    weights = jnp.asarray(problem()[1], jnp.float32)
    return compiled(layout, mesh)(arrays, jnp.asarray(LABELS), weights, HYPER)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_textbook_form(layout, name, mesh8):
    grads, (losses, running) = results(layout, mesh8)[name]
    wanted, wanted_grads = textbook(name)
    assert losses.shape == (B,)
    assert oracles.relative_error(losses, wanted) < 1e-5
    for array, grad in grads.items():
        if array in wanted_grads:
            want = wanted_grads[array]
            assert oracles.relative_error(grad[: len(want)] if want.ndim else grad, want) < 1e-5
            if want.ndim and array != "x":
                np.testing.assert_array_equal(grad[C:], 0)
        else:
            np.testing.assert_array_equal(grad, 0)
    if name == "center":
        arrays, _ = problem()
        moved = moved_centers(arrays["x"], arrays["centers"], HYPER["rate"])
        assert oracles.relative_error(running["centers"][:C], moved) < 1e-6
        np.testing.assert_array_equal(running["centers"][C:], 1)


def lengths(rng, *shape):
    return 10 ** rng.uniform(-4, 4, size=(*shape, 1))


def random_cases(rng, count, b, c, d):
    """Arrays by name, labels and hyper-parameters of many cases, the hard spots among them."""
    x = rng.normal(size=(count, b, d)) * lengths(rng, count, b)
    w = rng.normal(size=(count, c, d)) * lengths(rng, count, c)
    centers = rng.normal(size=(count, c, d)) * lengths(rng, count, c)
    y = rng.integers(0, c, size=(count, b))
    y[::10] = y[::10, :1]  # all labels equal
    own = np.take_along_axis(w, y[..., None], 1)
    w[1::10, 1] = w[1::10, 0]  # duplicate prototypes
    x[2::10, 0] = -own[2::10, 0]  # cos = −1
    w[3::10, 1] = -2 * w[3::10, 0]  # opposite prototypes
    x[4::10, 0] = 0
    w[5::10, 0] = 0
    x[6::10, 0] = 3 * own[6::10, 0]  # cos = 1
    x[7::10, 1] = x[7::10, 0]  # duplicate embeddings
    x[8::10, 0] = np.take_along_axis(centers, y[..., None], 1)[8::10, 0]  # on its center
    lower = 10 ** rng.uniform(-2, 2, size=count)
    hyper = {
        "rate": rng.uniform(0, 1, size=count),
        "power": rng.uniform(0.5, 3, size=count),
        "radius": 10 ** rng.uniform(-3, 3, size=count),
        "lower": lower,
        "upper": lower * rng.uniform(1, 20, size=count),
    }
    margin = rng.uniform(-1, 1, size=(count, c))
    arrays = {"x": x, "w": w, "centers": centers, "margin": margin, "radius": hyper["radius"]}
    arrays, hyper = jax.tree.map(lambda a: np.float32(a).astype(np.float64), (arrays, hyper))
    return arrays, y, hyper


def rounding(name, wanted, arrays, y, hyper):
    """By how much float32 may differ, per case and example; NaN where we define what books do not.

    Sums of positive terms are right to a few 2⁻²⁴ of themselves, here taken as 1e-5; angles and
    differences are not.
    """
    unit = arrays["w"] / np.linalg.norm(arrays["w"], axis=2, keepdims=True)
    cosines = np.where(np.eye(unit.shape[1]), -1, unit @ unit.transpose(0, 2, 1))
    nearest = np.arccos(np.clip(np.take_along_axis(cosines.max(axis=2), y, 1), -1, 1))
    kind = np.arange(len(y))[:, None] % 10
    slack = 1e-5 * np.abs(wanted)
    if name in ("intra", "inter"):
        # A cosine is off by 2⁻²² = ε, an angle by ε/sin θ: 1e-5 at the 0.02 rad that random
        # directions keep, but √(2ε) = 7e-4 at 0 and π, of which the loss is 1/π.
        slack = slack + np.where(np.isin(kind, (1, 2, 3, 6)), 3e-4, 1e-5)
    elif name == "energy":
        # θ^−power is off by power·ε/(θ sin θ) of itself, 7e-5 at 0.1 rad; closer ones are left
        # out, also since below 0.0045 rad we hold the energy. π^−power is a seventh of a sum.
        slack = np.where(nearest > 0.1, 20 * slack, np.nan)
    elif name in ("ring", "norm_penalty"):
        slack = slack + 1e-6 * arrays["radius"][:, None] ** 2  # ‖x‖ − radius cancels
    elif name == "mean_margin":
        slack = slack + 1e-6  # so does 1 − mean
    return slack


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TERMS)
def test_a_thousand_random_cases_are_the_textbook_form(name):
    """Sizes stay, so that one program serves; all else is drawn, the hard spots among it."""
    count, b, c, d = 1000, 4, 7, 3
    arrays, y, hyper = random_cases(np.random.default_rng(len(name)), count, b, c, d)

    @jax.jit
    @jax.vmap
    def ours(arrays, y, hyper):
        def total(arrays):
            losses, running = evaluate(name, arrays, y, hyper, num_classes=c)
            return losses.sum(), (losses, running)

        return jax.grad(total, has_aux=True)(arrays)

    single_arrays, single_hyper = jax.tree.map(jnp.float32, (arrays, hyper))
    results = ours(single_arrays, y, single_hyper)
    for leaf in jax.tree.leaves(results):
        assert np.isfinite(leaf).all()
    _, (losses, running) = results
    cases = [jax.tree.map(lambda a, i=i: a[i], (arrays, hyper, y)) for i in range(count)]
    with np.errstate(divide="ignore", invalid="ignore"):  # a norm of 0 has no angle: NaN
        wanted = np.array(
            [
                TERMS[name][1](labels=labels, **drawn | given)  # both have the radius
                for given, drawn, labels in cases
            ]
        )
        slack = rounding(name, wanted, arrays, y, hyper)
    known = np.isfinite(wanted) & np.isfinite(slack)
    assert known.mean() > 0.75
    beyond = np.argwhere(known & ~(np.abs(losses - wanted) <= slack))
    assert not beyond.size, beyond
    if name == "center":
        for i, (given, drawn, labels) in enumerate(cases):
            x, centers, rate = given["x"], given["centers"], drawn["rate"]
            moved = moved_centers(x, centers, rate, labels)
            # Of what is added up, whatever cancels: |c| + rate·Σ (|c| + |x|) / (1 + n).
            added = moved_centers(-np.abs(x), np.abs(centers), -rate, labels)
            assert (np.abs(running["centers"][i] - moved) <= 1e-6 * added).all(), i


def textbook_grouping(logits, expectation, momentum, self_distributed):
    """Losses, the new running mean, and by how much each label beats the next group."""
    b, k = logits.shape
    ones = np.ones(b, int)
    p = np.exp(-np.stack([oracles.cross_entropy(logits, j * ones) for j in range(k)], axis=1))
    after = momentum * expectation + (1 - momentum) * p.sum(axis=0) / b
    expected = after / after.sum() if self_distributed else np.zeros(k)
    surprise = (p - expected) / k + 1 / k
    ahead = np.sort(surprise, axis=1)
    losses = oracles.cross_entropy(logits, surprise.argmax(axis=1))
    return losses, after, ahead[:, -1] - ahead[:, -2]


@pytest.mark.exhaustive
@pytest.mark.parametrize("self_distributed", [True, False])
def test_a_thousand_random_cases_of_grouping_are_the_textbook_form(self_distributed):
    """Logits from nearly equal to certain, batches of equal ones; from the start and later on."""
    rng, count, b, k = np.random.default_rng(0), 1000, 5, 4
    logits = rng.normal(size=(count, b, k)) * 10 ** rng.uniform(-3, 3, size=(count, 1, 1))
    logits += 10 ** rng.uniform(-2, 2, size=(count, 1, 1)) * rng.normal(size=(count, b, 1))
    logits[::10] = logits[::10, :1]  # all examples equal
    logits[1::10, 0] = 0  # all groups equal
    logits[2::10, 1] = -logits[2::10, 0]
    momentum = rng.uniform(0, 0.99, size=count)
    expectation = rng.dirichlet(np.full(k, 0.3), size=count) * rng.uniform(0, 1, size=(count, 1))
    expectation[::2] = 0  # as at first
    single = [np.float32(a) for a in (logits, expectation, momentum)]

    @jax.jit
    @jax.vmap
    def ours(logits, expectation, momentum):
        def total(logits):
            losses, after = joint_losses.grouping(
                logits,
                running={"expectation": expectation},
                momentum=momentum,
                self_distributed=self_distributed,
            )
            return losses.sum(), (losses, after["expectation"])

        return jax.grad(total, has_aux=True)(logits)

    results = ours(*single)
    for leaf in jax.tree.leaves(results):
        assert np.isfinite(leaf).all()
    _, (losses, after) = jax.tree.map(np.asarray, results)
    compared = 0
    for i, case in enumerate(zip(*(a.astype(np.float64) for a in single), strict=True)):
        wanted, wanted_after, ahead = textbook_grouping(*case, self_distributed)
        # p is in [0, 1] and right to 1e-6: a label that is ahead by less is anybody's.
        sure = ahead > 1e-5 / k
        compared += sure.sum()
        assert (np.abs(after[i] - wanted_after) <= 1e-6).all(), i
        # log Σ exp of 1 and of small terms is right to 2⁻²³, not to a part of itself.
        assert (np.abs(losses[i] - wanted) <= 1e-5 * wanted + 1e-6)[sure].all(), i
    assert compared > 0.7 * count * b


@pytest.mark.parametrize("name", TERMS)
def test_bfloat16_is_summed_in_float32(name, mesh8):
    wide_grads, (wide, _) = results("sharded, chunked", mesh8, "bfloat16", "float32")[name]
    grads, (losses, _) = results("sharded, chunked", mesh8, None, "bfloat16")[name]
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, wide, rtol=1e-6)
    for array, grad in grads.items():
        assert grad.dtype == jnp.bfloat16
        if np.any(wide_grads[array]):
            assert oracles.relative_error(grad, wide_grads[array]) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_where_norms_vanish_and_prototypes_coincide_or_oppose(dtype):
    """Example 0 on its prototype, 1 opposite, 2 of norm 0, 3 at a prototype of norm 0, 4 huge."""
    w = jnp.array([[1, 2], [1, 2], [-1, -2], [0, 0], [1e-30, 0], [1e6, 0]], dtype)
    x = jnp.array([[1, 2], [-3, -6], [0, 0], [1, 1], [1e6, 1], [0, 1e-30]], dtype)
    others = {"centers": w, "margin": jnp.ones(6, dtype), "radius": jnp.asarray(2.0, dtype)}
    arrays = {"x": x, "w": w, **others}

    @jax.jit
    def everything(arrays, labels):
        def total(arrays, name):
            losses, running = evaluate(name, arrays, labels, HYPER, 4, num_classes=6)
            return losses.sum(), (losses, running)

        return {name: jax.grad(total, has_aux=True)(arrays, name) for name in TERMS}

    for labels in ([0, 1, 2, 3, 4, 5], [0] * 6, [3] * 6):
        for name, results in everything(arrays, jnp.array(labels)).items():
            for leaf in jax.tree.leaves(results):
                assert np.isfinite(leaf.astype(np.float32)).all(), (name, labels)
            grads, (losses, _) = results
            assert losses.dtype == np.float32, name
            assert {grad.dtype for grad in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}, name


def test_one_example_and_one_class():
    one = jnp.array([[3.0, 4.0]])
    arrays = {
        "x": one,
        "w": jnp.array([[1.0, 0.0]]),
        "centers": jnp.zeros((1, 2)),
        "margin": jnp.array([0.3]),
        "radius": jnp.array(2.0),
    }

    @jax.jit
    def everything(arrays):
        label = jnp.array([0])
        return {name: evaluate(name, arrays, label, HYPER, num_classes=1) for name in TERMS}

    got = everything(arrays)
    wanted = {
        "center": 12.5,
        "learned_center": 12.5,
        "intra": np.arccos(0.6) / np.pi,
        "inter": 0.0,  # nobody to be apart from
        "energy": 0.0,
        "ring": 4.5,
        "norm_penalty": 4.5,
        "magnitude": 3 / 9 + 1 / 3,
        "mean_margin": 0.7,
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name][0], [value], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(got["center"][1]["centers"], 0.3 * one / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["center", "learned_center", "intra", "inter", "energy"])
def test_a_label_that_nobody_holds_gives_nan_and_moves_no_center(name):
    labels = jnp.asarray(LABELS).at[2].set(C).at[6].set(int(PAD))
    losses, running = jax.jit(partial(evaluate, name, hyper=HYPER))(single(), labels)
    np.testing.assert_array_equal(np.isnan(losses), [0, 0, 1, 0, 0, 0, 1, 0])
    assert np.isfinite(running.get("centers", 0.0)).all()


def test_prototypes_may_have_a_bias():
    x, w = (single()[name] for name in ("x", "w"))

    @jax.jit
    def intra(rows):
        return joint_losses.intra(x, jnp.asarray(LABELS), classes=all_classes(rows, C))

    np.testing.assert_array_equal(intra(Linear(w, jnp.ones(C))), intra(w))


def test_what_a_term_learns_or_keeps_starts_in_the_right_shape():
    assert joint_losses.centers_at_origin(PADDED, D)["centers"].shape == (PADDED, D)
    np.testing.assert_allclose(joint_losses.ring_start(16)["radius"], 4.0)


@pytest.mark.parametrize("name", ["inter", "energy"])
def test_a_chunk_size_that_is_not_positive_is_refused(name):
    with pytest.raises(ValueError, match="chunk_size is 0; give a positive number or None"):
        evaluate(name, single(), jnp.asarray(LABELS), HYPER, chunk_size=0)


@pytest.mark.parametrize("name", ["inter", "energy"])
def test_chunks_take_at_most_five_percent_of_the_dense_memory(name):
    """Compiled only: b = 512, C = 131,072, d = 512, and a chunk_size that does not divide C."""

    def mean(x, w, y, chunk_size):
        term = getattr(joint_losses, name)
        return term(x, y, classes=all_classes(w, len(w)), chunk_size=chunk_size).mean()

    def temporary(chunk_size):
        shapes = [
            jax.ShapeDtypeStruct((512, 512), jnp.float32),
            jax.ShapeDtypeStruct((131072, 512), jnp.float32),
            jax.ShapeDtypeStruct((512,), jnp.int32),
        ]
        step = jax.jit(jax.grad(partial(mean, chunk_size=chunk_size), 1))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1000) <= 0.05 * temporary(None)


def test_centers_need_no_matrix_of_examples_and_classes():
    """Compiled only: b = 512, C = 131,072: [b, C] would be 256 MiB, ours is below a tenth of it."""

    def mean(x, centers, y):
        losses, running = joint_losses.center(
            x, y, running={"centers": centers}, num_classes=len(centers)
        )
        return losses.mean(), running

    shapes = [
        jax.ShapeDtypeStruct((512, 64), jnp.float32),
        jax.ShapeDtypeStruct((131072, 64), jnp.float32),
        jax.ShapeDtypeStruct((512,), jnp.int32),
    ]
    step = jax.jit(jax.grad(mean, has_aux=True)).lower(*shapes).compile()
    assert step.memory_analysis().temp_size_in_bytes < 0.1 * 4 * 512 * 131072
