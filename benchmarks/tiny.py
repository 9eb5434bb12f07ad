"""A sweep of sixteen units so small that starting and compiling is most of their time."""

from experiments import arcface_regular


def get_config(arg=None):
    """The config; `arg` as in experiments/common."""
    config = arcface_regular.get_config(arg)
    config.model.kw.update(depth=4, width=0.0625)
    config.model.embedding_dim = 16
    config.data.kw.update(identities=64, samples=32, image_size=16)
    config.data.kw.update(test_identities=20, test_samples=4, pairs=100, folds=5)
    config.batch_size = config.evaluate.batch_size = 32
    config.steps = 100
    config.log_every = 50
    return config


def sweep(add, arg=None):
    """Margins and weights: numbers only, so one program holds all."""
    for m in (0.0, 0.2, 0.3, 0.5):
        for weight in (0.0, 0.1, 1.0, 10.0):
            add({"loss.margin_kw.m": m, "regularizers.exclusive.weight": weight})
