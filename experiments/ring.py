"""Softmax with Ring loss: all embeddings are drawn to one learned norm.

    softmax + (λ/2) (‖x‖ − R)²

Zheng et al., Ring Loss: Convex Feature Normalization for Face Recognition, 2018, equation 1.

    python -m marginface.main --config experiments/ring.py:data=small

Time: on two cores, shortest to longest run.
    16 to 42 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.88 ± 0.76 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import softmax


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = softmax.get_config(arg)
    config.joint.ring = ConfigDict({"weight": 0.01})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for weight in (0.0, 0.001, 0.01, 0.1):
            add({"model.embedding_dim": dim, "joint.ring.weight": weight})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    softmax.search(space, arg)
    space.log_uniform("joint.ring.weight", 0.0001, 1.0)
