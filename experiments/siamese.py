"""A siamese network: logistic regression on the difference of two embeddings.

    P(same) = σ(Σ_k w_k |f_k(a) − f_k(b)| + b),   over all pairs of a batch, same ones as heavy

Taigman et al., DeepFace: Closing the Gap to Human-Level Performance in Face Verification, 2014,
section 4.2; --config.pairs.siamese.features=chi_square is its χ² similarity. Verification is scored
by the trained regression.

    python -m marginface.main --config experiments/siamese.py:data=small

Time: on two cores, shortest to longest run.
    21 to 41 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.67 ± 1.24 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.pairs_only(arg)
    config.pairs.siamese = ConfigDict({"weight": 1.0, "features": "difference", "frozen": False})
    config.evaluate.score = "siamese"
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for features in ("difference", "chi_square"):
            add({"model.embedding_dim": dim, "pairs.siamese.features": features})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
