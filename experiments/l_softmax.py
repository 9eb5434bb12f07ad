"""L-Softmax: A-Softmax's margin with the norms of embedding and prototype left in.

    target: ‖W_y‖‖x‖ (λ cos θ + ψ(θ)) / (1 + λ),   others: ‖W_j‖‖x‖ cos θ_j,   λ as in A-Softmax

Liu et al., Large-Margin Softmax Loss for Convolutional Neural Networks, 2016, equation 4.

    python -m marginface.main --config experiments/l_softmax.py:data=small

Time: on two cores, shortest to longest run.
    17 to 36 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.05 ± 1.14 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
Published: CosFace, table 2, which runs it again; CASIA-WebFace, SphereFace-64.
    LFW 99.10, YTF 94.0
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    common.class_loss(config, "large_margin_softmax", without=("scale",))
    config.loss.margin = "multiplicative_angular"
    config.loss.margin_kw = ConfigDict({"m": 4.0})
    common.anneal(config, arg)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (1.0, 2.0, 3.0, 4.0):
            add({"model.embedding_dim": dim, "loss.margin_kw.m": m})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.choice("loss.margin_kw.m", (2.0, 3.0, 4.0))
    space.log_uniform("loss.anneal.least", 2.0, 20.0)
