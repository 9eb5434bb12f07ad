from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from marginface.losses import margins

THETA = np.linspace(0, np.pi, 4001)
CASES = {
    "identity": (margins.identity, oracles.identity),
    **{
        f"multiplicative_angular({m})": (
            partial(margins.multiplicative_angular, m=m),
            partial(oracles.multiplicative_angular, m=m),
        )
        for m in (1, 2, 3, 4, 1.35, 1.7)
    },
    **{
        f"additive_cosine({m})": (
            partial(margins.additive_cosine, m=m),
            partial(oracles.additive_cosine, m=m),
        )
        for m in (0.0, 0.35)
    },
    **{
        f"additive_angular({m})": (
            partial(margins.additive_angular, m=m),
            partial(oracles.additive_angular, m=m),
        )
        for m in (0.0, 0.3, 0.5, 1.5)
    },
    **{
        f"combined{m}": (
            partial(margins.combined, m1=m[0], m2=m[1], m3=m[2]),
            partial(oracles.combined, m1=m[0], m2=m[1], m3=m[2]),
        )
        for m in ((1, 0.3, 0.2), (0.9, 0.4, 0.15), (2, 0.1, 0.0))
    },
}
CASES |= {
    f"annealed({lam})": (
        margins.anneal(partial(margins.multiplicative_angular, m=4), lam),
        lambda theta, lam=lam: (
            (lam * np.cos(theta) + oracles.multiplicative_angular(theta, 4)) / (1 + lam)
        ),
    )
    for lam in (0.0, 5.0, 1000.0)
}
CASES |= {
    "detached": (
        margins.detach(CASES["additive_angular(0.5)"][0]),
        CASES["additive_angular(0.5)"][1],
    )
}
CASES_AT_START = tuple(CASES)
cases = pytest.mark.parametrize("case", CASES)


def slopes(margin, c):
    return jax.vmap(jax.grad(lambda one: margin(one[None])[0]))(c)


@cases
def test_value_is_the_textbook_form(case):
    margin, oracle = CASES[case]
    c = jnp.cos(THETA).astype(jnp.float32)
    exact = np.arccos(np.clip(np.asarray(c, np.float64), -1, 1))
    np.testing.assert_allclose(margin(c), oracle(exact), atol=4e-6)


@cases
def test_non_increasing_and_continuous_on_zero_to_pi(case):
    margin, _ = CASES[case]
    steps = np.diff(np.asarray(margin(jnp.cos(THETA).astype(jnp.float32)), np.float64))
    assert steps.max() <= 1e-6
    assert steps.min() >= -8 * np.diff(THETA).max()  # no jump: |dψ/dθ| ≤ m1 ≤ 4, with rounding


@pytest.mark.parametrize("case", [case for case in CASES if case != "detached"])
def test_derivative_is_that_of_the_textbook_form(case):
    margin, oracle = CASES[case]
    c = np.linspace(-0.99, 0.99, 37)
    wanted = (oracle(np.arccos(c + 1e-6)) - oracle(np.arccos(c - 1e-6))) / 2e-6
    np.testing.assert_allclose(
        slopes(margin, jnp.asarray(c, jnp.float32)), wanted, rtol=1e-4, atol=1e-4
    )


@cases
def test_finite_at_and_beyond_the_ends(case):
    margin, _ = CASES[case]
    ends = jnp.array([1, -1, 1 - 2**-24, -1 + 2**-24, 1 + 2**-20, -1 - 2**-20], jnp.float32)
    assert np.isfinite(margin(ends)).all()
    assert np.isfinite(slopes(margin, ends)).all()


@pytest.mark.parametrize("case", ["additive_angular(0.5)", "multiplicative_angular(4)"])
def test_detached_has_the_value_of_the_margin_and_the_derivative_of_the_identity(case):
    margin, _ = CASES[case]
    c = jnp.linspace(-1, 1, 21)
    np.testing.assert_allclose(margins.detach(margin)(c), margin(c), atol=1e-6)
    np.testing.assert_array_equal(slopes(margins.detach(margin), c), 1.0)
    assert np.abs(slopes(margin, c) - 1).max() > 0.1


def test_arcface_does_not_jump_where_the_angle_passes_pi():
    theta = np.pi - 0.5 + np.array([-1e-3, 1e-3])
    psi = margins.additive_angular(jnp.cos(theta).astype(jnp.float32), m=0.5)
    assert abs(float(psi[0] - psi[1])) < 1e-5  # the common fallback c − m·sin m jumps by 0.118


def test_a_negative_angular_margin_is_clipped_at_zero():
    psi = margins.additive_angular(jnp.cos(jnp.array([0.1, 0.2, 0.3])), m=-0.25)
    np.testing.assert_allclose(psi, np.cos([0, 0, 0.05]), atol=1e-6)


def test_parameters_may_be_per_example_and_traced_without_recompiling():
    traces = []

    @jax.jit
    def psi(c, m, lam):
        traces.append(1)
        angular = margins.additive_angular(c, m=m)
        multiplied = margins.anneal(partial(margins.multiplicative_angular, m=1 + m), lam)(c)
        return angular, multiplied, margins.combined(c, m1=1.0, m2=m, m3=m)

    theta = np.array([0.3, 1.0, 2.9])
    for m in (np.array([0.5, 0.1, 0.4]), np.array([0.0, 0.2, 0.6])):
        angular, _, both = psi(jnp.cos(theta), jnp.asarray(m), jnp.float32(5))
        np.testing.assert_allclose(angular, oracles.additive_angular(theta, m), atol=1e-6)
        np.testing.assert_allclose(both, oracles.combined(theta, 1, m, m), atol=1e-6)
    assert len(traces) == 1
