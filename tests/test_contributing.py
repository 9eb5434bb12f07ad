"""The worked example of CONTRIBUTING.md, run as it stands there."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import test_margins

from marginface import config as configs
from marginface import sharding
from marginface.losses import margins
from marginface.training import objective

TEXT = pathlib.Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def test_adding_a_margin_touches_three_places(tmp_path, monkeypatch):
    function, row, experiment = re.findall(r"```python\n(.*?)```", TEXT.read_text(), re.DOTALL)

    # 1. A function in margins.py: nothing more is imported there.
    names = dict(vars(margins))
    exec(function, names)
    name = re.search(r"def (\w+)", function)[1]
    assert not hasattr(margins, name), "it is there already: choose another example"
    monkeypatch.setattr(margins, name, names[name], raising=False)
    assert inspect.getdoc(names[name]).startswith("Li-ArcFace")

    # 2. A test row: what test_margins checks of every row.
    monkeypatch.setattr(test_margins, "CASES", dict(test_margins.CASES))
    exec(row, vars(test_margins))
    (case,) = set(test_margins.CASES) - set(test_margins.CASES_AT_START)
    test_margins.test_value_is_the_textbook_form(case)
    test_margins.test_derivative_is_that_of_the_textbook_form(case)
    test_margins.test_non_increasing_and_continuous_on_zero_to_pi(case)
    test_margins.test_finite_at_and_beyond_the_ends(case)

    # 3. An experiment: it builds, its sweep names real keys, and it has a gradient.
    path = tmp_path / "li_arcface.py"
    path.write_text(experiment)
    config = configs.load(str(path))
    module = {}
    exec(experiment, module)
    units = []
    module["sweep"](units.append)
    for unit in units:
        configs.override(configs.load(str(path)), unit)
    made = objective.make(
        config, num_classes=5, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
    )
    key = jax.random.key(0)

    @jax.jit
    @jax.grad
    def slope(x):
        hyper = objective.hyper(config)
        params, running = made.init(key, hyper)
        labels = jnp.array([0, 4])
        return made.loss(params, running, {"embedding": x}, labels, hyper, jnp.int32(0), key)[0]

    assert np.abs(slope(jax.random.normal(key, (2, 3)))).min() > 0
