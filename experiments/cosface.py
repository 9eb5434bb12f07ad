"""CosFace: a margin subtracted from the target's cosine.

    target: s (cos θ − m),   others: s cos θ_j

Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018, equation 4.

    python -m marginface.main --config experiments/cosface.py:data=small

Time: on two cores, shortest to longest run.
    16 to 31 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.28 ± 0.80 % (data=small, 5 seeds; study_embedded.csv)
    91.27 ± 2.89 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
Published: CosFace, table 2; CASIA-WebFace, SphereFace-64.
    LFW 99.33, YTF 96.1
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    config.loss.margin = "additive_cosine"
    config.loss.margin_kw = ConfigDict({"m": common.by_size(arg, published=0.35, small=0.2)})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (0.0, 0.1, 0.2, 0.35):
            add({"model.embedding_dim": dim, "loss.margin_kw.m": m})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.margin_kw.m", 0.05, 0.5)
