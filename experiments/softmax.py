"""Softmax with bias: the loss that knows no margin.

    loss = log Σ_j exp(W_j·x + b_j) − (W_y·x + b_y)

The baseline of every paper here, e.g. Deng et al., ArcFace, 2019, equation 1.

    python -m marginface.main --config experiments/softmax.py:data=small

Time: on two cores, shortest to longest run.
    17 to 33 s (data=small; losses_embedded.csv)
    393 to 1073 s (data=lfw; study_lfw.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.32 ± 0.56 % (data=small, 5 seeds; study_embedded.csv)
    92.30 ± 0.87 % (data=small, 3 seeds; losses_embedded.csv)
    82.40 ± 0.99 % (data=lfw, 3 seeds; study_lfw.csv)
    not run (data=synthetic, folder, casia)
Published: ArcFace, table 2; CASIA-WebFace, ResNet-50.
    LFW 99.08, CFP-FP 94.39, AgeDB 92.33
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    config.loss.similarity = "linear"
    config.loss.scale = 1.0
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        add({"model.embedding_dim": dim})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
