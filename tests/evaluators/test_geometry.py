import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from marginface.evaluators import common, geometry


def brute_force(rows):
    rows = rows.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -np.inf)
    sep = cosine.max(axis=1)
    return {"prototypes/sep_mean": sep.mean(), "prototypes/sep_var": sep.var()}


def weights(state):
    return state["params"]["prototypes"]


def evaluator(prototypes, **kw):
    return geometry.Evaluator(common.Subject("prototypes", prototypes=prototypes, **kw))


@pytest.fixture(scope="module")
def state():
    rng = np.random.default_rng(0)
    # Lengths differ, and two padding rows lie exactly on real ones: neither may count.
    rows = rng.normal(size=(40, 8)) * rng.uniform(0.1, 10, size=(40, 1))
    rows[38:] = rows[:2]
    return {"params": {"prototypes": rows.astype(np.float32)}}


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_equals_brute_force_without_padding_rows(state, chunk_size):
    found = dict(evaluator(weights, num_classes=38, chunk_size=chunk_size).run(state))
    assert found == pytest.approx(brute_force(weights(state)[:38]), rel=1e-4)


def test_sharded_rows(state, mesh8):
    sharded = jax.device_put(weights(state), NamedSharding(mesh8, PartitionSpec("data")))
    measure = evaluator(weights, num_classes=38, chunk_size=2, mesh=mesh8)
    found = dict(measure.run({"params": {"prototypes": sharded}}))
    assert found == pytest.approx(brute_force(weights(state)[:38]), rel=1e-4)


def test_simplex_is_the_best_separated():
    simplex = np.eye(5, dtype=np.float32) - 0.2  # five directions, every cosine −1/4
    found = dict(evaluator(lambda s: s, num_classes=5).run(simplex))
    assert found["prototypes/sep_mean"] == pytest.approx(-0.25, abs=1e-6)
    assert found["prototypes/sep_var"] == pytest.approx(0.0, abs=1e-10)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes or more, num_classes=1"):
        evaluator(weights, num_classes=1)


def test_nothing_is_said_where_classes_have_no_prototype_or_several(tmp_path):
    none = evaluator(None, num_classes=5)
    assert list(none.run({})) == []
    assert none.arrays() == {}
    assert list(none.pictures(tmp_path)) == []
