"""Config to loss: terms add up, ramps follow their laws, every mistake is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    adacos,
    arcface,
    asoftmax_regular,
    l_softmax,
    softmax,
    subcenter_arcface,
    triplet,
)
from marginface import sharding
from marginface.losses import regularizers
from marginface.losses.table import Loss
from marginface.training import objective


def evaluate(config, step=0, total_steps=10):
    made = objective.make(
        config, num_classes=6, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=total_steps
    )

    @jax.jit
    def run(key, step):
        params, running = made.init(key, objective.hyper(config))
        params["prototypes"] = params["prototypes"] * 100 + 0.1
        x = jax.random.normal(key, (4, 3))
        labels = jnp.arange(4)
        return made.loss(
            params, running, {"embedding": x}, labels, objective.hyper(config), step, key
        )

    total, (_, metrics) = run(jax.random.key(0), jnp.int32(step))
    return float(total), {k: float(v) for k, v in metrics.items()}


def with_terms():
    config = arcface.get_config()
    config.regularizers.uniform = {"weight": 2.0, "chunk_size": 0}
    config.joint.intra = {"weight": 0.5}
    config.joint.center = {"weight": 0.25, "rate": 0.5}
    config.pairs.contrastive = {"weight": 3.0, "margin": 4.0}
    return config


def test_the_total_is_the_weighted_sum_of_the_terms():
    total, metrics = evaluate(with_terms())
    weights = {"margin_softmax": 1, "uniform": 2, "intra": 0.5, "center": 0.25, "contrastive": 3}
    assert total == pytest.approx(sum(w * metrics[f"loss/{k}"] for k, w in weights.items()))
    assert metrics["loss/total"] == total
    assert min(metrics[f"loss/{k}"] for k in weights) > 0


@pytest.mark.parametrize("experiment", [softmax, arcface, l_softmax])
def test_the_target_angle_is_that_of_embedding_and_prototype(experiment):
    config, key = experiment.get_config(), jax.random.key(0)
    made = objective.make(
        config, num_classes=6, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=10
    )
    hyper, x = objective.hyper(config), jax.random.normal(key, (4, 3))
    params, running = made.init(key, hyper)
    _, (_, metrics) = jax.jit(made.loss)(
        params, running, {"embedding": x}, jnp.arange(4), hyper, jnp.int32(0), key
    )
    w = np.asarray(objective.weights(params["prototypes"]), np.float64)[:4]
    cos = np.sum(x * w, axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(w, axis=1)
    expected = np.degrees(np.arccos(cos)).mean()
    assert float(metrics["train/target_angle"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("of_term", "used"), [(0, 2), (3, 3), (None, 2)])
def test_a_term_takes_the_chunk_size_of_the_loss_unless_it_has_its_own(of_term, used, monkeypatch):
    sizes = []
    whole = regularizers.uniform

    @functools.wraps(whole)
    def uniform(*args, chunk_size, **kw):
        sizes.append(chunk_size)
        return whole(*args, chunk_size=chunk_size, **kw)

    monkeypatch.setitem(regularizers.LOSSES, "uniform", Loss(uniform))
    config = with_terms()
    config.loss.chunk_size = 2
    config.regularizers.uniform = {"weight": 2.0}
    if of_term is not None:
        config.regularizers.uniform.chunk_size = of_term
    evaluate(config)
    assert set(sizes) == {used}


def test_terms_of_one_name_in_two_sections_stay_apart(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import jax.numpy as jnp\n"
        "from marginface.losses import Loss\n"
        "def term(embeddings, *, learned, embedding_dim):\n"
        "    assert learned['at'].shape == (embedding_dim,)\n"
        "    return (embeddings - learned['at']).sum(1)\n"
        "ONE = Loss(term, learned=lambda embedding_dim: {'at': jnp.ones(embedding_dim)})\n"
        "TWO = Loss(term, learned=lambda embedding_dim: {'at': jnp.full(embedding_dim, 2.0)})\n"
    )
    config = arcface.get_config()
    config.joint.mine = {"weight": 1.0, "name": f"{mine}:ONE"}
    config.pairs.mine = {"weight": 1.0, "name": f"{mine}:TWO"}
    total, metrics = evaluate(config)
    parts = [metrics[f"loss/{k}"] for k in ("margin_softmax", "joint.mine", "pairs.mine")]
    assert total == pytest.approx(sum(parts), rel=1e-6)
    assert parts[1] - parts[2] == pytest.approx(3.0, rel=1e-5)  # (2 − 1) · embedding_dim


def test_one_loss_may_stand_twice_each_with_its_figures():
    config = triplet.get_config()
    config.pairs.wide = {
        **config.pairs.triplet,
        "name": "triplet",
        "margin": 0.5,
        "triplets": "all",
    }
    config.pairs.total = {"name": "contrastive", "margin": 1.0, "weight": 1.0}
    total, metrics = evaluate_pairs(config)
    parts = {k: metrics[f"loss/{k}"] for k in ("triplet", "wide", "pairs.total")}
    assert len(set(parts.values())) == 3
    assert total == metrics["loss/total"] == pytest.approx(sum(parts.values()), rel=1e-6)
    assert metrics["train/spread"] == metrics["train/wide_spread"] > 0
    assert metrics.keys() >= {"train/collapsed", "train/wide_collapsed"}


def evaluate_pairs(config):
    made = objective.make(
        config, num_classes=6, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
    )
    key, hyper = jax.random.key(0), objective.hyper(config)
    params, running = made.init(key, hyper)
    output, labels = {"embedding": jax.random.normal(key, (6, 3))}, jnp.arange(6) // 2
    total, (_, metrics) = jax.jit(made.loss)(
        params, running, output, labels, hyper, jnp.int32(0), key
    )
    return float(total), {k: float(v) for k, v in metrics.items()}


MINE = """
import jax.numpy as jnp
from marginface.losses import Loss

