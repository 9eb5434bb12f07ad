"""Every experiment: configs build for all data, sweeps name real keys, losses are finite.

What the docstrings state is what the tables in experiments/results hold.
"""

import ast
import csv
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import common
from marginface import build, sharding
from marginface import config as configs
from marginface.losses import margins
from marginface.report.study import published, statistics
from marginface.training import objective

FILES = sorted(
    p
    for p in pathlib.Path(common.__file__).parent.glob("*.py")
    if p.name not in ("__init__.py", "common.py")
)


RESULTS = pathlib.Path(common.__file__).parent / "results"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("data", common.PRESETS)
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


# --- what docstrings state -----------------------------------------------------------------------

ACCURACY = ("accuracy", "synthetic/accuracy", "lfw/accuracy")
WALL = ("wall_s", "time/wall_s")


def stated(path, section):
    """The lines below "SECTION:" of a docstring, as (figure, conditions, table or "")."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    lines = re.search(rf"^{section}: .+\n((?:    .+(?:\n|$))+)", docstring, re.MULTILINE)[1]
    form = r"    (?P<figure>.+) \((?P<conditions>[^;]+)(?:; (?P<table>\w+)\.csv)?\)"
    found = [re.fullmatch(form, line) for line in lines.splitlines()]
    assert all(found), f"{path.name}, {section}: no such line is known:\n{lines}"
    return [(line["figure"], line["conditions"], line["table"] or "") for line in found]


def done(table, path):
    """The rows of results/TABLE.csv that are runs of this experiment and ended well."""
    with (RESULTS / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["experiment"] == path.stem]
    return [row for row in rows if row.get("status", "done") == "done"]


def chosen(rows, conditions):
    """Those of "data=small, steps=450, 3 seeds": COLUMN=VALUE, data=... being the variant."""
    for column, value in re.findall(r"(\w+)=([^,]+)", conditions):
        if column == "data":
            column, value = "variant", f"data={value}"
        rows = [row for row in rows if row[column] == value]
    return rows


def values(rows, columns):
    """The figure of each row, in the one column that has it."""
    return [float(next(row[c] for c in columns if row.get(c))) for row in rows]


def data_in(conditions):
    """ "data=lfw, folder" → {"data=lfw", "data=folder"}."""
    names = conditions.removeprefix("data=").split(", ")
    assert set(names) <= set(common.PRESETS)
    return {f"data={name}" for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_expected_figures_are_those_of_the_tables(path):
    ran, not_run = set(), set()
    for figure, conditions, table in stated(path, "Expect"):
        if figure == "not run":
            not_run |= data_in(conditions)
            continue
        rows = chosen(done(table, path), conditions)
        percent = 100 * np.array(values(rows, ACCURACY))
        seeds = {row["seed"] for row in rows}
        count = int(re.search(r"(\d+) (?:seeds|runs|settings)", conditions)[1])
        assert len(rows) == count, conditions
        if "±" in figure:
            assert len(seeds) == count, "one run a seed"
            mean, half, _ = statistics.mean_interval(percent)
            assert figure == f"{mean:.2f} ± {half:.2f} %", conditions
        else:
            assert seeds == {re.search(r"seed (\d+)", conditions)[1]}
            assert figure == f"{min(percent):.2f} to {max(percent):.2f} %", conditions
        ran |= {row["variant"] for row in rows}
    in_tables = {row["variant"] for t in RESULTS.glob("*.csv") for row in done(t.stem, path)}
    assert ran == in_tables, "a figure for all data that were run"
    assert not ran & not_run


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_times_are_those_of_the_tables(path):
    with_time = set()
    for figure, conditions, table in stated(path, "Time"):
        if table:
            rows = chosen(done(table, path), conditions)
            assert not any(float(row.get("time/together") or 1) > 1 for row in rows)
            seconds = values(rows, WALL)
            assert figure == f"{min(seconds):.0f} to {max(seconds):.0f} s", conditions
        else:
            assert figure.startswith("about ")
            assert ", not timed" in conditions
            every = [row for t in RESULTS.glob("*.csv") for row in done(t.stem, path)]
            alone = [row for row in every if float(row.get("time/together") or 1) == 1]
            assert not chosen(alone, conditions), "there is a time in the tables"
        with_time.add(re.match(r"data=\w+", conditions)[0])
    command = rf"python -m marginface\.main --config experiments/{path.name}(:data=\w+)?\n"
    (variant,) = re.findall(command, path.read_text(encoding="utf-8"))
    assert (variant.removeprefix(":") or "data=synthetic") in with_time


@pytest.mark.parametrize(
    "path", [p for p in FILES if "\nPublished: " in p.read_text("utf-8")], ids=lambda p: p.stem
)
def test_published_figures_are_cited_ones(path):
    (lines,) = re.findall(r"^Published: .+\.\n    (.+)\n", path.read_text("utf-8"), re.MULTILINE)
    keys = {heading: key for key, heading in published.METRICS.items()}
    figures = {}
    for part in lines.split(", "):
        heading, value = part.rsplit(" ", 1)
        figures[keys[heading]] = float(value)
    rows = published.of_experiments(published.load(), [path.stem])
    assert any(figures.items() <= row.metrics.items() for row in rows)


# --- configs -------------------------------------------------------------------------------------


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
    centers = grads["terms"]["joint.learned_center"]["centers"]
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


def test_a_new_preset_is_one_row_of_the_table(monkeypatch):
    def tiny(config, root):
        common.small(config, root)
        config.data.kw.update(identities=64, samples=20)

    monkeypatch.setitem(common.PRESETS, "tiny", common.Preset(tiny, images=common.rendered))
    config = configs.load("experiments/asoftmax.py:data=tiny")
    assert config.loss.anneal.rate == 2 * 199 / (64 * 20 / 128)
    assert configs.load("experiments/arcface.py:data=tiny").loss.margin_kw.m == 0.3

    large = common.Preset(common.casia, full_size=True)
    monkeypatch.setitem(common.PRESETS, "large", large)
    assert configs.load("experiments/asoftmax.py:data=large").loss.anneal.rate == 0.12
    assert configs.load("experiments/arcface.py:data=large").loss.margin_kw.m == 0.5
    with pytest.raises(ValueError, match=r"data='larg' is unknown; did you mean 'large'"):
        configs.load("experiments/arcface.py:data=larg")


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
