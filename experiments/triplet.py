"""Triplet loss with semi-hard negatives, mined over the whole batch.

    [‖a − p‖² − ‖a − n‖² + α]₊,   d_ap < d_an < d_ap + α, unit embeddings

Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, 2015, equation 3
and section 3.2; batches of 32 people with four images each.

    python -m marginface.main --config experiments/triplet.py:data=small

Time: on two cores, shortest to longest run.
    26 to 33 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.36 ± 0.71 % (data=small, 5 seeds; study_embedded.csv)
    92.02 ± 1.64 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.pairs_only(arg)
    config.pairs.triplet = ConfigDict(
        {
            "weight": 1.0,
            "margin": 0.2,
            "triplets": "semi_hard",
            "positives": "all",
            "negatives": "all",
        }
    )
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for triplets in ("semi_hard", "all", "hard"):
            for m in (0.1, 0.2, 0.4):
                add(
                    {
                        "model.embedding_dim": dim,
                        "pairs.triplet.triplets": triplets,
                        "pairs.triplet.margin": m,
                    }
                )


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.uniform("pairs.triplet.margin", 0.05, 0.6)
