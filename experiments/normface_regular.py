"""NormFace with RegularFace's exclusive regularisation: prototypes pushed apart.

    loss = NormFace + λ Lr(W),   Lr(W) = (1/C) Σ_i max_{j≠i} cos(W_i, W_j)

Zhao et al., RegularFace: Deep Face Recognition via Exclusive Regularization, 2019, equation 6;
λ 6 with data=folder and casia, as in the authors' code.

    python -m marginface.main --config experiments/normface_regular.py:data=small

Time: on two cores, shortest to longest run.
    about half a minute (data=small, not timed alone)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.21 ± 0.79 % (data=small, 5 seeds; study_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common, normface


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = normface.get_config(arg)
    common.exclusive(config, arg, published=6.0)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for lam in (0.0, 0.1, 1.0, 10.0):
            add({"model.embedding_dim": dim, "regularizers.exclusive.weight": lam})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    normface.search(space, arg)
    space.log_uniform("regularizers.exclusive.weight", 0.01, 30.0)
