from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import P

from marginface.class_softmax import Classes, all_classes
from marginface.regularizers import exclusive

C, PADDED, D = 29, 32, 6
LAYOUTS = {  # name: (rows padded, chunk_size, sharded)
    "dense": (False, None, False),
    "padded": (True, None, False),
    "chunked": (False, 7, False),  # 29 = 4·7 + 1
    "padded, chunked": (True, 7, False),
    "sharded": (True, None, True),
    "sharded, chunked": (True, 3, True),  # 4 = 3 + 1
}


@cache
def prototypes():
    """Prototypes of different norms; the two nearest sit in the first and the last shard."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(C, D)) * rng.uniform(0.5, 3, size=(C, 1))
    w[28] = 0.5 * w[1] + 0.05 * rng.normal(size=D)
    return w.astype(np.float32).astype(np.float64), rng.uniform(0.5, 1.5, size=C)


def weighted(w, weights, chunk_size=None, mesh=None):
    """Σ weights·Sep over the real classes, and Sep."""

    def sep(w, axis_name=None):
        classes = all_classes(w, C, axis_name=axis_name)
        return exclusive(classes, chunk_size=chunk_size, axis_name=axis_name)

    if mesh is not None:
        sep = jax.shard_map(
            partial(sep, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )
    values = sep(w)
    return (values[:C] * weights).sum(), values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_textbook_form(layout, mesh8):
    padded, chunk_size, sharded = LAYOUTS[layout]
    w, weights = prototypes()
    rows = jnp.asarray(w, jnp.float32)
    if padded:  # padding that would be everybody's nearest neighbour
        rows = jnp.concatenate([rows, rows[: PADDED - C]])
    f = partial(weighted, chunk_size=chunk_size, mesh=mesh8 if sharded else None)
    grad, values = jax.jit(jax.grad(f, has_aux=True))(rows, jnp.asarray(weights, jnp.float32))
    (wanted,) = oracles.gradient(lambda w: (oracles.exclusive(w) * weights).sum(), w)
    assert oracles.relative_error(values[:C], oracles.exclusive(w)) < 1e-5
    assert oracles.relative_error(grad[:C], wanted) < 1e-5
    np.testing.assert_array_equal(values[C:], 0)
    np.testing.assert_array_equal(grad[C:], 0)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_gradient_reaches_both_ends_across_shards(sharded, mesh8):
    w, _ = prototypes()
    rows = jnp.concatenate([jnp.asarray(w, jnp.float32), jnp.zeros((PADDED - C, D))])
    only_first = jnp.zeros(C).at[1].set(1.0)  # Sep of class 1, whose neighbour is class 28
    f = partial(weighted, mesh=mesh8 if sharded else None)
    grad, _ = jax.jit(jax.grad(f, has_aux=True))(rows, only_first)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(grad).sum(axis=1)), [1, 28])


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_for_equal_opposite_and_zero_prototypes(dtype):
    w = jnp.array([[1, 2], [1, 2], [-1, -2], [0, 0], [1e-30, 0], [1e6, 0]], dtype)
    sep = jax.jit(jax.value_and_grad(lambda w: exclusive(all_classes(w, 6), chunk_size=4).sum()))
    value, grad = sep(w)
    assert np.isfinite(value)
    assert np.isfinite(grad.astype(np.float32)).all()
    np.testing.assert_array_equal(grad.astype(np.float32)[3], 0)


def test_one_class_has_no_neighbour():
    sep = jax.jit(lambda w: exclusive(all_classes(w, 1)))
    np.testing.assert_array_equal(sep(jnp.ones((3, 2))), 0)


def test_a_chunk_size_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="chunk_size is 0; give a positive number or None"):
        exclusive(all_classes(jnp.ones((3, 2)), 3), chunk_size=0)


def test_chunks_take_at_most_five_percent_of_the_dense_memory():
    """Compiled only: C = 32,768, d = 512, against the whole matrix of cosines."""
    c = 32768

    def dense(w):
        unit = w / jnp.linalg.norm(w, axis=1, keepdims=True)
        cos = jnp.where(jnp.eye(c, dtype=bool), -jnp.inf, unit @ unit.T)
        return cos.max(axis=1).mean()

    def chunked(w):
        return exclusive(Classes(w, jnp.arange(c)), chunk_size=2048).mean()

    def temporary(f):
        step = jax.jit(jax.grad(f)).lower(jax.ShapeDtypeStruct((c, 512), jnp.float32))
        return step.compile().memory_analysis().temp_size_in_bytes

    assert temporary(chunked) <= 0.05 * temporary(dense)
