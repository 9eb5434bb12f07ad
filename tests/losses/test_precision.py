"""Products of rounded factors: what they are, and that they touch the other classes alone."""

import functools
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from jax import P

from marginface.losses import class_losses, margins, similarity
from marginface.losses.class_softmax import all_classes, negatives

ROUNDED = ("tf32", "bfloat16")
every_precision = pytest.mark.parametrize("precision", similarity.PRECISIONS)
every_rounding = pytest.mark.parametrize("precision", ROUNDED)
B, C, PADDED, D, K = 8, 29, 32, 16, 3
LABELS = np.array([0, 3, 4, 7, 28, 28, 13, 20])  # the edges of shards, a repeated one, the last


def rounded(a, precision):
    """float32 with the mantissa cut by hand, to nearest and of two as near to the even one."""
    a = np.asarray(a, np.float32)
    if precision == "highest":
        return a
    if precision == "bfloat16":
        return a.astype(ml_dtypes.bfloat16).astype(np.float32)
    dropped = 23 - 10
    bits = a.view(np.uint32)
    even = (bits >> dropped) & 1
    bits = (bits + (2 ** (dropped - 1) - 1) + even) >> dropped << dropped
    return bits.astype(np.uint32).view(np.float32)


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    shapes = (B, D), (C, D), (B, C)
    return tuple(np.float32(rng.normal(size=s) * 10.0 ** rng.uniform(-3, 3, s)) for s in shapes)


