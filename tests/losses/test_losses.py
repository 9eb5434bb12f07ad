"""The losses as a library: all that a config may name is found in marginface.losses."""

import jax
import jax.numpy as jnp
import pytest

from marginface import losses
from marginface.losses import class_losses, joint_losses, margins, pair_losses, regularizers

MODULES = (class_losses, joint_losses, pair_losses, regularizers)


@pytest.mark.parametrize("module", MODULES)
def test_the_index_has_what_the_tables_name(module):
    for name, row in module.LOSSES.items():
        assert row.function.__name__ == name
        for function in (row.function, row.learned, row.running, row.rows):
            if function is not None:
                assert getattr(losses, function.__name__) is function
                assert function.__name__ in losses.__all__


def test_the_index_has_the_margins():
    for name, margin in margins.MARGINS.items():
        assert margin is getattr(losses, name)
        assert margin.__name__ == name


def test_a_loss_is_called_without_a_config():
    x, labels = jax.random.normal(jax.random.key(0), (4, 8)), jnp.array([0, 1, 2, 0])
    classes = losses.all_classes(jax.random.normal(jax.random.key(1), (5, 8)), 5)
    first = losses.adacos(x, labels, classes, running=losses.adacos_start(5))
    assert first.loss.shape == (4,)
    assert first.running["scale"] > 0
