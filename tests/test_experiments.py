"""Every experiment: configs build for all data, sweeps name real keys, losses are finite."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import common
from marginface import build, sharding
from marginface import config as configs
from marginface.losses import margins
from marginface.training import objective

FILES = sorted(
    p
    for p in pathlib.Path(common.__file__).parent.glob("*.py")
    if p.name not in ("__init__.py", "common.py")
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("data", ["synthetic", "small", "lfw", "folder", "casia"])
def test_configs_build_and_sweeps_name_real_keys(path, data):
    config = configs.load(f"{path}:data={data}")
    build.make_model(config)
    module = __import__(f"experiments.{path.stem}", fromlist=["sweep"])
    units = []
    module.sweep(units.append, f"data={data}")
    assert len(units) >= 3
    assert {"model.embedding_dim"} <= set().union(*units), "every sweep varies the dimension"
    for unit in units:
        configs.override(configs.load(f"{path}:data={data}"), unit)
    assert f"experiments/{path.name}" in path.read_text(), "the docstring gives the command"


def test_what_trains_in_one_program_has_numbers_of_one_structure():
    """Equal but for numbers: then `hyper` has the same keys, and can be stacked."""
    found = {}
    for path in FILES:
        for data in ("small", "casia"):
            config = configs.load(f"{path}:data={data}")
            same = json.dumps(objective.static(config), sort_keys=True, default=list)
            with config.unlocked():
                config.seed, config.optimizer.learning_rate = 7, 0.5
            again = json.dumps(objective.static(config), sort_keys=True, default=list)
            assert again == same, "seed and learning rate are traced"
            found.setdefault(same, []).append(jax.tree.structure(objective.hyper(config)))
    for structures in found.values():
        assert len(set(structures)) == 1


def test_a_sweep_key_with_a_typo_names_the_nearest():
    config = configs.load("experiments/arcface.py")
    with pytest.raises(ValueError, match=r"did you mean 'loss\.margin_kw\.m'"):
        configs.override(config, {"loss.margin_kv.m": 0.1})


def objective_and_gradients(config, devices):
    """State before and after, (total, metrics), gradients wrt params and the network's output."""
    made = objective.make(
        config, num_classes=10, embedding_dim=4, mesh=sharding.make_mesh(devices), total_steps=9
    )
    hyper = objective.hyper(config)
    labels = jnp.array([0, 0, 3, 9, 9, 4, 7, 7])

    @jax.jit
    def step(key, x):
        params, running = made.init(key, hyper)
        groups = config.model.kw.get("num_groups", 1)
        output = {"embedding": x, "group_logits": jnp.tile(x[:, :1], groups) * jnp.arange(groups)}

        def loss(params, output):
            return made.loss(params, running, output, labels, hyper, jnp.int32(7), key)

        return running, jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, output)

    x = jax.random.normal(jax.random.key(1), (8, 4))
    return jax.device_get(step(jax.random.key(0), x))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_objective_is_finite_and_the_same_on_one_device_and_eight(path):
    config = configs.load(str(path))
    eight = objective_and_gradients(config, 8)
    # Plain losses over classes are compared in test_class_losses; a sample is drawn per device.
    several = any(config[section] for section in objective.MODULES) or eight[0]
    if several:
        one = objective_and_gradients(config, 1)
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-4)
        jax.tree.map(close, one, eight)
    running, ((total, (after, metrics)), (grads, grad_output)) = eight
    for leaf in jax.tree.leaves((total, metrics, grads, grad_output, after)):
        assert np.isfinite(leaf).all()
    assert jax.tree.structure(running) == jax.tree.structure(after)
    assert np.abs(grad_output["embedding"]).max() > 0
    terms = {name for section in objective.MODULES for name in config[section]}
    terms |= {config.loss.name} - {""}
    assert {f"loss/{name}" for name in terms} < set(metrics)
    if config.loss.name:
        weights = objective.weights(jax.tree.map(jnp.asarray, grads["prototypes"]))
        assert np.abs(weights[:10]).max() > 0
        np.testing.assert_array_equal(weights[10:], 0)


def test_terms_without_an_experiment_are_the_same_on_one_device_and_eight():
    config = configs.load("experiments/arcface.py").unlock()
    config.joint.learned_center = {"weight": 0.1}
    config.joint.norm_penalty = {"weight": 0.1, "radius": 2.0}
    config.regularizers.hyperspherical_energy = {"weight": 0.1, "power": 2.0, "chunk_size": 3}
    one, eight = (objective_and_gradients(config, devices) for devices in (1, 8))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-4)
    jax.tree.map(close, one, eight)
    _, (_, (grads, _)) = eight
    centers = grads["terms"]["learned_center"]["centers"]
    assert np.abs(centers[[0, 3, 4, 7, 9]]).max(axis=1).min() > 0
    np.testing.assert_array_equal(np.delete(centers, [0, 3, 4, 7, 9], axis=0), 0)


def test_annealing_is_sphereface_s():
    """λ as Caffe's training files have it: max(5, 1000 (1 + 0.12 step)^−1)."""
    config = configs.load("experiments/asoftmax.py:data=casia")
    anneal = objective.hyper(config)["anneal"]
    for step in (0, 1, 100, 5000):
        expected = max(5.0, 1000.0 / (1.0 + 0.12 * step))
        found = objective.annealed_weight(jnp.int32(step), anneal)
        assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("data", ["synthetic", "small", "lfw"])
def test_annealing_is_done_after_half_of_a_small_run(data):
    config = configs.load(f"experiments/asoftmax.py:data={data}")
    kw = config.data.kw
    images = 9_525 if data == "lfw" else kw.identities * kw.samples
    half = config.epochs * images / config.batch_size / 2
    anneal = objective.hyper(config)["anneal"]
    assert float(objective.annealed_weight(jnp.int32(0.9 * half), anneal)) > 5.05
    assert float(objective.annealed_weight(jnp.int32(1.1 * half), anneal)) == 5.0


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


def test_exclusive_weights_are_the_authors_on_full_size_data():
    for name, expected in (
        ("normface", {"weight": 6.0}),
        ("asoftmax", {"weight": 15.0, "ramp": "inverse_anneal"}),
    ):
        term = configs.load(f"experiments/{name}_regular.py:data=casia").regularizers.exclusive
        assert term.to_dict() == {"chunk_size": term.chunk_size, **expected}
        term = configs.load(f"experiments/{name}_regular.py:data=small").regularizers.exclusive
        assert term.to_dict() == {"chunk_size": term.chunk_size, "weight": 1.0}