def sharp(embeddings, labels, *, quality, power=2.0):
    return (embeddings**power).sum(axis=1) * quality[:, 0]

def whole(embeddings): return embeddings.sum()
def both(embeddings): return embeddings.sum(axis=1), {"n": 1}
def forgets(embeddings, *, running): return embeddings.sum(axis=1)
def learns(embeddings, *, learned): return embeddings.sum(axis=1)
def bare(embeddings, labels, classes): return embeddings.sum(axis=1)
def strange(embeddings, temper): return embeddings.sum(axis=1)
THREE = 3

LOSSES = {
    "sharp": Loss(sharp, outputs=("quality",)),
    "forgets": Loss(forgets, running=lambda: {"n": jnp.zeros(())}),
}
"""


def test_a_loss_of_ones_own_asks_for_an_output_of_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    config = triplet.get_config()
    config.pairs = {}
    config.joint.sharp = {"name": "mine.py:sharp", "weight": 1.0}
    made = objective.make(
        config, num_classes=6, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
    )
    key, hyper, labels = jax.random.key(0), objective.hyper(config), jnp.arange(4)
    output = {"embedding": jnp.full((4, 3), 2.0), "quality": jnp.arange(4.0)[:, None]}
    total, _ = made.loss({"terms": {}}, {}, output, labels, hyper, jnp.int32(0), key)
    assert float(total) == 12 * 1.5
    del output["quality"]
    with pytest.raises(ValueError, match=r"joint\.sharp asks for quality, which there is not"):
        made.loss({"terms": {}}, {}, output, labels, hyper, jnp.int32(0), key)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whole", r"joint.mine gives values of shape \[\]: one for each example is needed"),
        ("both", r"joint.mine gives a state, and nothing says how it starts"),
        ("forgets", r"joint.mine gives no next state"),
        ("learns", r"joint.mine.name='mine.py:learns' asks for learned, and nothing says how tha"),
        ("strange", r"joint.mine.temper is missing: strange needs it"),
        ("THREE", r"joint.mine.name='mine.py:THREE' is no function"),
        ("bare", r"loss.bare gives ArrayImpl|loss.bare gives \w*Tracer: a ClassLoss is needed"),
    ],
)
def test_a_mistake_in_a_loss_of_ones_own_is_named_in_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    config = arcface.get_config()
    if name == "bare":
        for key in ("margin", "margin_kw", "scale"):
            del config.loss[key]
        config.loss.name = "mine.py:bare"
    else:
        config.joint.mine = {"name": f"mine.py:{name}", "weight": 1.0}
    with pytest.raises(ValueError, match=message) as error:
        evaluate(config)
    assert "\n" not in str(error.value)


def test_the_margins_of_a_term_need_rows_that_have_some():
    config = arcface.get_config()
    config.joint.mean_margin = {"weight": 1.0}
    with pytest.raises(ValueError, match="mean_margin needs rows with margins"):
        evaluate(config)


def test_helpers_are_no_losses():
    config = arcface.get_config()
    for section, name in (("joint", "center_start"), ("pairs", "collapse"), ("pairs", "Loss")):
        config[section] = {name: {"weight": 1.0}}
        with pytest.raises(ValueError, match=f"{section}='{name}' is unknown"):
            evaluate(config)
        config[section] = {}
    for margin in ("detach", "anneal", "_angle"):
        config.loss.margin = margin
        with pytest.raises(ValueError, match=f"loss.margin='{margin}' is unknown"):
            evaluate(config)


def test_a_term_says_which_input_there_is_not():
    config = arcface.get_config()
    config.joint.grouping = {"weight": 1.0}
    with pytest.raises(ValueError, match=r"joint\.grouping asks for num_groups, which th"):
        evaluate(config)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_the_precision_reaches_the_step(precision):
    config = arcface.get_config()
    automatic = evaluate(config)
    config.loss.precision = "highest"
    assert evaluate(config) == automatic  # on CPU, to the last bit
    config.loss.precision = precision
    total, metrics = evaluate(config)
    assert 0 < abs(total / automatic[0] - 1) < 1e-2
    assert metrics["train/target_angle"] == automatic[1]["train/target_angle"]


def test_a_config_of_an_earlier_version_has_no_precision():
    config = arcface.get_config()
    wanted = evaluate(config)
    del config.loss["precision"]
    assert evaluate(config) == wanted


def test_an_unknown_precision_is_named():
    config = arcface.get_config()
    config.loss.precision = "half"
    with pytest.raises(ValueError, match=r"loss.precision='half' is unknown; known: auto, highest"):
        evaluate(config)


def test_a_linear_ramp_rises_between_its_ends():
    config = with_terms()
    config.regularizers.uniform = {"weight": 2.0, "ramp": "linear", "begin": 0.2, "end": 0.6}
    config.joint, config.pairs = {}, {}
    for step, factor in ((0, 0), (2, 0), (4, 0.5), (6, 1), (9, 1)):
        total, metrics = evaluate(config, step)
        wanted = metrics["loss/margin_softmax"] + factor * 2 * metrics["loss/uniform"]
        assert total == pytest.approx(wanted, rel=1e-6)


def test_lambda_of_regularface_grows_as_that_of_a_softmax_decays():
    """15·5/λ in the authors' code: weight 15 with the ramp inverse_anneal, least λ 5."""
    config = asoftmax_regular.get_config("data=casia")
    config.regularizers.exclusive.update(weight=15.0, ramp="inverse_anneal")
    for step in (0, 100, 10_000):
        lam = max(5.0, 1000 / (1 + 0.12 * step))
        total, metrics = evaluate(config, step)
        gap = total - metrics["loss/margin_softmax"]
        assert gap == pytest.approx(15 * 5 / lam * metrics["loss/exclusive"], rel=1e-3)


