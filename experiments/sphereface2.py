"""SphereFace2-C: one binary decision for each class, summed.

    (α/r) log(1 + exp(−r(g(cos θ_y) − m) − b)) + ((1 − α)/r) Σ_j log(1 + exp(r(g(cos θ_j) + m) + b))
    g(z) = 2((z + 1)/2)^t − 1

Wen et al., SphereFace2: Binary Classification is All You Need for Deep Face Recognition, 2022,
equation 8 with margin type C.

    python -m marginface.main --config experiments/sphereface2.py:data=small

Time: on two cores, shortest to longest run.
    26 to 35 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    90.93 ± 0.90 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    common.class_loss(
        config,
        "sphereface2",
        without=("margin",),
        m=common.by_size(arg, published=0.4, small=0.2),
        balance=common.by_size(arg, published=0.7, small=0.98),
        power=3.0,
    )
    config.loss.scale = common.by_size(arg, published=40.0, small=30.0)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (0.2, 0.3, 0.4):
            add({"model.embedding_dim": dim, "loss.kw.m": m})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
    space.uniform("loss.kw.m", 0.05, 0.6)
    space.uniform("loss.kw.balance", 0.5, 0.995)
