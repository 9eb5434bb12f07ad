"""After sub-center ArcFace: the sub-center that stands for a class, and the labels it doubts.

    k_y = argmax_k #{i of class y: argmax_l cos(x_i, W_yl) = k},   θ_i = angle(x_i, W_{y_i k_{y_i}})

All work on arrays of the host, chunk_size images (and classes) at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from marginface.losses.similarity import cosine
from marginface.typing import Array, Bool, Float, Int

DROPPED = -1  # the label of an image that is left out


class Cleaned(NamedTuple):
    """What became of each image, all [n].

    angle: to the dominant sub-center of its own class, degrees.
    keep: whether that is at most max_angle.
    label: its own where kept, else another class's number or DROPPED.
    """

    angle: Float[np.ndarray, "n"]
    keep: Bool[np.ndarray, "n"]
    label: Int[np.ndarray, "n"]


def dominant(
    embeddings: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    rows: Float[np.ndarray, "c k d"],
    num_classes: int,
    *,
    chunk_size: int = 4096,
) -> tuple[Int[np.ndarray, "{num_classes}"], Float[np.ndarray, "{num_classes} d"]]:
    """The sub-center of each class that most of its images are nearest to.

    Args:
        embeddings: x, of any norm.
        labels: y, class numbers.
        rows: K prototypes for each class, of any norm; those from num_classes on are padding.
        num_classes: the number of real rows.
        chunk_size: images at a time.

    Returns:
        Its number k (of equals the first; 0 for a class without images), and its prototype.

    Raises:
        ValueError: a label that is no class, too few rows, or chunk_size is not positive.

    References:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces,
        2020, section 3.3.
    """
    if len(rows) < num_classes:
        raise ValueError(f"{len(rows)} rows for {num_classes} classes; give one for each")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(f"label {labels[wrong][0]} is not a class from 0 to {num_classes - 1}")
    votes = np.zeros((num_classes, rows.shape[1]), np.int64)
    for part in _chunks(len(labels), chunk_size):
        cosines = _to_own(embeddings[part], rows[labels[part]])
        np.add.at(votes, (labels[part], np.argmax(cosines, axis=1)), 1)
    index = np.argmax(votes, axis=1)
    return index, rows[np.arange(num_classes), index]


def clean(
    embeddings: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    rows: Float[np.ndarray, "c k d"],
    *,
    num_classes: int,
    max_angle: float = 75.0,
    relabel: bool = True,
    chunk_size: int = 4096,
) -> Cleaned:
    """Keeps the images within max_angle of the dominant sub-center of their class.

    Args:
        embeddings: x, of any norm.
        labels: y, class numbers.
        rows: K prototypes for each class, of any norm; those from num_classes on are padding.
        num_classes: the number of real rows.
        max_angle: degrees; 75 in the paper.
        relabel: give an image beyond it to the other class whose dominant sub-center is nearest, if
            that is within max_angle; the paper drops every image beyond.
        chunk_size: images, and classes to relabel to, at a time.

    Returns:
        Angle, whether kept, and label of each image.

    Raises:
        ValueError: max_angle is no angle, and as `dominant`.

    References:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces,
        2020, section 3.3.
    """
    if not 0 <= max_angle <= 180:
        raise ValueError(f"max_angle={max_angle}: give degrees from 0 to 180")
    _, prototypes = dominant(embeddings, labels, rows, num_classes, chunk_size=chunk_size)
    angle = np.zeros(len(labels), np.float32)
    for part in _chunks(len(labels), chunk_size):
        angle[part] = _degrees(_to_own(embeddings[part], prototypes[labels[part], None])[:, 0])
    keep = angle <= max_angle
    label = np.where(keep, labels, DROPPED)
    far = np.flatnonzero(~keep)
    for part in _chunks(len(far) if relabel else 0, chunk_size):
        some = far[part]
        cosines, nearest = _nearest_other(embeddings[some], labels[some], prototypes, chunk_size)
        label[some] = np.where(_degrees(cosines) <= max_angle, nearest, DROPPED)
    return Cleaned(angle, keep, label)


def _nearest_other(
    embeddings: np.ndarray, labels: np.ndarray, prototypes: np.ndarray, chunk_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The largest cosine to another class and its number; −inf and DROPPED if there is none."""
    best = np.full(len(labels), -np.inf, np.float32)
    nearest = np.full(len(labels), DROPPED)
    for part in _chunks(len(prototypes), chunk_size):
        ids = np.arange(part.start, part.stop)
        cosines, at = _largest(embeddings, prototypes[part], ids == labels[:, None])
        better = cosines > best
        best, nearest = np.where(better, cosines, best), np.where(better, ids[at], nearest)
    return best, nearest


@jax.jit
def _largest(x: Array, rows: Array, leave_out: Array) -> tuple[Array, Array]:
    cosines = jnp.where(leave_out, -jnp.inf, cosine(x, rows))
    return jnp.max(cosines, axis=1), jnp.argmax(cosines, axis=1)


@jax.jit
def _to_own(x: Float[Array, "b d"], rows: Float[Array, "b k d"]) -> Float[Array, "b k"]:
    """cos(x_i, rows_ik): each embedding with the rows of its own class."""
    return jax.vmap(cosine)(x[:, None], rows)[:, 0]


def _degrees(cosines: Array | np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(np.asarray(cosines), -1.0, 1.0)))


def _chunks(count: int, size: int) -> Iterator[slice]:
    if size < 1:
        raise ValueError(f"chunk_size is {size}; give a positive number")
    return (slice(i, min(i + size, count)) for i in range(0, count, size))
