"""Losses as pure functions; nothing in here knows a config or a mesh.

margins         ψ of one cosine
similarity      of embeddings and prototypes
class_softmax   the one walk over all classes
class_losses    a paper's loss over classes, one function each
joint_losses    terms of embeddings and labels beside it
pair_losses     of pairs and triplets in a batch
regularizers    of the prototypes alone
groups          how evenly latent groups are used, and scores that know them
table           what a loss may ask for, and what it needs beside
"""

from marginface.losses.class_losses import (
    ClassLoss,
    adacos,
    adaface,
    adaptive_margin_softmax,
    circle,
    curricularface,
    elasticface,
    large_margin_softmax,
    magface,
    margin_softmax,
    mv_softmax,
    sphereface2,
    uniface,
)
from marginface.losses.class_softmax import (
    PAD,
    Classes,
    Negatives,
    all_classes,
    negatives,
    sample_classes,
    sum_negatives,
    target_similarity,
)
from marginface.losses.joint_losses import (
    center,
    energy,
    grouping,
    inter,
    intra,
    learned_center,
    magnitude,
    mean_margin,
    norm_penalty,
    ring,
)
from marginface.losses.margins import (
    Margin,
    additive_angular,
    additive_cosine,
    anneal,
    combined,
    detach,
    identity,
    multiplicative_angular,
)
from marginface.losses.pair_losses import contrastive, siamese, triplet
from marginface.losses.regularizers import exclusive, hyperspherical_energy, uniform
from marginface.losses.similarity import Linear, cosine, linear, subcenter_cosine
from marginface.losses.table import Inputs, Loss

__all__ = [
    "PAD",
    "ClassLoss",
    "Classes",
    "Inputs",
    "Linear",
    "Loss",
    "Margin",
    "Negatives",
    "adacos",
    "adaface",
    "adaptive_margin_softmax",
    "additive_angular",
    "additive_cosine",
    "all_classes",
    "anneal",
    "center",
    "circle",
    "combined",
    "contrastive",
    "cosine",
    "curricularface",
    "detach",
    "elasticface",
    "energy",
    "exclusive",
    "grouping",
    "hyperspherical_energy",
    "identity",
    "inter",
    "intra",
    "large_margin_softmax",
    "learned_center",
    "linear",
    "magface",
    "magnitude",
    "margin_softmax",
    "mean_margin",
    "multiplicative_angular",
    "mv_softmax",
    "negatives",
    "norm_penalty",
    "ring",
    "sample_classes",
    "siamese",
    "sphereface2",
    "subcenter_cosine",
    "sum_negatives",
    "target_similarity",
    "triplet",
    "uniface",
    "uniform",
]
