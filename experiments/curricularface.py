"""CurricularFace: hard negatives weigh more as training goes on.

    target: s cos(θ_y + m),   others: s cos θ_j, or s cos θ_j (t + cos θ_j) if they beat the target

Huang et al., CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition, 2020,
equations 3 to 8.

    python -m marginface.main --config experiments/curricularface.py:data=small

Time: on two cores, shortest to longest run.
    16 to 33 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    90.78 ± 2.93 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    m = common.by_size(arg, published=0.5, small=0.3)
    common.class_loss(config, "curricularface", without=("margin",), m=m, rate=0.01)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (0.3, 0.4, 0.5):
            add({"model.embedding_dim": dim, "loss.kw.m": m})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.kw.m", 0.05, 0.6)
    space.log_uniform("loss.kw.rate", 0.001, 0.1)
