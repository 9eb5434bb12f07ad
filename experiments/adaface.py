"""AdaFace: the margin follows image quality, read from the norm of the embedding.

    target: s (cos(θ_y − m ẑ) − (m ẑ + m)),   others: s cos θ_j,   ẑ = clip(h (‖x‖ − μ)/σ, −1, 1)

Kim et al., AdaFace: Quality Adaptive Margin for Face Recognition, 2022, equations 13 to 16.

    python -m marginface.main --config experiments/adaface.py:data=small

Time: on two cores, shortest to longest run.
    19 to 49 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.05 ± 3.12 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    m = common.by_size(arg, published=0.4, small=0.2)
    rate = common.by_size(arg, published=0.01, small=0.1)  # a short run has to find μ and σ soon
    common.class_loss(config, "adaface", without=("margin",), m=m, concentration=0.333, rate=rate)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (0.2, 0.3, 0.4):
            add({"model.embedding_dim": dim, "loss.kw.m": m})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.kw.m", 0.05, 0.6)
    space.uniform("loss.kw.concentration", 0.1, 0.6)
