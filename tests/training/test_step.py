"""The train step: the same on one device and eight, compiled once, safe against divergence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import arcface, arcface_regular, triplet
from marginface import sharding
from marginface.models import sphereface
from marginface.training import objective, step

STEPS, BATCH, CLASSES, SIZE = 20, 16, 10, 16


class Small(nn.Module):
    """A network that compiles quickly."""

    norm: bool = True

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(16, name="first")(images.reshape(len(images), -1))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(8, name="second")(nn.relu(x))


def make(mesh, model=None, schedule=(), **optimizer):
    model = model or Small()
    config = arcface_regular.get_config()
    config.model.embedding_dim = 8
    config.optimizer.update(**{"learning_rate": 0.05} | optimizer)
    config.schedule.update(**dict(schedule))
    losses = objective.make(
        config, num_classes=CLASSES, embedding_dim=8, mesh=mesh, total_steps=STEPS
    )
    made = step.make(
        config,
        model=model,
        objective=losses,
        mesh=mesh,
        image_shape=(SIZE, SIZE, 3),
        total_steps=STEPS,
    )
    return made, objective.hyper(config)


def batches(seed=0):
    rng = np.random.default_rng(seed)
    faces = rng.uniform(-1, 1, (CLASSES, SIZE, SIZE, 3))
    while True:
        labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)
        noise = rng.normal(0, 0.3, (BATCH, SIZE, SIZE, 3))
        yield np.float32(faces[labels] + noise), labels


def run(made, hyper, mesh, count=STEPS):
    state, losses = made.init(jnp.int32(3), hyper), []
    for _, (images, labels) in zip(range(count), batches(), strict=False):
        batch = sharding.put_batch(mesh, {"images": images, "labels": labels})
        state, metrics = made.train(state, batch["images"], batch["labels"], hyper, jnp.int32(3))
        losses.append(float(metrics["loss/total"]))
    return state, np.array(losses)


@pytest.fixture(scope="module")
def one():
    return sharding.make_mesh(1)


@pytest.fixture(scope="module")
def made_one(one):
    return make(one)


def test_eight_devices_train_as_one_does(one, mesh8):
    model = sphereface.Model(depth=4, embedding_dim=8, width=0.125, norm="batch", dropout=0.2)
    _, expected = run(*make(one, model, learning_rate=0.001), one)
    _, found = run(*make(mesh8, model, learning_rate=0.001), mesh8)
    assert expected[-1] < expected[0] - 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Another value for every hyper-parameter, and those without meaning for each choice of names.
CHANGES = {
    ("margin", "m"): 0.1,
    ("loss", "scale"): 16.0,
    ("regularizers", "exclusive", "weight"): 7.0,
    ("optimizer", "learning_rate"): 0.03,
    ("optimizer", "prototypes_factor"): 3.0,
    ("optimizer", "weight_decay"): 0.5,
    ("optimizer", "clip_norm"): 0.5,
    ("optimizer", "momentum"): 0.5,
    ("optimizer", "b1"): 0.5,
    ("optimizer", "b2"): 0.5,
    ("schedule", "warmup"): 0.5,
    ("schedule", "factor"): 0.5,
    ("schedule", "power"): 3.0,
}


@pytest.mark.parametrize(
    ("optimizer", "schedule", "without_meaning"),
    [
        ("sgd", "step", {"b1", "b2", "power"}),
        ("adamw", "cosine", {"momentum", "factor", "power"}),
        ("lamb", "polynomial", {"momentum", "factor"}),
    ],
)
def test_hyper_parameters_change_without_compiling_again(one, optimizer, schedule, without_meaning):
    boundaries = (0.05,) if schedule == "step" else ()
    made, hyper = make(
        one, name=optimizer, clip_norm=1.0, schedule={"name": schedule, "boundaries": boundaries}
    )
    _, plain = run_parameters(made, hyper, one)
    for path, value in CHANGES.items():
        changed = jax.tree.map(lambda x: x, hyper)
        section = changed
        for key in path[:-1]:
            section = section[key]
        assert section[path[-1]] != value
        section[path[-1]] = jnp.float32(value)
        _, other = run_parameters(made, changed, one)
        same = all(np.array_equal(a, b) for a, b in zip(plain, other, strict=True))
        assert same == (path[-1] in without_meaning), path
    assert made.train._cache_size() == 1


def run_parameters(made, hyper, mesh, count=3):
    """The state after a few steps, and its parameters as a list."""
    state, _ = run(made, hyper, mesh, count)
    return state, [np.asarray(p) for p in jax.tree.leaves(state["params"])]


def test_prototypes_have_a_learning_rate_of_their_own(one):
    made, hyper = make(one, name="sgd", clip_norm=0.0)
    start = jax.tree.map(np.asarray, made.init(jnp.int32(3), hyper)["params"])
    moved = {}
    for factor in (1.0, 3.0):
        hyper["optimizer"]["prototypes_factor"] = jnp.float32(factor)
        state, _ = run(made, hyper, one, 1)
        moved[factor] = jax.tree.map(lambda a, b: np.asarray(a) - b, state["params"], start)
    for a, b in zip(
        jax.tree.leaves(moved[1.0]["network"]),
        jax.tree.leaves(moved[3.0]["network"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(
        moved[3.0]["prototypes"], 3 * moved[1.0]["prototypes"], rtol=1e-3, atol=1e-7
    )


def test_the_learning_rate_is_the_peak_times_the_schedule(one, made_one):
    made, hyper = made_one
    state = made.init(jnp.int32(3), hyper)
    for step_, (images, labels) in zip(range(4), batches(), strict=False):
        batch = sharding.put_batch(one, {"images": images, "labels": labels})
        state, metrics = made.train(state, batch["images"], batch["labels"], hyper, jnp.int32(3))
        # arcface_regular: cosine after a warm-up of 0.07 · 20 steps
        u = max(0.0, (step_ / STEPS - 0.07) / 0.93)
        expected = 0.05 * min(1.0, (step_ + 1) / (0.07 * STEPS)) * (1 + np.cos(np.pi * u)) / 2
        np.testing.assert_allclose(metrics["train/learning_rate"], expected, rtol=1e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch(one):
    _, whole = run(*make(one, Small(norm=False)), one, 4)
    _, parts = run(*make(one, Small(norm=False), accumulate=4), one, 4)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_other_optimizers_learn(one, name):
    made, hyper = make(one, name=name, clip_norm=1.0)
    hyper["optimizer"]["learning_rate"] = jnp.float32(0.01)
    _, losses = run(made, hyper, one)
    assert losses[-1] < losses[0] - 0.5


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(one, made_one):
    made, hyper = made_one
    state, _ = run(made, hyper, one, 2)
    before = jax.tree.map(np.asarray, state)
    images, labels = next(batches())
    images[0] = np.nan
    batch = sharding.put_batch(one, {"images": images, "labels": labels})
    state, metrics = made.train(state, batch["images"], batch["labels"], hyper, jnp.int32(3))
    assert not np.isfinite(metrics["loss/margin_softmax"])
    assert np.isfinite(metrics["loss/exclusive"])  # the term that is at fault can be told
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state))


def test_padding_rows_stay_zero_and_prototypes_are_sharded(mesh8):
    made, hyper = make(mesh8)
    state, _ = run(made, hyper, mesh8, 3)
    prototypes = state["params"]["prototypes"]
    assert prototypes.sharding.spec == jax.P("data")
    assert prototypes.shape == (256, 8)
    np.testing.assert_array_equal(prototypes[CLASSES:], 0.0)
    assert np.all(np.linalg.norm(prototypes[:CLASSES], axis=1) > 0)


def test_accumulation_would_part_pairs_and_is_refused(one):
    config = triplet.get_config()
    config.optimizer.accumulate = 2
    with pytest.raises(ValueError, match=r"pairs.triplet needs them in one batch"):
        step.make(
            config,
            model=Small(),
            objective=objective.make(
                config, num_classes=CLASSES, embedding_dim=8, mesh=one, total_steps=STEPS
            ),
            mesh=one,
            image_shape=(SIZE, SIZE, 3),
            total_steps=STEPS,
        )


@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_waits_for_no_copy_and_donates_what_it_is_given(devices):
    """A donated buffer that cannot be used, or a number that is copied, would be an error here."""
    mesh = sharding.make_mesh(devices)
    made, hyper = make(mesh)
    hyper, seed = sharding.put_everywhere(mesh, (hyper, jnp.int32(3)))
    state = made.init(seed, hyper)
    images, labels = next(batches())
    with jax.transfer_guard("disallow"):
        batch = sharding.put_batch(mesh, {"images": images, "labels": labels})
        given = jax.tree.leaves(state)
        state, _ = made.train(state, batch["images"], batch["labels"], hyper, seed)
        state, _ = made.train(state, batch["images"], batch["labels"], hyper, seed)
    assert all(leaf.is_deleted() for leaf in given)
    with pytest.raises(Exception, match="Disallowed"), jax.transfer_guard("disallow"):
        made.train(state, images, labels, hyper, seed)  # the guard sees what is not placed


def test_sgd_holds_prototypes_momentum_and_gradient_and_no_copies(one):
    """Compiled only: what a step with a clipped, decayed gradient takes beside its state."""
    classes, dim = 65_536, 64
    config = arcface.get_config()
    config.model.embedding_dim, config.batch_size, config.loss.chunk_size = dim, BATCH, 1024
    config.optimizer.update(name="sgd", clip_norm=1.0, weight_decay=1e-4)
    kw = {"mesh": one, "total_steps": STEPS}
    losses = objective.make(config, num_classes=classes, embedding_dim=dim, **kw)
    shape = (SIZE, SIZE, 3)

    class Thin(Small):
        @nn.compact
        def __call__(self, images, train=False):
            return nn.Dense(dim)(images.reshape(len(images), -1))

    made = step.make(config, model=Thin(), objective=losses, image_shape=shape, **kw)
    images = jax.ShapeDtypeStruct((BATCH, *shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    lowered = made.train.lower(made.like, images, labels, objective.hyper(config), jnp.int32(0))
    memory = lowered.compile().memory_analysis()
    prototypes = 4 * classes * dim
    assert memory.alias_size_in_bytes > 2 * prototypes  # the state is written over
    assert memory.temp_size_in_bytes < 1.3 * prototypes  # the gradient
