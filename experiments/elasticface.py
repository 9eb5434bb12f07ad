"""ElasticFace: the margin is drawn anew for each example.

    target: s cos(θ_y + m_i),   others: s cos θ_j,   m_i ~ N(m, σ²)

Boutros et al., ElasticFace: Elastic Margin Loss for Deep Face Recognition, 2022, equation 5;
--config.loss.kw.plus=True hands the draws out by difficulty,
--config.loss.kw.target=additive_cosine draws CosFace's margin (the paper's m 0.35).

    python -m marginface.main --config experiments/elasticface.py:data=small

Time: on two cores, shortest to longest run.
    16 to 30 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.10 ± 2.40 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    common.class_loss(
        config,
        "elasticface",
        without=("margin",),
        m=common.by_size(arg, published=0.5, small=0.3),
        deviation=0.0125,
        target="additive_angular",
        plus=False,
    )
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for plus in (False, True):
            for deviation in (0.0125, 0.025, 0.05):
                add(
                    {
                        "model.embedding_dim": dim,
                        "loss.kw.plus": plus,
                        "loss.kw.deviation": deviation,
                    }
                )


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.kw.m", 0.05, 0.6)
    space.log_uniform("loss.kw.deviation", 0.005, 0.2)
