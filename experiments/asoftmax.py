"""A-Softmax (SphereFace): a factor m on the target's angle, annealed.

    target: ‖x‖ (λ cos θ + ψ(θ)) / (1 + λ),   ψ(θ) = (−1)^k cos(mθ) − 2k,   others: ‖x‖ cos θ_j
    λ = max(5, 1000 (1 + rate · step)^−1)

Liu et al., SphereFace: Deep Hypersphere Embedding for Face Recognition, 2017, equation 7; λ with
rate 0.12 as in the authors' training files; on the small sets it is done after half of the run.

    python -m marginface.main --config experiments/asoftmax.py:data=small

Time: on two cores, shortest to longest run.
    19 to 23 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.18 ± 0.61 % (data=small, 5 seeds; study_embedded.csv)
    92.23 ± 0.90 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
Published: SphereFace, comparison on LFW and YTF; CASIA-WebFace, SphereFace-64, m = 4.
    LFW 99.42, YTF 95.0
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    config.loss.margin = "multiplicative_angular"
    config.loss.margin_kw = ConfigDict({"m": 4.0})
    config.loss.norm_as_scale = True
    config.loss.scale = 1.0
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