def close(got, a, b):
    """got = a bᵀ up to float32's rounding of the sums."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    assert got.dtype == jnp.float32
    assert (np.abs(got - a @ b.T) <= 2e-6 * (np.abs(a) @ np.abs(b).T)).all()


@every_precision
def test_a_product_and_its_gradients_are_those_of_rounded_factors(precision):
    x, w, g = arrays()

    @jax.jit
    def both(x, w, g):
        value, back = jax.vjp(partial(similarity.product, precision=precision), x, w)
        return value, *back(g)

    value, x_gradient, w_gradient = both(x, w, g)
    x, w, g = (rounded(a, precision) for a in (x, w, g))
    close(value, x, w)
    close(x_gradient, g, w.T)
    close(w_gradient, g.T, x.T)


@pytest.mark.parametrize(("precision", "bits"), [("tf32", 10), ("bfloat16", 7)])
def test_rounding_is_to_the_nearest_and_of_two_to_the_even_one(precision, bits):
    last = 2.0**-bits
    halves = jnp.array([[1 + last / 2], [1 + 3 * last / 2], [1 + 0.51 * last]])
    wanted = np.array([[1.0], [1 + 2 * last], [1 + last]])
    for sign in (1.0, -1.0):
        got = similarity.product(sign * halves, jnp.ones((1, 1)), precision=precision)
        np.testing.assert_array_equal(got, sign * wanted)


@every_precision
def test_sums_are_float32(precision):
    """4,097 ones: a bfloat16 sum stays at 256, one rounded to TF32 at 4,096."""
    x, w = jnp.ones((1, 4097)), jnp.ones((1, 4097))
    product = partial(similarity.product, precision=precision)
    assert product(x, w)[0, 0] == 4097
    ones = jnp.ones((4097, 1))
    _, back = jax.vjp(product, ones[:1], ones)
    assert back(jnp.ones((1, 4097)))[0][0, 0] == 4097  # over the classes
    _, back = jax.vjp(product, ones, ones[:1])
    assert back(jnp.ones((4097, 1)))[1][0, 0] == 4097  # over the examples


@every_precision
def test_what_is_no_number_stays_none(precision):
    x = jnp.ones((2, 3)).at[0, 1].set(jnp.nan)
    got = similarity.product(x, jnp.ones((4, 3)), precision=precision)
    np.testing.assert_array_equal(np.isnan(got), [[True] * 4, [False] * 4])


def test_an_unknown_precision_is_named():
    product = inspect.unwrap(similarity.product)  # without the tests' check of its annotations
    with pytest.raises(
        ValueError, match=r"^precision='half' is unknown; known: highest, tf32, "
    ) as e:
        product(jnp.ones((1, 2)), jnp.ones((3, 2)), precision="half")
    assert "\n" not in str(e.value)


# ---- the walk ------------------------------------------------------------------------------------

LAYOUTS = {  # name: (chunk_size, sharded)
    "dense": (None, False),
    "chunked": (7, False),  # 29 = 4·7 + 1
    "sharded, chunked": (3, True),  # 4 = 3 + 1
}


@functools.cache
def problem():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(B, D)), rng.normal(size=(PADDED, D))
    x[:4] += 2 * w[LABELS[:4]]
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def arcface(x, w, **walk):
    margin = partial(margins.additive_angular, m=0.5)
    classes = all_classes(w, C, axis_name=walk.get("axis_name"))
    labels = jnp.asarray(LABELS)
    return class_losses.margin_softmax(x, labels, classes, margin=margin, scale=64.0, **walk)


@functools.cache
def gradients(layout, precision, mesh):
    """The losses [b], and both gradients of their sum."""
    chunk_size, sharded = LAYOUTS[layout]
    losses = partial(
        lambda x, w, **kw: arcface(x, w, **kw).loss, chunk_size=chunk_size, precision=precision
    )
    if sharded:
        losses = jax.shard_map(
            partial(losses, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )

    def total(x, w):
        each = losses(x, w)
        return each.sum(), each

    (_, each), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*problem())
    return each, *grads


@every_rounding
def test_every_layout_rounds_alike(precision, mesh8):
    dense, *others = (gradients(layout, precision, mesh8) for layout in LAYOUTS)
    exactly = gradients("dense", "highest", mesh8)
    for got in others:
        for ours, wanted in zip(got, dense, strict=True):
            assert oracles.relative_error(ours, wanted) < 2e-6
        np.testing.assert_array_equal(got[2][C:], 0)
    off = [
        oracles.relative_error(ours, wanted) for ours, wanted in zip(dense, exactly, strict=True)
    ]
    least, most = {"tf32": (1e-6, 3e-3), "bfloat16": (1e-4, 3e-2)}[precision]
    assert all(least <= error <= most for error in off), off


@every_rounding
def test_the_walk_is_the_textbook_form_of_rounded_unit_vectors(precision):
    """The other classes' cosines are of rounded factors, the target's is not."""
    x, w = problem()
    got = jax.jit(partial(arcface, precision=precision))(x, w)
    units = (np.asarray(similarity.normalize(jnp.asarray(a))) for a in (x, w[:C]))
    x, w = (np.float64(rounded(a, precision)) for a in units)
    exact = oracles.cosines(*(np.float64(a) for a in (problem()[0], problem()[1][:C])))
    cos, of_target = x @ w.T, exact[np.arange(B), LABELS]
    cos[np.arange(B), LABELS] = oracles.additive_angular(np.arccos(of_target), 0.5)
    np.testing.assert_allclose(got.target, of_target, rtol=1e-5, atol=1e-7)
    wanted = oracles.cross_entropy(64 * cos, LABELS)
    np.testing.assert_allclose(got.loss, wanted, rtol=2e-5, atol=1e-7)


@every_rounding
def test_where_only_the_target_matters_nothing_is_rounded(precision):
    """The others are at right angles, exactly: what is left is the target's, to the last bit."""
    rng = np.random.default_rng(2)
    x = np.zeros((2, D), np.float32)
    w = np.zeros((6, D), np.float32)
    x[:, :4], w[:2, :4] = rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    x[1], w[1] = np.roll(x[1], 4), np.roll(w[1], 4)
    w[2:, 8:12] = np.eye(4)

    @partial(jax.jit, static_argnums=2)
    def run(x, w, precision):
        def losses(x, w):
            margin = partial(margins.additive_angular, m=0.5)
            kw = {"margin": margin, "scale": 64.0, "precision": precision}
            return class_losses.margin_softmax(x, jnp.arange(2), all_classes(w, 6), **kw).loss

        grads = jax.grad(lambda *a: losses(*a).sum(), (0, 1))(x, w)
        return losses(x, w), *grads

    wanted, got = run(x, w, "highest"), run(x, w, precision)
    np.testing.assert_array_equal(got[0], wanted[0])
    assert np.ptp(wanted[0]) > 1
    for ours, exactly in zip(got[1:], wanted[1:], strict=True):
        assert np.abs(exactly[:2]).max() > 1
        # Where the example and its prototype lie; beside it act the others.
        np.testing.assert_array_equal(ours[0, :4], exactly[0, :4])
        np.testing.assert_array_equal(ours[1, 4:8], exactly[1, 4:8])


