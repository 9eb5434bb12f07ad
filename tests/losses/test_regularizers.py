from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import P

from marginface.losses.class_softmax import Classes, all_classes
from marginface.losses.regularizers import exclusive, hyperspherical_energy, uniform

C, PADDED, D = 29, 32, 6


def mean_over_others(potential, w):
    """1/(C−1) Σ_{j≠i} potential(cos(W_i, W_j)), by two loops."""
    cos = oracles.cosines(w, w)
    return np.array(
        [
            sum(potential(cos[i, j]) for j in range(len(w)) if j != i) / (len(w) - 1)
            for i in range(len(w))
        ]
    )


REGULARIZERS = {  # ours, hyper-parameters, textbook
    "exclusive": (exclusive, {}, oracles.exclusive),
    "uniform": (
        uniform,
        {"offset": 1.0},
        partial(mean_over_others, lambda c: 1 / (np.sqrt(2 - 2 * c) + 1)),
    ),
    "uniform, no offset": (
        uniform,
        {"offset": 0.0},
        partial(mean_over_others, lambda c: 1 / np.sqrt(2 - 2 * c)),
    ),
    "energy": (
        hyperspherical_energy,
        {"power": 2.0},
        partial(mean_over_others, lambda c: 1 / np.arccos(c) ** 2),
    ),
    "energy, power 1.5": (
        hyperspherical_energy,
        {"power": 1.5},
        partial(mean_over_others, lambda c: 1 / np.arccos(c) ** 1.5),
    ),
}
FUNCTIONS = (exclusive, uniform, hyperspherical_energy)
LAYOUTS = {  # name: (rows padded, chunk_size, sharded)
    "dense": (False, None, False),
    "padded": (True, None, False),
    "chunked": (False, 7, False),  # 29 = 4·7 + 1
    "padded, chunked": (True, 7, False),
    "sharded": (True, None, True),
    "sharded, chunked": (True, 3, True),  # 4 = 3 + 1
}
functions = pytest.mark.parametrize("ours", FUNCTIONS)


