"""Every experiment: configs build for all data, sweeps name real keys, losses are finite."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import common
from marginface import config as configs
from marginface import margins, objective, sharding, train

FILES = sorted(
    p
    for p in pathlib.Path(common.__file__).parent.glob("*.py")
    if p.name not in ("__init__.py", "common.py")
)
NAMES = (
    "arcface",
    "arcface_regular",
    "asoftmax",
    "asoftmax_regular",
    "combined",
    "cosface",
    "normface",
    "softmax",
    "softmax_regular",
)


def test_all_are_there():
    assert tuple(p.stem for p in FILES) == NAMES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("data", ["synthetic", "lfw", "folder", "casia"])
def test_configs_build_and_sweeps_name_real_keys(path, data):
    config = configs.load(f"{path}:data={data}")
    train.make_model(config)
    module = __import__(f"experiments.{path.stem}", fromlist=["sweep"])
    units = []
    module.sweep(units.append, f"data={data}")
    assert len(units) >= 3
    assert {"model.embedding_dim"} <= set().union(*units)
    for unit in units:
        configs.override(configs.load(f"{path}:data={data}"), unit)
    assert f"experiments/{path.name}" in path.read_text(), "the docstring gives the command"


def test_a_sweep_key_with_a_typo_names_the_nearest():
    config = configs.load(str(FILES[0]))
    with pytest.raises(ValueError, match=r"did you mean 'loss\.margin_kw\.m'"):
        configs.override(config, {"loss.margin_kv.m": 0.1})


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_objective_has_finite_losses_and_gradients(path):
    config = configs.load(str(path))
    made = objective.make(config, num_classes=10, embedding_dim=4, mesh=sharding.make_mesh(2))
    prototypes = made.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (6, 4))
    labels = jnp.arange(6) % 10

    def loss(prototypes, x):
        return made.loss(prototypes, x, labels, objective.hyper(config), jnp.int32(7))

    (total, metrics), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        prototypes, x
    )
    weighted = metrics["loss/margin_softmax"]
    if "loss/exclusive" in metrics:
        weighted += config.regularizers.exclusive.weight * metrics["loss/exclusive"]
    np.testing.assert_allclose(total, weighted, rtol=1e-6)
    for leaf in jax.tree.leaves((total, grads)):
        assert np.isfinite(leaf).all()
    weights = objective.weights(grads[0])
    assert np.abs(weights[:10]).max() > 0
    np.testing.assert_array_equal(weights[10:], 0)


def test_annealing_is_sphereface_s():
    """λ as Caffe's training files have it: max(5, 1000 (1 + 0.12 step)^−1)."""
    config = configs.load("experiments/asoftmax.py")
    anneal = objective.hyper(config)["anneal"]
    for step in (0, 1, 100, 5000):
        expected = max(5.0, 1000.0 / (1.0 + 0.12 * step))
        found = objective.annealed_weight(jnp.int32(step), anneal)
        assert float(found) == pytest.approx(expected, rel=1e-6)


def test_parse_arg_speaks_of_every_mistake():
    assert common.parse_arg("a=2,b=x", a=1, b="") == {"a": 2, "b": "x"}
    for text, expected in (("c=1", "unknown key"), ("a=x", "is not int"), ("a", "write a=")):
        with pytest.raises(ValueError, match=expected):
            common.parse_arg(text, a=1, b="")


def test_margins_are_the_published_ones_on_full_size_data():
    for name, m in (("arcface", 0.5), ("cosface", 0.35)):
        config = configs.load(f"experiments/{name}.py:data=casia")
        assert config.loss.margin_kw.m == m
        assert (config.loss.scale, config.batch_size, config.model.embedding_dim) == (
            64.0,
            512,
            512,
        )
        assert callable(getattr(margins, config.loss.margin))
