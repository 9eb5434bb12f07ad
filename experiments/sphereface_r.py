"""SphereFace(1.35): a multiplicative margin of a real factor, without annealing.

    target: s cos(min(m θ, π)),   others: s cos θ_j

Liu et al., SphereFace Revived: Unifying Hyperspherical Face Recognition, 2022, equation 9 (its
first form), margin without gradient as its authors have it; ArcFace's table 2 calls it SphereFace
(1.35).

    python -m marginface.main --config experiments/sphereface_r.py:data=small

Time: on two cores, shortest to longest run.
    16 to 32 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    90.97 ± 2.00 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
Published: ArcFace, table 2; CASIA-WebFace, ResNet-50.
    LFW 99.11, CFP-FP 94.38, AgeDB 91.70
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    config.loss.margin = "combined"
    config.loss.margin_kw = ConfigDict({"m1": 1.35, "m2": 0.0, "m3": 0.0})
    config.loss.detach = True
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (1.0, 1.35, 1.5, 1.7):
            add({"model.embedding_dim": dim, "loss.margin_kw.m1": m})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.margin_kw.m1", 1.0, 1.8)