@cache
def prototypes():
    """Prototypes of different norms; the two nearest sit in the first and the last shard."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(C, D)) * rng.uniform(0.5, 3, size=(C, 1))
    w[28] = 0.5 * w[1] + 0.6 * rng.normal(size=D)
    return w.astype(np.float32).astype(np.float64), rng.uniform(0.5, 1.5, size=C)


@cache
def textbook(name):
    """Values, and the gradient of their weighted sum."""
    w, weights = prototypes()
    oracle = REGULARIZERS[name][2]
    return oracle(w), oracles.gradient(lambda w: (oracle(w) * weights).sum(), w)[0]


def weighted(w, weights, hyper=None, ours=exclusive, chunk_size=None, mesh=None):
    """Σ weights·values over the real classes, and the values."""

    def per_class(w, hyper, axis_name=None):
        classes = all_classes(w, C, axis_name=axis_name)
        return ours(classes, **hyper, chunk_size=chunk_size, axis_name=axis_name)

    if mesh is not None:
        per_class = jax.shard_map(
            partial(per_class, axis_name="data"),
            mesh=mesh,
            in_specs=(P("data"), P()),
            out_specs=P("data"),
        )
    values = per_class(w, hyper or {})
    return (values[:C] * weights).sum(), values


@cache
def compiled(layout, ours, mesh):
    """(gradient, values), one program for all hyper-parameters."""
    _, chunk_size, sharded = LAYOUTS[layout]
    kw = {"ours": ours, "chunk_size": chunk_size, "mesh": mesh if sharded else None}
    return jax.jit(jax.grad(partial(weighted, **kw), has_aux=True))


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_textbook_form(layout, name, mesh8):
    w, weights = prototypes()
    rows = jnp.asarray(w, jnp.float32)
    if LAYOUTS[layout][0]:  # padding that would be everybody's nearest neighbour
        rows = jnp.concatenate([rows, rows[: PADDED - C]])
    ours, hyper, _ = REGULARIZERS[name]
    grad, values = compiled(layout, ours, mesh8)(rows, jnp.asarray(weights, jnp.float32), hyper)
    wanted, wanted_grad = textbook(name)
    assert oracles.relative_error(values[:C], wanted) < 1e-5
    assert oracles.relative_error(grad[:C], wanted_grad) < 1e-5
    np.testing.assert_array_equal(values[C:], 0)
    np.testing.assert_array_equal(grad[C:], 0)


RANDOM = {  # ours, a hyper-parameter and its range, textbook of prototypes and it
    "exclusive": (exclusive, {}, oracles.exclusive),
    "uniform": (
        uniform,
        {"offset": (0.0, 2.0)},
        lambda w, offset: mean_over_others(lambda c: 1 / (np.sqrt(2 - 2 * c) + offset), w),
    ),
    "hyperspherical_energy": (
        hyperspherical_energy,
        {"power": (0.5, 3.0)},
        lambda w, power: mean_over_others(lambda c: 1 / np.arccos(np.clip(c, -1, 1)) ** power, w),
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RANDOM)
def test_a_thousand_random_cases_are_the_textbook_form(name):
    """Sizes stay, so that one program serves; all else is drawn, the hard spots among it."""
    (ours, ranges, oracle), count, c, d = RANDOM[name], 1000, 7, 3
    rng = np.random.default_rng(len(name))
    w = rng.normal(size=(count, c, d)) * 10 ** rng.uniform(-4, 4, size=(count, c, 1))
    w[1::10, 1] = w[1::10, 0]  # duplicate prototypes
    w[2::10, 1] = -3 * w[2::10, 0]  # opposite ones
    w[3::10, 2] = 0
    w[4::10] = w[4::10, :1] * rng.choice([-1, 1], size=(100, c, 1))  # one line holds all
    hyper = {key: np.float32(rng.uniform(*ends, size=count)) for key, ends in ranges.items()}
    single = np.float32(w)
    w = single.astype(np.float64)

    @jax.jit
    @jax.vmap
    def run(w, hyper):
        def total(w):
            values = ours(all_classes(w, c), **hyper)
            return values.sum(), values

        return jax.grad(total, has_aux=True)(w)

    grads, values = run(single, hyper)
    assert np.isfinite(values).all()
    assert np.isfinite(grads).all()
    values, compared = np.asarray(values), 0
    for i in range(count):
        if not np.linalg.norm(w[i], axis=1).all():
            continue  # a norm of 0 has no direction
        nearest = np.arccos(np.clip(oracles.exclusive(w[i]), -1, 1))
        # A cosine is off by 2⁻²² = ε. θ^−power is off by power·ε/(θ sin θ) of itself and the
        # inverse distance by ε/θ²: 7e-5 at 0.1 rad. Classes that have one closer are left out, also
        # since below 0.0045 rad we hold the potential. θ = π is off by √(2ε) = 7e-4, which counts
        # most where all others are there.
        apart = nearest > (-1 if ours is exclusive else 0.1)
        rtol, atol = (0, 5e-7) if ours is exclusive else (1e-3 if i % 10 == 4 else 2e-4, 0)
        compared += apart.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = oracle(w[i], **{key: float(drawn[i]) for key, drawn in hyper.items()})
        slack = rtol * np.abs(wanted) + atol
        assert (np.abs(values[i] - wanted) <= slack)[apart].all(), i
    assert compared > 0.7 * count * c


@pytest.mark.parametrize("name", ["uniform", "energy"])
def test_bfloat16_is_summed_in_float32(name, mesh8):
    w, weights = prototypes()
    rough = jnp.concatenate([jnp.asarray(w, jnp.bfloat16), jnp.ones((PADDED - C, D), jnp.bfloat16)])
    ours, hyper, _ = REGULARIZERS[name]
    run = compiled("sharded, chunked", ours, mesh8)
    wide_grad, wide = run(rough.astype(jnp.float32), jnp.asarray(weights, jnp.float32), hyper)
    grad, values = run(rough, jnp.asarray(weights, jnp.float32), hyper)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(values, wide)
    np.testing.assert_array_equal(grad, wide_grad.astype(jnp.bfloat16))


@pytest.mark.parametrize("sharded", [False, True])
def test_the_gradient_reaches_both_ends_across_shards(sharded, mesh8):
    w, _ = prototypes()
    rows = jnp.concatenate([jnp.asarray(w, jnp.float32), jnp.zeros((PADDED - C, D))])
    only_first = jnp.zeros(C).at[1].set(1.0)  # Sep of class 1, whose neighbour is class 28
    f = partial(weighted, mesh=mesh8 if sharded else None)
    grad, _ = jax.jit(jax.grad(f, has_aux=True))(rows, only_first)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(grad).sum(axis=1)), [1, 28])


@pytest.mark.parametrize("devices", [2, 3, 5, 6])
def test_exclusive_is_the_same_on_any_number_of_devices(devices):
    """Blocks of classes meet half around the ring: an odd one, an even one, every pair once."""
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    w, weights = prototypes()
    rows = jnp.concatenate([jnp.asarray(w, jnp.float32), jnp.ones((1, D))])
    f = partial(weighted, mesh=mesh, chunk_size=2)
    grad, values = jax.jit(jax.grad(f, has_aux=True))(rows, jnp.asarray(weights, jnp.float32))
    wanted, wanted_grad = textbook("exclusive")
    assert oracles.relative_error(values[:C], wanted) < 1e-5
    assert oracles.relative_error(grad[:C], wanted_grad) < 1e-5


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_of_equally_near_classes_the_first_is_taken(sharded, chunk_size, mesh8):
    """In every layout, so that the gradient is one."""
    rows = jnp.tile(jnp.eye(D)[:2], (PADDED // 2, 1))[:C]
    rows = jnp.concatenate([rows, jnp.zeros((PADDED - C, D))])
    only = jnp.zeros(C).at[20].set(1.0)  # equal to 0, 2, 4, ...: its partner is 0
    rows = rows.at[20].set(2 * rows[20] + 0.01 * jnp.eye(D)[3])
    f = partial(weighted, chunk_size=chunk_size, mesh=mesh8 if sharded else None)
    grad, _ = jax.jit(jax.grad(f, has_aux=True))(rows, only)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(grad).sum(axis=1)), [0, 20])


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_rounded_search_finds_a_pair_as_near_within_its_rounding(precision, sharded, mesh8):
    w, weights = prototypes()
    rows = jnp.concatenate([jnp.asarray(w, jnp.float32), jnp.ones((PADDED - C, D))])
    ours = partial(exclusive, precision=precision)
    f = partial(weighted, ours=ours, chunk_size=3, mesh=mesh8 if sharded else None)
    _, values = jax.jit(jax.grad(f, has_aux=True))(rows, jnp.asarray(weights, jnp.float32))
    wanted, _ = textbook("exclusive")
    short = wanted - values[:C]
    assert short.min() > -1e-6  # what is found is a cosine of float32
    assert short.max() < {"tf32": 2**-10, "bfloat16": 2**-7}[precision]


def test_equals_pytorch_metric_learning():
    torch = pytest.importorskip("torch", reason="the `peers` extra is not installed")
    peers = pytest.importorskip(
        "pytorch_metric_learning.regularizers", reason="the `peers` extra is not installed"
    )
    w, _ = prototypes()
    theirs = torch.tensor(w, requires_grad=True)
    value = peers.RegularFaceRegularizer()(theirs)
    value.backward()
    grad, values = jax.jit(jax.grad(weighted, has_aux=True))(
        jnp.asarray(w, jnp.float32), jnp.full(C, 1 / C)
    )
    assert oracles.relative_error(values.mean(), value.item()) < 1e-5
    assert oracles.relative_error(grad, theirs.grad) < 1e-5


@functions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_for_equal_opposite_and_zero_prototypes(dtype, ours):
    w = jnp.array([[1, 2], [1, 2], [-1, -2], [0, 0], [1e-30, 0], [1e6, 0]], dtype)
    total = jax.jit(jax.value_and_grad(lambda w: ours(all_classes(w, 6), chunk_size=4).sum()))
    value, grad = total(w)
    assert np.isfinite(value)
    assert np.isfinite(grad.astype(np.float32)).all()
    np.testing.assert_array_equal(grad.astype(np.float32)[3], 0)


@functions
def test_one_class_has_no_neighbour(ours):
    values = jax.jit(lambda w: ours(all_classes(w, 1)))
    np.testing.assert_array_equal(values(jnp.ones((3, 2))), 0)


@functions
def test_a_chunk_size_that_is_not_positive_is_refused(ours):
    with pytest.raises(ValueError, match="chunk_size is 0; give a positive number or None"):
        ours(all_classes(jnp.ones((3, 2)), 3), chunk_size=0)


@functions
def test_chunks_take_at_most_five_percent_of_the_dense_memory(ours):
    """Compiled only: C = 32,768, d = 512, against the whole matrix of cosines."""
    c = 32768

    def dense(w):
        unit = w / jnp.linalg.norm(w, axis=1, keepdims=True)
        cos = jnp.where(jnp.eye(c, dtype=bool), -jnp.inf, unit @ unit.T)
        return cos.max(axis=1).mean()

    def temporary(f):
        step = jax.jit(jax.grad(f)).lower(jax.ShapeDtypeStruct((c, 512), jnp.float32))
        return step.compile().memory_analysis().temp_size_in_bytes

    def of_all(chunk_size):
        return lambda w: ours(Classes(w, jnp.arange(c)), chunk_size=chunk_size).mean()

    whole = temporary(dense if ours is exclusive else of_all(None))
    assert temporary(of_all(2048)) <= 0.05 * whole
