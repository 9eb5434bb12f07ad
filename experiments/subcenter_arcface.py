"""Sub-center ArcFace: K prototypes for each class, the nearest counts.

    target: s cos(θ_y + m),   others: s cos θ_j,   θ_j = min_k angle(x, W_jk)

Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces, 2020,
equations 2 and 3. After training, `python -m marginface.clean RUN` writes which images lie far from
their class's dominant sub-center; arcface.py with --config.data.cleaned=RUN/cleaned.csv goes on.

    python -m marginface.main --config experiments/subcenter_arcface.py:data=small

Time: on two cores, shortest to longest run.
    16 to 33 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.35 ± 0.50 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import arcface


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = arcface.get_config(arg)
    config.loss.similarity = "subcenter_cosine"
    config.loss.subcenters = 3
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for subcenters in (1, 2, 3, 5):
            add({"model.embedding_dim": dim, "loss.subcenters": subcenters})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    arcface.search(space, arg)
