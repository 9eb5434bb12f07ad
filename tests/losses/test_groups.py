"""GroupFace: labels, running mean, loss, usage and scores against loops; the head; groups live."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import NamedSharding

from marginface.losses import groups, joint_losses
from marginface.models import group_head, sphereface

KEY = jax.random.key(0)


def _softmax(logits):
    return np.array([np.exp(row) / np.exp(row).sum() for row in logits])


def _labels(p, expectation):
    """The paper's p̃, entry by entry, and the first largest."""
    k = p.shape[1]
    labels = []
    for row in p:
        tilde = [(row[j] - expectation[j]) / k + 1 / k for j in range(k)]
        labels.append(tilde.index(max(tilde)))
    return np.array(labels)


def _logits(b, k, seed=0):
    """Logits, exact in float32, of a network that likes the first group."""
    logits = np.random.default_rng(seed).normal(size=(b, k)) + 2 * np.eye(k)[0]
    return logits.astype(np.float32).astype(np.float64)


def _running(b, k, batches, momentum):
    """Running state after some batches, and the plain weighted mean that it stands for."""
    running, ps = joint_losses.grouping_start(k), []
    for t in range(batches):
        logits = _logits(b, k, seed=10 + t)
        ps.append(_softmax(logits).mean(axis=0))
        _, running = joint_losses.grouping(
            jnp.asarray(logits, jnp.float32), running=running, momentum=momentum
        )
    weights = momentum ** np.arange(batches)[::-1]
    return running, np.array(ps), weights


def test_labels_are_the_textbook_form():
    p = _softmax(_logits(50, 7))
    expectation = p.mean(axis=0)
    got = jax.jit(groups.self_distributed_labels)(jnp.asarray(p), jnp.asarray(expectation))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, _labels(p, expectation))
    assert (np.bincount(got, minlength=7) > 0).all()
    assert (p.argmax(axis=1) == 0).mean() > 0.5  # the arg-max of p itself would not spread them


def test_running_mean_weighs_the_batches_seen_and_nothing_else():
    running, ps, weights = _running(5, 4, batches=3, momentum=0.8)
    expectation = np.asarray(running["expectation"])
    np.testing.assert_allclose(expectation.sum(), 1 - 0.8**3, rtol=1e-6)
    wanted = (weights[:, None] * ps).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(expectation / expectation.sum(), wanted, rtol=1e-6)


@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("self_distributed", [True, False])
def test_loss_and_gradient_are_the_textbook_form(self_distributed, batches):
    b, k, momentum = 9, 5, 0.9
    running, ps, weights = _running(b, k, batches, momentum)
    logits, coefficients = _logits(b, k), np.random.default_rng(1).uniform(0.5, 1.5, b)
    p = _softmax(logits)
    seen, weights = np.vstack([ps.reshape(-1, k), p.mean(axis=0)]), np.append(momentum * weights, 1)
    expectation = (weights[:, None] * seen).sum(axis=0) / weights.sum()
    labels = _labels(p, expectation if self_distributed else np.zeros(k))

    def loss(logits):
        losses, after = joint_losses.grouping(
            logits, running=running, momentum=momentum, self_distributed=self_distributed
        )
        return (losses * coefficients).sum(), (losses, after)

    grad, (losses, after) = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(logits, jnp.float32))
    assert oracles.relative_error(losses, oracles.cross_entropy(logits, labels)) < 1e-5
    (wanted,) = oracles.gradient(
        lambda x: (oracles.cross_entropy(x, labels) * coefficients).sum(), logits
    )
    assert oracles.relative_error(grad, wanted) < 1e-5
    total = after["expectation"].sum()
    np.testing.assert_allclose(after["expectation"] / total, expectation, rtol=1e-5)


def test_running_mean_takes_no_gradient():
    def total(logits):
        losses, after = joint_losses.grouping(logits, running=joint_losses.grouping_start(4))
        return after["expectation"] @ jnp.arange(4.0) + 0 * losses.sum()

    assert not np.any(jax.grad(total)(jnp.asarray(_logits(3, 4), jnp.float32)))


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.asarray(_logits(40, 6), jnp.bfloat16)
    start = joint_losses.grouping_start(6)
    losses, after = joint_losses.grouping(logits, running=start)
    wanted, wanted_after = joint_losses.grouping(logits.astype(jnp.float32), running=start)
    np.testing.assert_array_equal(losses, wanted)
    np.testing.assert_array_equal(after["expectation"], wanted_after["expectation"])
    p = jax.nn.softmax(logits)
    assert groups.self_distributed_labels(p, p.mean(axis=0)).shape == (40,)


