"""SphereFace+: A-Softmax with minimum hyperspherical energy of the prototypes.

    A-Softmax + λ mean_{j≠y} angle(W_y, W_j)^−2

Liu et al., Learning towards Minimum Hyperspherical Energy, 2018, section 3.4 (the energy of the
batch's own classes; regularizers.hyperspherical_energy is that of all).

    python -m marginface.main --config experiments/sphereface_plus.py:data=small

Time: on two cores, shortest to longest run.
    16 to 24 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.40 ± 1.63 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import asoftmax, common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = asoftmax.get_config(arg)
    config.joint.energy = ConfigDict({"weight": 1.0, "power": 2.0, "chunk_size": common.auto()})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for weight in (0.0, 0.1, 1.0, 10.0):
            add({"model.embedding_dim": dim, "joint.energy.weight": weight})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    asoftmax.search(space, arg)
    space.log_uniform("joint.energy.weight", 0.01, 30.0)
