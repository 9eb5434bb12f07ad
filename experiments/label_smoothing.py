"""NormFace with smoothed labels.

    wanted probability: 1 − ε + ε/C for the true class, ε/C for each other one

Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016, section 7.

    python -m marginface.main --config experiments/label_smoothing.py:data=small

Time: on two cores, shortest to longest run.
    16 to 31 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    90.87 ± 1.74 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    common.class_loss(config, "margin_softmax", smoothing=0.1)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for smoothing in (0.0, 0.05, 0.1, 0.2):
            add({"model.embedding_dim": dim, "loss.kw.smoothing": smoothing})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.kw.smoothing", 0.0, 0.3)