@pytest.mark.parametrize("self_distributed", [True, False])
@pytest.mark.parametrize(("b", "k"), [(4, 3), (1, 3), (4, 1), (1, 1)])
def test_degenerate_batches(b, k, self_distributed):
    """Equal probabilities, one group, one example: log K, and the gradient p − onehot."""

    def total(logits):
        losses, after = joint_losses.grouping(
            logits, running=joint_losses.grouping_start(k), self_distributed=self_distributed
        )
        return losses.sum(), (losses, after)

    grad, (losses, after) = jax.grad(total, has_aux=True)(jnp.full((b, k), 0.25))
    np.testing.assert_allclose(losses, math.log(k), atol=1e-6)
    np.testing.assert_allclose(grad, np.tile(1 / k - np.eye(k)[0], (b, 1)), atol=1e-6)
    np.testing.assert_allclose(after["expectation"], 0.1 / k, rtol=1e-5)


def test_certain_logits_stay_finite():
    logits = jnp.array([[1e4, 0.0, -1e4], [0.0, 0.0, 1e4]])
    f = functools.partial(joint_losses.grouping, running=joint_losses.grouping_start(3))
    assert np.isfinite(f(logits)[0]).all()
    assert np.isfinite(jax.grad(lambda x: f(x)[0].sum())(logits)).all()


def test_usage():
    even, one, three = (
        groups.usage(jnp.array(ids), 4) for ids in ([0, 1, 2, 3], [2, 2], [0, 0, 1])
    )
    np.testing.assert_allclose(even, (1, 1), rtol=1e-6)
    np.testing.assert_allclose(one, (0, 4), atol=1e-6)
    wanted = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(4)
    np.testing.assert_allclose(three, (wanted, 8 / 3), rtol=1e-6)
    np.testing.assert_array_equal(groups.usage(jnp.zeros(5, jnp.int32), 1), (1, 1))


def _simulate(self_distributed, k=8, kinds=64, d=16):
    """Usage before and after a decision network learns its own labels, on clouds of features."""
    rng = np.random.default_rng(0)
    centers = jnp.asarray(rng.normal(size=(kinds, d)), jnp.float32)
    network = group_head.DecisionNetwork(k, (32, 16), train=True, logit_norm=True)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def draw(key, n):
        kind, noise = jax.random.split(key)
        x = centers[jax.random.randint(kind, (n,), 0, kinds)]
        return x + 2 * jax.random.normal(noise, x.shape)

    @jax.jit
    def run(key):
        variables = network.init(key, centers)

        def logits(params, x):
            variables_now = {**variables, "params": params}
            return network.apply(variables_now, x, mutable=["batch_stats"])[0][0]

        def step(state, key):
            params, opt, running = state

            def loss(params):
                losses, after = joint_losses.grouping(
                    logits(params, draw(key, 128)),
                    running=running,
                    self_distributed=self_distributed,
                )
                return losses.mean(), after

            grads, running = jax.grad(loss, has_aux=True)(params)
            updates, opt = optimizer.update(grads, opt)
            return (optax.apply_updates(params, updates), opt, running), None

        params = variables["params"]
        start = params, optimizer.init(params), joint_losses.grouping_start(k)
        (trained, *_), _ = jax.lax.scan(step, start, jax.random.split(key, 300))
        fresh = draw(jax.random.fold_in(key, 1), 2048)
        return [groups.usage(logits(p, fresh).argmax(axis=1), k) for p in (params, trained)]

    return jax.device_get(run(KEY))


def test_groups_stay_in_use_with_self_distributed_labels_and_collapse_without():
    before, after = _simulate(self_distributed=True)
    assert before.entropy > 0.9
    assert after.entropy > 0.9
    _, naive = _simulate(self_distributed=False)
    assert naive.entropy < 0.75
    assert naive.largest > 2 * after.largest


