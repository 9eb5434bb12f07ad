"""AdaM-Softmax: a margin learned for each class.

    target: s (cos θ_y − m_y),   others: s cos θ_j,   loss + λ (1 − (1/C) Σ_j m_j),   m_j in [0, 1]

Liu et al., AdaptiveFace: Adaptive Margin and Sampling for Face Recognition, 2019, equation 6; its
λ is 70. λ is small where few images are seen, or the margins only grow.

    python -m marginface.main --config experiments/adam_softmax.py:data=small

Time: on two cores, shortest to longest run.
    16 to 38 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.08 ± 2.55 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    common.class_loss(config, "adaptive_margin_softmax", without=("margin",))
    config.loss.scale = common.by_size(arg, published=32.0, small=24.0)
    weight = common.by_size(arg, published=70.0, small=15.0)
    config.joint.mean_margin = ConfigDict({"weight": weight})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for weight in (0.0, 15.0, 35.0, 70.0):
            add({"model.embedding_dim": dim, "joint.mean_margin.weight": weight})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.log_uniform("joint.mean_margin.weight", 1.0, 150.0)
