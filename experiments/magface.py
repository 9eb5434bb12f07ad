"""MagFace: the margin grows with the norm of the embedding, which tells quality.

    target: s cos(θ_y + m(‖x‖)),   others: s cos θ_j,   loss + λ (a/u² + 1/a),   a = clip(‖x‖, l, u)

Meng et al., MagFace: A Universal Representation for Face Recognition and Quality Assessment, 2021,
equations 3 and 4. Norms here are about √dim (the embedding is batch-normalised), so the small sets
have other bounds.

    python -m marginface.main --config experiments/magface.py

Time on two cores: four minutes on the embedded faces, under one with :data=small.
Expect: see results/losses_embedded.csv (:data=small).
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
        "lower_m": common.margin(arg, published=0.45, small=0.2),
        "upper_m": common.margin(arg, published=0.8, small=0.4),
    }
    common.class_loss(config, "magface", without=("margin",), **bounds, **margins)
    weight = common.margin(arg, published=35.0, small=5.0)
    config.joint.magnitude = ConfigDict({"weight": weight, **bounds})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for weight in (0.0, 5.0, 20.0, 35.0):
            add({"model.embedding_dim": dim, "joint.magnitude.weight": weight})
