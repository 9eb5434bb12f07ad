"""UniformFace: prototypes repel each other like equal charges.

    ArcFace + λ (1/(C(C − 1))) Σ_{i≠j} 1/(‖W_i − W_j‖ + 1)

Duan et al., UniformFace: Learning Deep Equidistributed Representation for Face Recognition, 2019,
section 3.

    python -m marginface.main --config experiments/uniformface.py:data=small

Time: on two cores, shortest to longest run.
    21 to 31 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.37 ± 2.54 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import arcface, common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = arcface.get_config(arg)
    config.regularizers.uniform = ConfigDict({"weight": 1.0, "chunk_size": common.auto()})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for weight in (0.0, 0.1, 1.0, 10.0):
            add({"model.embedding_dim": dim, "regularizers.uniform.weight": weight})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    arcface.search(space, arg)
    space.log_uniform("regularizers.uniform.weight", 0.01, 30.0)