def test_a_term_alone_needs_no_loss_over_classes():
    config = triplet.get_config()
    made = objective.make(
        config, num_classes=6, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
    )
    params, running = made.init(jax.random.key(0), objective.hyper(config))
    assert params == {"prototypes": {}, "terms": {}}
    assert running == {}


def test_collapse_is_told_from_a_small_loss():
    config = triplet.get_config()
    config.pairs.triplet.triplets = "all"
    made = objective.make(
        config, num_classes=6, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
    )
    labels, key = jnp.array([0, 0, 1, 1]), jax.random.key(0)
    hyper = objective.hyper(config)
    params, running = made.init(key, hyper)
    loss = jax.jit(
        lambda x: made.loss(params, running, {"embedding": x}, labels, hyper, jnp.int32(0), key)
    )
    same, apart = jnp.ones((4, 3)), jnp.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0.0]])
    for x, collapsed in ((same, 1), (apart, 0)):
        total, (_, metrics) = loss(x)
        assert float(metrics["train/collapsed"]) == collapsed
    assert float(total) == 0


@pytest.mark.parametrize(
    ("experiment", "change", "message"),
    [
        (arcface, {"loss.name": "margin_sofmax"}, "did you mean 'margin_softmax'"),
        (arcface, {"loss.name": "circle"}, "loss.margin has no place in circle"),
        (arcface, {"loss.name": ""}, "nothing to minimise"),
        (arcface, {"loss.kw": {"foca": 1.0}}, r"loss.kw.foca is not an argument.*'focal'"),
        (arcface, {"loss.kw": {"scale": 1.0}}, "loss.kw.scale is not an argument"),
        (arcface, {"loss.similarity": "cosin"}, "did you mean 'cosine'"),
        (arcface, {"loss.sample_rate": 0.0}, r"loss.sample_rate=0.0: give a part in \(0, 1\]"),
        (arcface, {"loss.similarity": "linear"}, "loss.margin='additive_angular' changes a cosine"),
        (adacos, {"loss.scale": 64.0}, "loss.scale has no place in adacos"),
        (adacos, {"loss.detach": True}, "loss.detach=True has no place in adacos"),
        (adacos, {"loss.norm_as_scale": True}, "loss.norm_as_scale=True has no place in adacos"),
        (adacos, {"loss.similarity": "linear"}, "loss.similarity='linear' has no place in adacos"),
        (arcface, {"joint.intr": {"weight": 1.0}}, "did you mean 'intra'"),
        (arcface, {"joint.intra": {}}, "joint.intra.weight is missing"),
        (arcface, {"joint.intra": {"weight": 1}}, "joint.intra.weight=1: write it as a float"),
        (arcface, {"joint.norm_penalty": {"weight": 1.0}}, "norm_penalty.radius is missing"),
        (arcface, {"joint.intra": {"weight": 1.0, "m": 1.0}}, "joint.intra.m is not an argument"),
        (arcface, {"joint.intra": {"weight": 1.0, "ramp": "liner"}}, "did you mean 'linear'"),
        (arcface, {"joint.intra": {"weight": 1.0, "ramp": "inverse_anneal"}}, "loss.anneal"),
        (subcenter_arcface, {"joint.intra": {"weight": 1.0}}, "one prototype for each class"),
        (triplet, {"joint.intra": {"weight": 1.0}}, "one prototype for each class"),
    ],
)
def test_every_mistake_is_named_in_one_line(experiment, change, message):
    config = experiment.get_config()
    with config.unlocked():
        for key, value in change.items():
            *path, last = key.split(".")
            section = config
            for part in path:
                section = section[part]
            section[last] = value
    with pytest.raises(ValueError, match=message) as error:
        objective.make(
            config, num_classes=6, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
        )
    assert "\n" not in str(error.value)


def test_every_float_of_the_config_is_traced():
    hyper = objective.hyper(with_terms())
    assert hyper["joint"]["center"].keys() == {"weight", "rate"}
    assert hyper["margin"].keys() == {"m"}
    assert "scale" in hyper["loss"]
    for leaf in jax.tree.leaves(hyper):
        assert leaf.dtype == np.float32
