"""What a step is told to need, beside what XLA says of the compiled one."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import arcface_regular
from marginface import sharding
from marginface.models import sphereface
from marginface.training import footprint, objective, step

BATCH, SHAPE, DIM = 32, (32, 32, 3), 32


class Small(nn.Module):
    """Two convolutions, which compile quickly."""

    @nn.compact
    def __call__(self, images, train=False):
        x = images
        for width in (16, 32):
            x = nn.Conv(width, (3, 3), strides=2)(x)
            x = nn.PReLU()(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(DIM)(x.reshape(len(x), -1))


def traced(mesh, model=None, classes=300, accumulate=1, **changes):
    """(the footprint, the step's functions, the shapes of what it is given)."""
    config = arcface_regular.get_config()
    config.batch_size, config.model.embedding_dim = BATCH, DIM
    config.optimizer.accumulate = accumulate
    config.loss.update(**changes)
    losses = objective.make(
        config, num_classes=classes, embedding_dim=DIM, mesh=mesh, total_steps=10
    )
    steps = step.make(
        config,
        model=model or Small(),
        objective=losses,
        mesh=mesh,
        image_shape=SHAPE,
        total_steps=10,
    )
    numbers = sharding.put_everywhere(mesh, (objective.hyper(config), jnp.int32(0)))
    need = footprint.of_step(
        steps,
        mesh=mesh,
        batch_size=BATCH,
        accumulate=accumulate,
        image_shape=SHAPE,
        hyper=numbers[0],
        seed=numbers[1],
    )
    by_batch = NamedSharding(mesh, P(sharding.AXIS))
    images = jax.ShapeDtypeStruct((BATCH, *SHAPE), jnp.float32, sharding=by_batch)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=by_batch)
    return need, steps, (steps.like, images, labels, *numbers)


@pytest.mark.parametrize(
    ("devices", "arguments"),
    [
        (1, {"model": sphereface.Model(depth=4, embedding_dim=DIM, width=0.125, norm="batch")}),
        (1, {"classes": 20_000}),
        (8, {"classes": 20_000}),
        (1, {"classes": 20_000, "chunk_size": 1024}),
        (8, {"accumulate": 4}),
    ],
)
def test_the_estimate_is_within_a_factor_of_two(devices, arguments):
    need, steps, given = traced(sharding.make_mesh(devices), **arguments)
    told = steps.train.lower(*given).compile().memory_analysis()
    batch = BATCH * (math.prod(SHAPE) + 1) * 4 / devices
    state = need.parameters + need.optimizer
    assert 0 <= told.argument_size_in_bytes - batch - state < 2000  # the numbers of the config
    assert 0.5 < (need.gradients + need.activations) / told.temp_size_in_bytes < 2


def test_classes_split_over_devices_take_their_part():
    one, eight = (traced(sharding.make_mesh(n), classes=20_000)[0] for n in (1, 8))
    rows = 20_224 * DIM * 4
    assert one.gradients - eight.gradients == pytest.approx(rows * 7 / 8)
    assert one.optimizer > eight.optimizer


def test_what_is_computed_again_is_not_kept():
    mesh = sharding.make_mesh(1)
    model = sphereface.Model(depth=20, embedding_dim=DIM, width=0.125)
    plain, again = (traced(mesh, model.clone(remat=remat))[0] for remat in (False, True))
    assert again.activations < 0.8 * plain.activations


def test_two_lines_and_a_warning_where_memory_does_not_suffice():
    mesh = sharding.make_mesh(2)
    need = footprint.Footprint(2e6, 4e6, 2e6, 5e8)
    walk = {"chunk_size": 4096, "precision": "tf32"}
    device, memory = footprint.describe(need, mesh=mesh, walk=walk)
    assert device.startswith("device: 2 × cpu, ")
    assert device.endswith("each; loss.precision=tf32, loss.chunk_size=4096")
    assert memory.startswith("needed: about 484 MiB each: parameters 1.91 MiB, ")
    *_, warning = footprint.describe(need._replace(activations=1e15), mesh=mesh, walk=None)
    for setting in ("batch_size", "accumulate", "remat", "chunk_size"):
        assert setting in warning
