"""Softmax with bias: the loss that knows no margin.

    loss = log Σ_j exp(W_j·x + b_j) − (W_y·x + b_y)

The baseline of every paper here, e.g. Deng et al., ArcFace, 2019, equation 1.

    python -m marginface.main --config experiments/softmax.py

Time on two cores: four minutes on the embedded faces, about eight with :data=lfw.
Expect: on LFW View 1 about 83 % (see results/); on the embedded faces not run.
Published, CASIA-WebFace, ResNet-50 (ArcFace, table 2): LFW 99.08, CFP-FP 94.39, AgeDB 92.33.
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
