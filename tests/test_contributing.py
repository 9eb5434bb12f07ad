"""The worked example of CONTRIBUTING.md, run as it stands there."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_margins

from marginface import config as configs
from marginface import sharding
from marginface.losses import margins
from marginface.training import objective

TEXT = pathlib.Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT.read_text(encoding="utf-8"), re.DOTALL)


def test_adding_a_margin_touches_three_places(tmp_path, monkeypatch):
    function, row, experiment = BLOCKS[:3]

    # 1. A function in margins.py: nothing more is imported there.
    names = dict(vars(margins))
    exec(function, names)
    name = re.search(r"def (\w+)", function)[1]
    assert not hasattr(margins, name), "it is there already: choose another example"
    monkeypatch.setattr(margins, name, names[name], raising=False)
    monkeypatch.setitem(margins.MARGINS, name, names[name])
    assert inspect.getdoc(names[name]).startswith("A margin that fades")

    # 2. A test row: what test_margins checks of every row.
    monkeypatch.setattr(test_margins, "CASES", dict(test_margins.CASES))
    exec(row, vars(test_margins))
    (case,) = set(test_margins.CASES) - set(test_margins.CASES_AT_START)
    test_margins.test_value_is_the_textbook_form(case)
    test_margins.test_derivative_is_that_of_the_textbook_form(case)
    test_margins.test_non_increasing_and_continuous_on_zero_to_pi(case)
    test_margins.test_finite_at_and_beyond_the_ends(case)

    # 3. An experiment: it builds, its sweep names real keys, and it has a gradient.
    path = tmp_path / "tapered.py"
    path.write_text(experiment)
    config = configs.load(str(path))
    module = {}
    exec(experiment, module)
    units = []
    module["sweep"](units.append)
    for unit in units:
        configs.override(configs.load(str(path)), unit)
    assert np.abs(slope(config)).min() > 0


def slope(config):
    """The gradient wrt two embeddings."""
    made = objective.make(
        config, num_classes=5, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
    )
    key = jax.random.key(0)

    @jax.jit
    @jax.grad
    def gradient(x):
        hyper = objective.hyper(config)
        params, running = made.init(key, hyper)
        labels = jnp.array([0, 4])
        return made.loss(params, running, {"embedding": x}, labels, hyper, jnp.int32(0), key)[0]

    return gradient(jax.random.normal(key, (2, 3)))


def test_a_loss_of_ones_own_touches_nothing(tmp_path, monkeypatch):
    mine, changes = BLOCKS[3:5]
    term = "def my_term(embeddings, labels):\n    return (embeddings**2).sum(1)\n"
    (tmp_path / "my_losses.py").write_text(f"{mine}\n\n{term}", encoding="utf-8")
    config = configs.load("experiments/cosface.py")
    command = re.search(r"--config\.(loss\.margin)=(my_losses\.py:steep)", TEXT.read_text())
    wanted = slope(config)
    monkeypatch.chdir(tmp_path)
    configs.override(config, {command[1]: command[2]})
    np.testing.assert_array_equal(slope(config), wanted)  # it is CosFace's margin

    with config.unlocked():
        exec(changes, {"config": config})
    config = configs.from_json(configs.to_json(config))  # as a run folder keeps it
    assert np.abs(slope(config)).min() > 0
    made = objective.make(
        config, num_classes=5, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
    )
    key, hyper = jax.random.key(0), objective.hyper(config)
    assert hyper["joint"]["short"].keys() == {"weight"}
    params, running = made.init(key, hyper)
    x, labels = jax.random.normal(key, (2, 3)), jnp.array([0, 4])
    _, (after, figures) = jax.jit(made.loss)(
        params, running, {"embedding": x}, labels, hyper, jnp.int32(0), key
    )
    assert float(after["loss.growing"]["m"]) == np.float32(0.01 * 0.4)
    assert float(figures["train/growing_m"]) == np.float32(0.01 * 0.4)
    np.testing.assert_allclose(figures["loss/short"], np.mean(np.sum(x**2, axis=1)), rtol=1e-6)


def test_a_loss_of_ones_own_is_checked_like_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("bad.py").write_text("def f(:\n")
    pathlib.Path("mine.py").write_text("THREE = 3\ndef steep(c, *, m):\n    return c - m\n")
    for name, message in (
        ("none.py:f", "no such file; did you mean 'mine.py'"),
        ("bad.py:f", "loss.margin='bad.py:f': .*line 1"),
        ("no.such.module:f", "loss.margin='no.such.module:f'"),
        ("mine.py:steap", r"mine.py has no 'steap'; did you mean 'steep'"),
        ("mine.py:THREE", r"loss.margin='mine.py:THREE' is no function"),
        ("mine.py:steep", r"loss.margin_kw.n is not an argument of steep"),
    ):
        config = configs.load(str(TEXT.parent / "experiments" / "cosface.py"))
        with config.unlocked():
            config.loss.margin, config.loss.margin_kw = name, {"n": 0.1}
        with pytest.raises(ValueError, match=message) as error:
            slope(config)
        assert "\n" not in str(error.value)
