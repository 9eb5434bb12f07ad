"""AdaCos: the scale follows the angles; nothing to tune.

    s_t cos θ_j,   s_t = log(mean_i Σ_{j≠y_i} exp(s_{t−1} cos θ_ij)) / cos(min(π/4, θ_med))

Zhang et al., AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep Face
Representations, 2019, equations 8 to 15.

    python -m marginface.main --config experiments/adacos.py:data=small

Time: on two cores, shortest to longest run.
    22 to 59 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.10 ± 1.22 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    common.class_loss(config, "adacos", without=("margin", "scale"))
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        add({"model.embedding_dim": dim})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
