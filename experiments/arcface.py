"""ArcFace: a margin added to the target's angle.

    target: s cos(θ + m),   others: s cos θ_j

The true gradient of the margin is used; --config.loss.detach=True computes the margin without
gradient, as arcface_torch does.

Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, equation 3.

    python -m marginface.main --config experiments/arcface.py:data=small

Time: on two cores, shortest to longest run.
    20 to 54 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.21 ± 1.08 % (data=small, 5 seeds; study_embedded.csv)
    91.17 ± 2.41 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
Published: ArcFace, table 2; CASIA-WebFace, ResNet-50, m = 0.5.
    LFW 99.53, CFP-FP 95.56, AgeDB 95.15
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    config.loss.margin = "additive_angular"
    config.loss.margin_kw = ConfigDict({"m": common.by_size(arg, published=0.5, small=0.3)})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (0.0, 0.3, 0.4, 0.5):
            add({"model.embedding_dim": dim, "loss.margin_kw.m": m})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.margin_kw.m", 0.05, 0.6)
