"""NormFace and triplet loss together.

    NormFace + λ [‖a − p‖² − ‖a − n‖² + α]₊,   all triplets of 32 people with four images each

Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, 2015, equation 3,
beside Wang et al., NormFace, 2017.

    python -m marginface.main --config experiments/softmax_triplet.py:data=small

Time: on two cores, shortest to longest run.
    25 to 36 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    90.13 ± 0.07 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import normface


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = normface.get_config(arg)
    config.data.images_per_identity = 4
    config.pairs.triplet = ConfigDict(
        {"weight": 1.0, "margin": 0.2, "triplets": "all", "positives": "all", "negatives": "all"}
    )
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for weight in (0.0, 1.0, 10.0):
            add({"model.embedding_dim": dim, "pairs.triplet.weight": weight})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    normface.search(space, arg)
    space.log_uniform("pairs.triplet.weight", 0.05, 20.0)
    space.uniform("pairs.triplet.margin", 0.05, 0.6)