@every_rounding
def test_many_problems_at_once_give_what_each_gives(precision):
    x, w = (jnp.stack([a, 2 * a[::-1], -a]) for a in problem())
    run = jax.value_and_grad(
        lambda *a: arcface(*a, chunk_size=8, precision=precision).loss.sum(), (0, 1)
    )
    together = jax.jit(jax.vmap(run))(x, w)
    one = jax.jit(run)
    for i in range(3):
        for got, wanted in zip(
            jax.tree.leaves(together), jax.tree.leaves(one(x[i], w[i])), strict=True
        ):
            assert oracles.relative_error(got[i], wanted) < 2e-6


# ---- every loss ----------------------------------------------------------------------------------

BIAS = {"bias": jnp.float32(-3.0)}
KEY = jax.random.key(0)
angular = partial(margins.additive_angular, m=0.4)
LOSSES = {  # name in class_losses: what each of its variants takes
    "margin_softmax": (
        {"margin": angular, "scale": 16.0},
        {"scale": 1.0, "similarity": similarity.linear},
        {"margin": angular, "scale": 16.0, "similarity": similarity.subcenter_cosine},
        {"scale": 16.0, "smoothing": 0.1, "focal": 2.0},
    ),
    "large_margin_softmax": ({"margin": partial(margins.multiplicative_angular, m=2)},),
    "adaptive_margin_softmax": ({"scale": 16.0},),
    "adacos": ({"running": {"scale": jnp.float32(16.0)}},),
    "curricularface": ({"m": 0.4, "scale": 16.0, "running": {"t": jnp.float32(0.2)}},),
    "mv_softmax": ({"margin": angular, "t": 1.12, "scale": 16.0},),
    "magface": ({"scale": 16.0},),
    "adaface": ({"m": 0.4, "scale": 16.0, "running": class_losses.adaface_start()},),
    "elasticface": ({"m": 0.4, "scale": 16.0, "key": KEY},),
    "circle": ({"m": 0.25, "scale": 16.0},),
    "sphereface2": ({"m": 0.4, "scale": 16.0, "learned": BIAS},),
    "uniface": ({"m": 0.4, "scale": 16.0, "learned": BIAS},),
}


def test_every_loss_is_tried():
    assert set(LOSSES) == set(class_losses.LOSSES)


def rows_of(name, kw, w):
    if name == "adaptive_margin_softmax":
        return class_losses.MarginRows(w, jnp.full(len(w), 0.3))
    if kw.get("similarity") is similarity.linear:
        return similarity.Linear(w, jnp.linspace(-1.0, 1.0, len(w)))
    if kw.get("similarity") is similarity.subcenter_cosine:
        return jnp.stack([w, w[::-1], -w], axis=1)
    return w


@functools.cache
def all_losses(precision):
    """{(loss, variant): what it gives}, in one program."""

    @jax.jit
    def run(x, w):
        return {
            f"{name} {i}": getattr(class_losses, name)(
                x,
                jnp.asarray(LABELS),
                all_classes(rows_of(name, kw, w), C),
                **kw,
                precision=precision,
            )
            for name, variants in LOSSES.items()
            for i, kw in enumerate(variants)
        }

    return jax.tree.map(np.asarray, run(*problem()))


@pytest.mark.parametrize(
    "variant", [f"{name} {i}" for name, variants in LOSSES.items() for i in range(len(variants))]
)
def test_every_loss_hands_its_precision_to_the_walk(variant):
    exactly = all_losses("highest")[variant]
    errors = {}
    for precision in ROUNDED:
        got = all_losses(precision)[variant]
        np.testing.assert_array_equal(got.target, exactly.target)
        errors[precision] = oracles.relative_error(got.loss, exactly.loss)
        assert 0 < oracles.relative_error(got.hardest, exactly.hardest) < 2.0**-7
    assert 0 < errors["tf32"] < errors["bfloat16"] < 2e-2
    assert errors["tf32"] < 2e-3


def test_without_a_precision_the_walk_is_float32():
    args = problem()[0], jnp.asarray(LABELS), all_classes(problem()[1], C)
    wanted = jax.jit(partial(negatives, precision="highest"))(*args)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(negatives)(*args), wanted)