def test_similarity_is_the_textbook_form():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 7)).astype(np.float32)
    rows[2, :4] = 0
    first, second = np.array([0, 1, 2, 3, 5]), np.array([1, 1, 4, 5, 3])
    v, g = rows[:, :4], rows[:, 4:]
    got = groups.group_aware_similarity(v, g, first, second)
    assert got.dtype == np.float64
    for score, i, j in zip(got, first, second, strict=True):
        a, b = rows[i, :4].astype(np.float64), rows[j, :4].astype(np.float64)
        lengths = math.sqrt(sum(a**2)) * math.sqrt(sum(b**2))
        cosine = sum(a * b) / lengths if lengths else 0.0
        distance = math.sqrt(sum((rows[i, 4:].astype(np.float64) - rows[j, 4:]) ** 2))
        assert score == pytest.approx(cosine - 0.1 * distance ** (1 / 3), rel=1e-9)
    assert got[1] == pytest.approx(1)  # a pair of one face
    plain = groups.group_aware_similarity(v, g, first, second, beta=0.0)
    np.testing.assert_allclose(plain[3], oracles.cosines(rows[3:4, :4], rows[5:, :4])[0, 0])


BACKBONE = {"depth": 4, "width": 0.125, "norm": "batch"}
SOFT = group_head.Model(
    backbone="sphereface",
    backbone_kw=BACKBONE,
    embedding_dim=12,
    feature_dim=20,
    num_groups=5,
    hidden=(16, 6),
    logit_norm=True,
)
HARD = SOFT.clone(assignment="hard")
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (16, 32, 32, 3)), jnp.float32)


@functools.cache
def _variables(model):
    """Random parameters from numpy: drawing them with JAX compiles slowly."""
    rng = np.random.default_rng(1)

    def fill(path, like):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, like.shape), jnp.float32)
        fan_in = math.prod(like.shape[:-1])
        return jnp.asarray(rng.normal(0, (2 / fan_in) ** 0.5, like.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, KEY, IMAGES))


@functools.partial(jax.jit, static_argnums=0)
def _train_step(model, variables, images, face_weight, group_weight):
    """Outputs, new statistics and running state, gradient of the weighted sum of both losses."""

    def loss(params):
        output, update = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        running = joint_losses.grouping_start(model.num_groups)
        losses, after = joint_losses.grouping(output["group_logits"], running=running)
        weight = jnp.arange(1.0, 1 + output["embedding"].size)
        face = jnp.mean(jnp.sin(weight) * output["embedding"].ravel())
        return face_weight * face + group_weight * losses.mean(), (output, update, after)

    gradient, aux = jax.grad(loss, has_aux=True)(variables["params"])
    return *aux, gradient


def _norms(gradient):
    """{module: ‖gradient‖} of the head's modules."""
    return {name: float(optax.tree.norm(part)) for name, part in gradient.items()}


def test_parameters_and_shapes():
    shapes = jax.eval_shape(SOFT.init, KEY, IMAGES)["params"]
    counts = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in shapes.items()}
    assert set(counts) == {"shared", "instance", "instance_norm", "decision", "groups"}
    assert counts["instance"] + counts["instance_norm"] == 20 * 12 + 12
    assert counts["groups"] == 20 * 5 * 12 + 5 * 12
    # Dense without bias, scale and shift of each BN, one slope a channel.
    assert counts["decision"] == (12 * 16 + 3 * 16) + (16 * 6 + 3 * 6) + (6 * 5 + 2 * 5)
    plain = SOFT.clone(logit_norm=False)
    logits = jax.eval_shape(plain.init, KEY, IMAGES)["params"]["decision"]["dense3"]
    assert jax.tree.map(jnp.shape, logits) == {"kernel": (6, 5), "bias": (5,)}
    paper = SOFT.clone(embedding_dim=512, feature_dim=4096, num_groups=32)
    assert jax.eval_shape(paper.init, KEY, IMAGES)["params"]["groups"]["kernel"].size == 67_108_864
    images = IMAGES.astype(jnp.bfloat16)
    bfloat16 = SOFT.clone(backbone_kw={**BACKBONE, "dtype": "bfloat16"})
    for model in (SOFT, HARD, bfloat16):
        output = jax.eval_shape(model.apply, _variables(SOFT), images)
        assert {k: v.shape for k, v in output.items()} == {
            "embedding": (16, 12),
            "group_logits": (16, 5),
            "group": (16, 12),
            "group_feature": (16, 6),
        }
        assert {v.dtype for v in output.values()} == {jnp.dtype("float32")}


