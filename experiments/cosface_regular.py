"""CosFace with RegularFace's exclusive regularisation: prototypes pushed apart.

    loss = CosFace + λ Lr(W),   Lr(W) = (1/C) Σ_i max_{j≠i} cos(W_i, W_j)

Zhao et al., RegularFace: Deep Face Recognition via Exclusive Regularization, 2019, equation 6.

    python -m marginface.main --config experiments/cosface_regular.py:data=small

Time: on two cores, shortest to longest run.
    about half a minute (data=small, not timed alone)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.31 ± 1.03 % (data=small, 5 seeds; study_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common, cosface


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = cosface.get_config(arg)
    common.exclusive(config, arg)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (0.1, 0.2, 0.35):
            for lam in (0.0, 0.1, 1.0, 10.0):
                add(
                    {
                        "model.embedding_dim": dim,
                        "loss.margin_kw.m": m,
                        "regularizers.exclusive.weight": lam,
                    }
                )


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    cosface.search(space, arg)
    space.log_uniform("regularizers.exclusive.weight", 0.01, 30.0)
