import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from marginface.losses import similarity


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 7)), rng.normal(size=(11, 7)), rng.normal(size=11)


def test_cosine_is_the_textbook_form(arrays):
    x, w, _ = arrays
    got = similarity.cosine(jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_allclose(got, oracles.cosines(x, w), atol=1e-6)


def test_linear_is_the_textbook_form(arrays):
    x, w, bias = arrays
    got = similarity.linear(jnp.asarray(x), similarity.Linear(jnp.asarray(w), jnp.asarray(bias)))
    np.testing.assert_allclose(got, x @ w.T + bias, atol=1e-5)


def test_bfloat16_inputs_are_computed_in_float32(arrays):
    x, w, bias = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    x64, w64, bias64 = (np.asarray(a, np.float64) for a in (x, w, bias))
    cos = similarity.cosine(x, w)
    products = similarity.linear(x, similarity.Linear(w, bias))
    assert cos.dtype == products.dtype == jnp.float32
    np.testing.assert_allclose(cos, oracles.cosines(x64, w64), atol=1e-6)
    np.testing.assert_allclose(products, x64 @ w64.T + bias64, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-11, 1e15])
def test_any_norm_gives_finite_values_and_gradients(size):
    x = jnp.full((1, 4), size)
    for f in (similarity.normalize, similarity.norm, lambda a: similarity.cosine(a, jnp.eye(4))):
        value, back = jax.vjp(f, x)
        assert np.isfinite(value).all()
        assert np.isfinite(back(jnp.ones_like(value))[0]).all()


def test_a_zero_vector_has_cosine_zero_and_no_gradient():
    x = jnp.zeros((1, 4))
    value, back = jax.vjp(similarity.cosine, x, jnp.eye(4))
    np.testing.assert_array_equal(value, 0)
    for gradient in back(jnp.ones_like(value)):
        np.testing.assert_array_equal(gradient, 0)


def test_norm_is_the_textbook_form(arrays):
    x = arrays[0]
    np.testing.assert_allclose(
        similarity.norm(jnp.asarray(x)), np.linalg.norm(x, axis=1), rtol=1e-6
    )
    unit = similarity.normalize(jnp.asarray(x))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
