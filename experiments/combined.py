"""The combined margin: a factor, an angle and a cosine at once.

    target: s (cos(m1 θ + m2) − m3),   others: s cos θ_j

Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, equation 4;
CM1 is (1, 0.3, 0.2), CM2 is (0.9, 0.4, 0.15) in their table 2.

    python -m marginface.main --config experiments/combined.py:data=small

Time: on two cores, shortest to longest run.
    19 to 23 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.30 ± 3.05 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
Published: ArcFace, table 2; CASIA-WebFace, ResNet-50, CM1.
    LFW 99.48, CFP-FP 95.12, AgeDB 94.38
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    config.loss.margin = "combined"
    m2, m3 = (
        common.by_size(arg, published=0.3, small=0.2),
        common.by_size(arg, published=0.2, small=0.1),
    )
    config.loss.margin_kw = ConfigDict({"m1": 1.0, "m2": m2, "m3": m3})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m1, m2, m3 in ((1.0, 0.0, 0.0), (1.0, 0.3, 0.2), (0.9, 0.4, 0.15)):
            add(
                {
                    "model.embedding_dim": dim,
                    "loss.margin_kw.m1": m1,
                    "loss.margin_kw.m2": m2,
                    "loss.margin_kw.m3": m3,
                }
            )


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.margin_kw.m1", 0.9, 1.2)
    space.uniform("loss.margin_kw.m2", 0.0, 0.5)
    space.uniform("loss.margin_kw.m3", 0.0, 0.35)
