"""NormFace with ArcFace's Intra and Inter losses: closer to the own prototype, prototypes apart.

    NormFace + θ_y/π − (1/(π(C − 1))) Σ_{j≠y} angle(W_y, W_j)

Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, equations 5 and
6.

    python -m marginface.main --config experiments/intra_inter.py:data=small

Time: on two cores, shortest to longest run.
    17 to 31 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.43 ± 1.13 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import common, normface


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = normface.get_config(arg)
    config.joint.intra = ConfigDict({"weight": 1.0})
    config.joint.inter = ConfigDict({"weight": 1.0, "chunk_size": common.auto()})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for intra in (0.0, 1.0):
            for inter in (0.0, 1.0):
                add(
                    {
                        "model.embedding_dim": dim,
                        "joint.intra.weight": intra,
                        "joint.inter.weight": inter,
                    }
                )


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    normface.search(space, arg)
    space.log_uniform("joint.intra.weight", 0.05, 20.0)
    space.log_uniform("joint.inter.weight", 0.05, 20.0)