def _by_hand(model, variables, output):
    """v and v^G in numpy from the shared feature, in evaluation."""
    params, stats = jax.device_get((variables["params"], variables["batch_stats"]))
    shared = sphereface.Model(embedding_dim=20, **BACKBONE)
    inside = {"params": params["shared"], "batch_stats": stats["shared"]}
    feature = np.asarray(jax.jit(shared.apply)(inside, IMAGES), np.float64)
    moments = stats["instance_norm"]["norm"]
    instance = feature @ params["instance"]["kernel"] - moments["mean"]
    instance = instance / np.sqrt(moments["var"] + 1e-5) + params["instance_norm"]["norm"]["bias"]
    p = _softmax(np.asarray(output["group_logits"], np.float64))
    group = np.zeros_like(instance)
    for i, row in enumerate(feature):
        for k in range(model.num_groups):
            own = slice(12 * k, 12 * (k + 1))
            each = row @ params["groups"]["kernel"][:, own] + params["groups"]["bias"][own]
            weight = p[i, k] if model.assignment == "soft" else float(k == p[i].argmax())
            group[i] += weight * each
    return instance + group, group


@pytest.mark.parametrize(
    "model", [SOFT, HARD, SOFT.clone(num_groups=1)], ids=["soft", "hard", "one group"]
)
def test_embedding_is_instance_plus_groups(model):
    variables = _variables(model)
    output = jax.jit(functools.partial(model.apply, train=False))(variables, IMAGES)
    embedding, group = _by_hand(model, variables, output)
    assert oracles.relative_error(output["embedding"], embedding) < 1e-5
    assert oracles.relative_error(output["group"], group) < 1e-5


@pytest.mark.parametrize("model", [SOFT, HARD], ids=["soft", "hard"])
def test_what_each_loss_trains(model):
    output, *_, face = _train_step(model, _variables(model), IMAGES, 1.0, 0.0)
    *_, group = _train_step(model, _variables(model), IMAGES, 0.0, 1.0)
    trained = {name for name, norm in _norms(group).items() if norm > 0}
    assert trained == {"shared", "instance", "instance_norm", "decision"}
    trained = {name for name, norm in _norms(face).items() if norm > 0}
    assert trained == set(face) - ({"decision"} if model is HARD else set())
    chosen = np.unique(output["group_logits"].argmax(axis=1)) if model is HARD else range(5)
    assert len(chosen) > 1
    kernel = np.abs(face["groups"]["kernel"]).reshape(20, 5, 12)
    np.testing.assert_array_equal(np.flatnonzero(kernel.sum(axis=(0, 2))), chosen)


def test_eight_devices_give_the_numbers_of_one(mesh8):
    variables = _variables(SOFT)
    images = jax.device_put(IMAGES, NamedSharding(mesh8, jax.P("data")))
    replicated = jax.device_put(variables, NamedSharding(mesh8, jax.P()))
    got = _train_step(SOFT, replicated, images, 1.0, 1.0)
    want = _train_step(SOFT, variables, IMAGES, 1.0, 1.0)
    for part, wanted in zip(jax.device_get(got), jax.device_get(want), strict=True):
        largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * largest)


def test_a_config_may_hold_the_backbone():
    config = ml_collections.ConfigDict({"backbone": "sphereface", "backbone_kw": BACKBONE}).lock()
    kw = {"embedding_dim": 12, "feature_dim": 20, "num_groups": 5, "hidden": (16, 6)}
    model = group_head.Model(**kw, **config)
    same = SOFT.clone(logit_norm=False)
    assert model == same
    assert hash(model) == hash(same)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backbone": "resnet"}, "backbone 'resnet': choose from .*iresnet.*sphereface"),
        ({"backbone": "group_head"}, "backbone 'group_head': choose from"),
        ({"backbone_kw": {"depth": 4, "detph": 4}}, "backbone_kw of sphereface: .*'detph'"),
        ({"backbone_kw": {}}, "backbone_kw of sphereface: .*'depth'"),
        ({"backbone_kw": {"depth": 5}}, "SphereFace has no depth 5"),
        ({"assignment": "firm"}, "assignment 'firm': choose from soft, hard"),
        ({"num_groups": 0}, "num_groups is 0; give 1 or more"),
    ],
)
def test_bad_arguments_end_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        SOFT.clone(**wrong)
    assert "\n" not in str(error.value)
