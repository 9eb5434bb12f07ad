"""ArcFace with the focal factor: what is learned already counts less.

    (1 − p)^γ · ArcFace,   p the probability of the true class with its margin

Lin et al., Focal Loss for Dense Object Detection, 2017, equation 4; with ArcFace as the authors of
insightface first trained it.

    python -m marginface.main --config experiments/focal_arcface.py:data=small

Time: on two cores, shortest to longest run.
    17 to 33 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.65 ± 1.74 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import arcface


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = arcface.get_config(arg)
    config.loss.kw = ConfigDict({"focal": 2.0})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for focal in (0.0, 1.0, 2.0):
            add({"model.embedding_dim": dim, "loss.kw.focal": focal})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    arcface.search(space, arg)
    space.uniform("loss.kw.focal", 0.0, 4.0)
