"""Losses as pure functions; nothing in here knows a config or a mesh.

margins         ψ of one cosine
similarity      of embeddings and prototypes
class_softmax   the one walk over all classes
class_losses    a paper's loss over classes, one function each
joint_losses    terms of embeddings and labels beside it
pair_losses     of pairs and triplets in a batch
regularizers    of the prototypes alone
groups          how evenly latent groups are used, and scores that know them
"""
