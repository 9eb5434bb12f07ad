"""Contrastive loss: no classes, only pairs.

    same: d²/2,   different: [m − d]₊²/2,   d the distance of unit embeddings

Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, 2006,
equation 4; batches of 32 people with four images each.

    python -m marginface.main --config experiments/contrastive.py:data=small

Time: on two cores, shortest to longest run.
    20 to 39 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.83 ± 0.61 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.pairs_only(arg)
    config.pairs.contrastive = ConfigDict({"weight": 1.0, "margin": 1.0, "normalized": True})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for m in (0.6, 0.8, 1.0, 1.2):
            add({"model.embedding_dim": dim, "pairs.contrastive.margin": m})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    common.search(space, arg)
    space.uniform("pairs.contrastive.margin", 0.4, 1.6)
