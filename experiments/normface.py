"""NormFace: softmax over scaled cosines, no margin.

    loss = log Σ_j exp(s cos θ_j) − s cos θ_y

Wang et al., NormFace: L2 Hypersphere Embedding for Face Verification, 2017, equation 6.

    python -m marginface.main --config experiments/normface.py

Time on two cores: four minutes on the embedded faces, about eight with :data=lfw.
Expect: on LFW View 1 about 84 % (see results/); on the embedded faces not run.
Published, CASIA-WebFace, ResNet-50, s = 64 (ArcFace, table 2): LFW 98.56, CFP-FP 89.79,
AgeDB 88.72.
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for scale in (16.0, 32.0, 64.0):
            add({"model.embedding_dim": dim, "loss.scale": scale})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
