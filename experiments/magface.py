"""MagFace: the margin grows with the norm of the embedding, which tells quality.

    target: s cos(θ_y + m(‖x‖)),   others: s cos θ_j,   loss + λ (a/u² + 1/a),   a = clip(‖x‖, l, u)

Meng et al., MagFace: A Universal Representation for Face Recognition and Quality Assessment, 2021,
equations 3 and 4. Norms here are about √dim (the embedding is batch-normalised), so the small sets
have other bounds.

    python -m marginface.main --config experiments/magface.py:data=small

Time: on two cores, shortest to longest run.
    16 to 33 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    90.67 ± 2.91 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    bounds = (
        {"lower": 10.0, "upper": 110.0} if common.full_size(arg) else {"lower": 5.0, "upper": 25.0}
    )
    margins = {
        "lower_m": common.by_size(arg, published=0.45, small=0.2),
        "upper_m": common.by_size(arg, published=0.8, small=0.4),
    }
    common.class_loss(config, "magface", without=("margin",), **bounds, **margins)
    weight = common.by_size(arg, published=35.0, small=5.0)
    config.joint.magnitude = ConfigDict({"weight": weight, **bounds})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for weight in (0.0, 5.0, 20.0, 35.0):
            add({"model.embedding_dim": dim, "joint.magnitude.weight": weight})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    full = common.full_size(arg)  # the lower margin stays below the upper one
    space.uniform("loss.kw.lower_m", *((0.2, 0.5) if full else (0.05, 0.3)))
    space.uniform("loss.kw.upper_m", *((0.5, 1.0) if full else (0.3, 0.6)))
    space.log_uniform("joint.magnitude.weight", 0.5, 100.0)
