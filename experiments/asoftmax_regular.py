"""A-Softmax with RegularFace's exclusive regularisation: prototypes pushed apart.

    loss = A-Softmax + λ Lr(W),   Lr(W) = (1/C) Σ_i max_{j≠i} cos(W_i, W_j)

Zhao et al., RegularFace: Deep Face Recognition via Exclusive Regularization, 2019, equation 6.
With data=folder and casia λ is the authors' 15 · 5 / λ_A-Softmax, which grows as that decays.

    python -m marginface.main --config experiments/asoftmax_regular.py:data=small

Time: on two cores, shortest to longest run.
    19 to 23 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.04 ± 0.43 % (data=small, 5 seeds; study_embedded.csv)
    92.00 ± 0.25 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import asoftmax, common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = asoftmax.get_config(arg)
    common.exclusive(config, arg, published=15.0, ramp="inverse_anneal")
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (2.0, 3.0, 4.0):
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
    asoftmax.search(space, arg)
    space.log_uniform("regularizers.exclusive.weight", 0.01, 30.0)
