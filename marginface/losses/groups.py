"""Latent groups of faces: balanced labels that a network gives itself, and their use.

p [b, K] are the group probabilities of the decision network in `models/group_head`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from marginface.typing import Array, Float, Int


class Usage(NamedTuple):
    """How evenly groups are used.

    Attributes:
        entropy: of the shares of the groups, over log K: 1 if all are equal, 0 if one has all.
        largest: the largest share times K: 1 if all are equal, K if one has all.
    """

    entropy: Float[Array, ""]
    largest: Float[Array, ""]


def self_distributed_labels(
    probabilities: Float[Array, "b k"], expectation: Float[Array, "k"]
) -> Int[Array, "b"]:
    """G*(x) = argmax_k p̃(G_k|x), p̃(G_k|x) = (p(G_k|x) − E_x[p(G_k|x)])/K + 1/K: no derivative.

    A group that the network gives to everybody is expected, so it is nobody's label.

    Args:
        probabilities: p(G_k|x), of each example.
        expectation: E_x[p(G_k|x)].

    Returns:
        Groups, int32; the first of several equals.

    References:
        Kim et al., "GroupFace: Learning Latent Groups and Constructing Group-based Representations
        for Face Recognition", 2020, section 3.2.
    """
    # The 1/K of the paper scales and shifts all groups alike, and would only cost bits here.
    surprise = probabilities.astype(jnp.float32) - expectation
    return jnp.argmax(lax.stop_gradient(surprise), axis=1).astype(jnp.int32)


def update_expectation(
    expectation: Float[Array, "k"], probabilities: Float[Array, "b k"], *, momentum: float | Array
) -> Float[Array, "k"]:
    """E ← momentum·E + (1 − momentum)·mean_x p(G_k|x), from E = 0: no derivative.

    Probabilities sum to 1, so after t batches E sums to 1 − momentum^t: E/ΣE weighs the batches
    seen so far and nothing else. A uniform start would weigh an invented batch, and until that is
    forgotten a group that the first weights prefer keeps all the labels.

    Args:
        expectation: E before the batch.
        probabilities: p(G_k|x) of the whole batch; under jit it may be sharded.
        momentum: 0 <= momentum < 1; the mean reaches back about 1/(1 − momentum) batches.

    Returns:
        E after the batch, float32.
    """
    batch = jnp.mean(lax.stop_gradient(probabilities).astype(jnp.float32), axis=0)
    return momentum * expectation + (1.0 - momentum) * batch


def usage(group_ids: Int[Array, "n"], num_groups: int) -> Usage:
    """H(shares)/log K and K·max(shares), shares_k = part of the examples in group k.

    Args:
        group_ids: [n], n > 0, in [0, num_groups): for instance the arg-max of the logits.
        num_groups: K.

    Returns:
        Entropy and largest share; both 1 where K = 1.
    """
    shares = jnp.mean(group_ids[:, None] == jnp.arange(num_groups), axis=0)
    entropy = jnp.sum(jax.scipy.special.entr(shares))
    return Usage(
        entropy / np.log(num_groups) if num_groups > 1 else jnp.ones(()),
        jnp.max(shares) * num_groups,
    )


def group_aware_similarity(
    embeddings: Float[np.ndarray, "m d"],
    features: Float[np.ndarray, "m e"],
    first: Int[np.ndarray, "n"],
    second: Int[np.ndarray, "n"],
    *,
    beta: float = 0.1,
    gamma: float = 1 / 3,
) -> Float[np.ndarray, "n"]:
    """cos(v_i, v_j) − β·‖g_i − g_j‖^γ: faces of different groups look less alike.

    g is the last hidden layer of the decision network, "group_feature" in `models/group_head`. It
    says only which groups a face resembles and was never trained under a cosine: hence a distance,
    small beside the cosine.

    Args:
        embeddings: v, of any norm.
        features: g of the same images.
        first, second: the rows of each pair.
        beta: weight of the distance; 0 leaves the cosine.
        gamma: power of the distance, > 0.

    Returns:
        Scores, float64; the cosine is 0 where a v is zero.

    References:
        Kim et al., "GroupFace: Learning Latent Groups and Constructing Group-based Representations
        for Face Recognition", 2020, section 3.1.
    """
    v, g = embeddings.astype(np.float64), features.astype(np.float64)
    norms = np.linalg.norm(v, axis=1, keepdims=True)
    v = v / np.where(norms > 0, norms, 1.0)
    cosines = np.einsum("nd,nd->n", v[first], v[second])
    return cosines - beta * np.linalg.norm(g[first] - g[second], axis=1) ** gamma
