"""MV-Softmax: negatives that beat the target are raised (MV-AM; margin may be any).

    target: s (cos θ_y − m),   others: s cos θ_j, or s (t cos θ_j + t − 1) if they beat the target

Wang et al., Mis-classified Vector Guided Softmax Loss for Face Recognition, 2020, equations 7 to
10; --config.loss.margin=additive_angular is its MV-Arc-Softmax.

    python -m marginface.main --config experiments/mv_softmax.py:data=small

Time: on two cores, shortest to longest run.
    18 to 36 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    90.65 ± 1.22 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    common.class_loss(config, "mv_softmax", t=1.12, adaptive=True)
    config.loss.scale = common.by_size(arg, published=32.0, small=24.0)
    config.loss.margin = "additive_cosine"
    config.loss.margin_kw = ConfigDict({"m": common.by_size(arg, published=0.35, small=0.15)})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for t in (1.0, 1.1, 1.12, 1.2):
            add({"model.embedding_dim": dim, "loss.kw.t": t})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.margin_kw.m", 0.05, 0.5)
    space.uniform("loss.kw.t", 1.0, 1.3)
