"""NormFace: softmax over scaled cosines, no margin.

    loss = log Σ_j exp(s cos θ_j) − s cos θ_y

Wang et al., NormFace: L2 Hypersphere Embedding for Face Verification, 2017, equation 6.

    python -m marginface.main --config experiments/normface.py:data=small

Time: on two cores, shortest to longest run.
    17 to 32 s (data=small; losses_embedded.csv)
    394 to 1346 s (data=lfw; study_lfw.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.24 ± 0.63 % (data=small, 5 seeds; study_embedded.csv)
    91.38 ± 1.23 % (data=small, 3 seeds; losses_embedded.csv)
    83.67 ± 0.52 % (data=lfw, 3 seeds; study_lfw.csv)
    not run (data=synthetic, folder, casia)
Published: ArcFace, table 2; CASIA-WebFace, ResNet-50, s = 64.
    LFW 98.56, CFP-FP 89.79, AgeDB 88.72
"""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for scale in (16.0, 32.0, 64.0):
            add({"model.embedding_dim": dim, "loss.scale": scale})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.log_uniform("loss.scale", 8.0, 128.0)
