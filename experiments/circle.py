"""Circle loss with class labels: each similarity is pulled as strongly as it is wrong.

    target: γ [1 + m − cos θ_y]₊ (cos θ_y − 1 + m),   others: γ [cos θ_j + m]₊ (cos θ_j − m)

Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, 2020, equations 5
to 8.

    python -m marginface.main --config experiments/circle.py:data=small

Time: on two cores, shortest to longest run.
    16 to 42 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    90.47 ± 0.38 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    common.class_loss(config, "circle", without=("margin",), m=0.25)
    config.loss.scale = common.by_size(arg, published=256.0, small=48.0)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for scale in (48.0, 64.0, 128.0, 256.0):
            add({"model.embedding_dim": dim, "loss.scale": scale})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 16.0, 512.0)
    space.uniform("loss.kw.m", 0.1, 0.5)
