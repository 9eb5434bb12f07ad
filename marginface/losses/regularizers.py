"""Regularisers: functions of the prototypes alone, one value per class.

Their mean over the real classes is what a loss adds. No matrix of all pairs of classes is ever
formed: chunk_size bounds the tile of pairs that stands in memory, in both directions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from marginface.losses.class_softmax import PAD, Classes, _walk, find, sum_negatives, vary
from marginface.losses.margins import _angle
from marginface.losses.similarity import Precision, cosine, normalize
from marginface.losses.table import Loss
from marginface.typing import Array, Float, Int

_CLOSEST = 1 - 1e-5  # cos 0.0045: float32 resolves no smaller angle, and θ^−2 must stay finite

Potential = Callable[[Float[Array, "m n"]], Float[Array, "m n"]]  # of cosines, elementwise


def exclusive(
    classes: Classes,
    *,
    chunk_size: int | None = None,
    precision: Precision = "highest",
    axis_name: str | None = None,
) -> Float[Array, "c"]:
    """Sep_i = max_{j≠i} cos(W_i, W_j), the cosine to the nearest other class.

    Lr(W) = (1/C) Σ_i Sep_i is the mean over the real classes. The nearest class is searched without
    derivative, chunk by chunk; only the C found pairs are differentiated, at both ends. A tile of
    cosines serves both of its sides, so the search takes C²/2 of them.

    Args:
        classes: the prototypes held here, rows [c, d].
        chunk_size: classes compared at a time, on either side; None for all at once.
        precision: of the search's products, see similarity.product; the cosines of the pairs that
            it finds are float32 always. Rounding may take another class for the nearest, whose
            cosine is less by no more than the products are wrong.
        axis_name: the mesh axis over which the classes are sharded, if any: every block of
            prototypes then travels half around the ring of devices to search, and once around to
            gather.

    Returns:
        Sep per held row; 0, without gradient, for padding and where there is no other class.

    Raises:
        ValueError: chunk_size is not positive.

    References:
        Zhao et al., RegularFace: Deep Face Recognition via Exclusive Regularization, 2019, eq. 6.
    """
    rows, ids = classes
    c = ids.shape[0]
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give a positive number or None")
    partner_ids = _search(
        lax.stop_gradient(classes), min(chunk_size or c, c), precision, axis_name
    ).ids

    def gather(partners: Array, block: Classes) -> Array:
        at, held = find(block.ids, partner_ids)
        # Out of range reads 0: unlike a mask, nothing of the rows' size is kept for each turn.
        at = jnp.where(held, at, c)
        return partners + block.rows.at[at].get(mode="fill", fill_value=0)

    partners = _around(
        gather, vary(jnp.zeros(rows.shape, rows.dtype), axis_name), classes, axis_name
    )
    cosines = jnp.sum(normalize(rows) * normalize(partners), axis=-1)
    return jnp.where((ids != PAD) & (partner_ids != PAD), cosines, 0.0)


def uniform(
    classes: Classes,
    *,
    offset: ArrayLike = 1.0,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "c"]:
    """U_i = 1/(C−1) Σ_{j≠i} 1/(d_ij + offset), the potential of class i among like charges.

    d_ij is the distance of W_i/‖W_i‖ and W_j/‖W_j‖: the paper's centers lie on a sphere, and length
    would enlarge the distances without turning the prototypes apart. Two closer than 0.0045 count
    as that close and do not repel each other.

    Args:
        classes: the prototypes held here, rows [c, d].
        offset: added to the distance; 1 in the paper, 0 for the plain electric potential.
        chunk_size: classes compared at a time, on either side; None for all at once.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        U per held row; 0, without gradient, for padding and where there is no other class.

    Raises:
        ValueError: chunk_size is not positive.

    References:
        Duan et al., UniformFace: Learning Deep Equidistributed Representation for Face
        Recognition, 2019, section 3.
    """

    def potential(cosines: Array) -> Array:
        return 1 / (jnp.sqrt(2 - 2 * jnp.minimum(cosines, _CLOSEST)) + offset)

    return _mean_over_others(potential, classes, chunk_size, axis_name)


def hyperspherical_energy(
    classes: Classes,
    *,
    power: ArrayLike = 2.0,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "c"]:
    """E_i = 1/(C−1) Σ_{j≠i} θ_ij^−power, with θ_ij the angle between W_i and W_j.

    SphereFace+ adds it to A-Softmax. Two prototypes closer than 0.0045 rad count as that close and
    do not repel each other; one of norm 0 is at right angles to all.

    Args:
        classes: the prototypes held here, rows [c, d].
        power: how fast the energy falls with the angle, in radians; 2 in SphereFace+.
        chunk_size: classes compared at a time, on either side; None for all at once.
        axis_name: the mesh axis over which the classes are sharded, if any.

    Returns:
        E per held row; 0, without gradient, for padding and where there is no other class.

    Raises:
        ValueError: chunk_size is not positive.

    References:
        Liu et al., Learning towards Minimum Hyperspherical Energy, 2018, eq. 1, with angles.
    """
    return _mean_over_others(
        lambda cosines: _inverse_angle(cosines, power), classes, chunk_size, axis_name
    )


def _inverse_angle(cosines: Float[Array, "m n"], power: ArrayLike) -> Float[Array, "m n"]:
    """θ^−power, as if no angle were below 0.0045 rad."""
    return 1 / jax.vmap(_angle)(jnp.minimum(cosines, _CLOSEST)) ** power


def _mean_over_others(
    potential: Potential, classes: Classes, chunk_size: int | None, axis_name: str | None
) -> Float[Array, "c"]:
    """1/(C−1) Σ_{j≠i} potential(cos(W_i, W_j)) for each held row i.

    Chunks of the others are gathered from all devices: blocks on a ring (see _around) would all be
    kept for the backward pass, that is all prototypes on every device.
    """
    c = classes.ids.shape[0]
    own = Classes(classes.rows.astype(jnp.float32), classes.ids)  # so gradients add up in float32
    share = chunk_size
    if axis_name is not None and chunk_size is not None:
        share = max(chunk_size // lax.axis_size(axis_name), 1)

    def visit(others: Classes) -> Float[Array, "c"]:
        if axis_name is not None:
            others = lax.all_gather(others, axis_name, tiled=True)

        def own_chunk(chunk: Classes) -> Float[Array, "m"]:
            return sum_negatives(*chunk, others, potential)[0]

        sums = _walk(own_chunk, own, chunk_size, axis_name)
        repeated = sums.size - c  # the last chunk overlaps the one before
        return jnp.concatenate([sums[:-1].ravel(), sums[-1, repeated:]])

    sums = jnp.sum(_walk(visit, own, share, axis_name), axis=0)
    return jnp.where(classes.ids != PAD, sums / _others(classes, axis_name), 0.0)


def _others(classes: Classes, axis_name: str | None) -> Int[Array, ""]:
    """C − 1, with C the real classes on all devices together, but at least 1 to divide by."""
    count = jnp.sum(classes.ids != PAD)
    if axis_name is not None:
        count = lax.psum(count, axis_name)
    return jnp.maximum(count - 1, 1)


class _Nearest(NamedTuple):
    """The nearest other class found so far for each of c rows: its cosine and id, PAD if none."""

    cosines: Array
    ids: Array

    def merge(self, other: "_Nearest") -> "_Nearest":
        """The better of two; of two equally near the one with the smaller id."""
        equal = (other.cosines == self.cosines) & (other.ids < self.ids)
        better = (other.cosines > self.cosines) | equal
        return jax.tree.map(lambda mine, theirs: jnp.where(better, theirs, mine), self, other)

    def merge_at(self, start: Array, part: "_Nearest") -> "_Nearest":
        """The better of the two for the rows from `start` on."""
        size = part.ids.shape[0]
        own = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), self)
        return jax.tree.map(
            lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new, start, 0),
            self,
            own.merge(part),
        )


def _search(classes: Classes, size: int, precision: Precision, axis_name: str | None) -> _Nearest:
    """The nearest other class of each held row, by tiles of size × size cosines.

    On a ring of n devices each block of classes visits n/2 of them and brings home what it found
    there; what it did for its hosts stays with them. So all pairs of devices have met.
    """
    c = classes.ids.shape[0]
    nothing = vary(_Nearest(jnp.full(c, -jnp.inf), jnp.full(c, PAD)), axis_name)
    starts = np.minimum(np.arange(0, c, size), c - size)  # the last chunk overlaps if need be
    own = starts[np.stack(np.triu_indices(len(starts)), axis=1)]
    above, below = _meet((nothing, nothing), classes, classes, own, size, precision)
    best = above.merge(below)
    if axis_name is None or (devices := lax.axis_size(axis_name)) == 1:
        return best
    turns = devices // 2
    every = starts[np.indices((len(starts),) * 2).reshape(2, -1).T]

    def pass_on(tree: Any, steps: int) -> Any:
        ring = [(device, (device + steps) % devices) for device in range(devices)]
        return lax.ppermute(tree, axis_name, ring)

    def turn(state: tuple, _: None) -> tuple[tuple, None]:
        best, guest, found = state
        guest, found = pass_on((guest, found), 1)
        best, found = _meet((best, found), classes, guest, every, size, precision)
        return (best, guest, found), None

    best, _, found = lax.scan(turn, (best, classes, nothing), length=turns)[0]
    return best.merge(pass_on(found, -turns))


def _meet(
    known: tuple[_Nearest, _Nearest],
    own: Classes,
    others: Classes,
    tiles: np.ndarray,
    size: int,
    precision: Precision,
) -> tuple[_Nearest, _Nearest]:
    """The nearest to own and to other classes, after a look at the tiles [n, 2]: their corners."""

    def part(classes: Classes, start: Array) -> Classes:
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), classes)

    def nearest(cosines: Array, ids: Array, axis: int) -> _Nearest:
        top = jnp.max(cosines, axis=axis)
        ids = jnp.expand_dims(ids, 1 - axis)
        at_top = cosines == jnp.expand_dims(top, axis)
        # Faster than argmax, whose pairs of numbers are compared one by one.
        found = jnp.min(jnp.where(at_top, ids, PAD), axis=axis)
        return _Nearest(top, jnp.where(jnp.isneginf(top), PAD, found))

    def look(known: tuple[_Nearest, _Nearest], tile: Array) -> tuple:
        mine, theirs = known
        a, b = part(own, tile[0]), part(others, tile[1])
        cosines = cosine(a.rows, b.rows, precision=precision)
        pairs = (a.ids[:, None] != b.ids) & (a.ids[:, None] != PAD) & (b.ids != PAD)
        cosines = jnp.where(pairs, cosines, -jnp.inf)
        mine = mine.merge_at(tile[0], nearest(cosines, b.ids, 1))
        theirs = theirs.merge_at(tile[1], nearest(cosines, a.ids, 0))
        return (mine, theirs), None

    return lax.scan(look, known, jnp.asarray(tiles, jnp.int32))[0]


def _around(
    visit: Callable[[Any, Classes], Any], carry: Any, block: Classes, axis_name: str | None
) -> Any:
    """visit(carry, block) for every device's block in turn, each passed on to the next device."""
    if axis_name is None:
        return visit(carry, block)
    devices = lax.axis_size(axis_name)
    ring = [(device, (device + 1) % devices) for device in range(devices)]

    def step(state: Any, _: None) -> tuple[Any, None]:
        carry, block = state
        return (visit(carry, block), lax.ppermute(block, axis_name, ring)), None

    return lax.scan(step, (carry, block), length=devices)[0][0]


LOSSES = {
    "exclusive": Loss(exclusive),
    "uniform": Loss(uniform),
    "hyperspherical_energy": Loss(hyperspherical_energy),
}
