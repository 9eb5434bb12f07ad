"""Losses as pure functions; nothing in here knows a config or a mesh.

Of each loss that a config may name, the functions stand here too that start what it trains or
remembers: adacos(..., running=adacos_start(num_classes)).

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
    MarginRows,
    adacos,
    adacos_start,
    adaface,
    adaface_start,
    adaptive_margin_softmax,
    circle,
    curricularface,
    curricularface_start,
    elasticface,
    large_margin_softmax,
    magface,
    margin_rows,
    margin_softmax,
    mv_softmax,
    sphereface2,
    sphereface2_start,
    uniface,
    uniface_start,
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
    centers_at_origin,
    energy,
    grouping,
    grouping_start,
    inter,
    intra,
    learned_center,
    magnitude,
    mean_margin,
    norm_penalty,
    ring,
    ring_start,
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
from marginface.losses.pair_losses import (
    contrastive,
    siamese,
    siamese_score,
    siamese_start,
    triplet,
)
from marginface.losses.regularizers import exclusive, hyperspherical_energy, uniform
from marginface.losses.similarity import Linear, cosine, dot, linear, norm, subcenter_cosine
from marginface.losses.table import Inputs, Loss

__all__ = [
    "PAD",
    "ClassLoss",
    "Classes",
    "Inputs",
    "Linear",
    "Loss",
    "Margin",
    "MarginRows",
    "Negatives",
    "adacos",
    "adacos_start",
    "adaface",
    "adaface_start",
    "adaptive_margin_softmax",
    "additive_angular",
    "additive_cosine",
    "all_classes",
    "anneal",
    "center",
    "centers_at_origin",
    "circle",
    "combined",
    "contrastive",
    "cosine",
    "curricularface",
    "curricularface_start",
    "detach",
    "dot",
    "elasticface",
    "energy",
    "exclusive",
    "grouping",
    "grouping_start",
    "hyperspherical_energy",
    "identity",
    "inter",
    "intra",
    "large_margin_softmax",
    "learned_center",
    "linear",
    "magface",
    "magnitude",
    "margin_rows",
    "margin_softmax",
    "mean_margin",
    "multiplicative_angular",
    "mv_softmax",
    "negatives",
    "norm",
    "norm_penalty",
    "ring",
    "ring_start",
    "sample_classes",
    "siamese",
    "siamese_score",
    "siamese_start",
    "sphereface2",
    "sphereface2_start",
    "subcenter_cosine",
    "sum_negatives",
    "target_similarity",
    "triplet",
    "uniface",
    "uniface_start",
    "uniform",
]
