"""UniFace: one learned threshold parts all true from all false pairs.

    log(1 + exp(−s(cos θ_y − m) + b)) + l Σ_j log(1 + exp(s cos θ_j − b))

Zhou et al., UniFace: Unified Cross-Entropy Loss for Deep Face Recognition, 2023, equation 9.

    python -m marginface.main --config experiments/uniface.py:data=small

Time: on two cores, shortest to longest run.
    29 to 30 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    90.70 ± 0.45 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    m = common.by_size(arg, published=0.4, small=0.2)
    common.class_loss(config, "uniface", without=("margin",), m=m, balance=1.0)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (0.0, 0.2, 0.4):
            add({"model.embedding_dim": dim, "loss.kw.m": m})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.kw.m", 0.0, 0.6)
    space.log_uniform("loss.kw.balance", 0.1, 10.0)
