"""ArcFace with RegularFace's exclusive regularisation: prototypes pushed apart.

    loss = ArcFace + λ Lr(W),   Lr(W) = (1/C) Σ_i max_{j≠i} cos(W_i, W_j)

Zhao et al., RegularFace: Deep Face Recognition via Exclusive Regularization, 2019, equation 6.

    python -m marginface.main --config experiments/arcface_regular.py

Time: on two cores, shortest to longest run.
    222 to 270 s (data=synthetic; synthetic.csv)
    20 to 48 s (data=small; losses_embedded.csv)
    985 to 1743 s (data=lfw; study_lfw.csv)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    97.05 to 97.70 % (data=synthetic, 2 runs of seed 0; synthetic.csv)
    91.57 ± 0.67 % (data=small, 5 seeds; study_embedded.csv)
    91.40 ± 2.05 % (data=small, 3 seeds; losses_embedded.csv)
    90.80 to 92.80 % (data=small, all 36 settings of sweep, seed 0; study_grid.csv)
    84.87 ± 1.43 % (data=lfw, 3 seeds; study_lfw.csv)
    not run (data=folder, casia)
"""

from experiments import arcface, common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = arcface.get_config(arg)
    common.exclusive(config, arg)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (0.3, 0.4, 0.5):
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
    arcface.search(space, arg)
    space.log_uniform("regularizers.exclusive.weight", 0.01, 30.0)
