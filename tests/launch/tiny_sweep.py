"""An experiment small enough for tests, in a file of its own as a user would have it."""

TEXT = '''"""A tiny sweep."""

from experiments import arcface_regular


def get_config(arg=None):
    """The config."""
    config = arcface_regular.get_config(arg)
    config.model.kw.update(depth=4, width=0.0625)
    config.model.embedding_dim = 8
    config.data.kw.update(identities=12, samples=8, image_size=16)
    config.data.kw.update(test_identities=8, test_samples=4, pairs=32, folds=2)
    # Not Adam, which makes whole steps of rounding errors where a gradient is zero.
    config.optimizer.update(name="sgd", learning_rate=0.05, clip_norm=1.0)
    config.batch_size = 16
    config.evaluate.batch_size = 16
    config.steps = {steps}
    config.log_every = 5
    config.checkpoint_every = {checkpoint_every}
    return config


def sweep(add, arg=None):
    """Margins and weights."""
    for m in {margins}:
        for weight in {weights}:
            add({{"loss.margin_kw.m": m, "regularizers.exclusive.weight": weight}})
'''


def write(
    folder, *, margins=(0.0, 0.3), weights=(0.0, 1.0), steps=10, checkpoint_every=200, name="tiny"
):
    """The experiment's path, as text."""
    path = folder / f"{name}.py"
    path.write_text(
        TEXT.format(
            margins=margins, weights=weights, steps=steps, checkpoint_every=checkpoint_every
        )
    )
    return str(path)
