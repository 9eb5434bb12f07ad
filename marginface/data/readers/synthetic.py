"""Embedded faces: people who do not exist, drawn on the device from three numbers.

An image is a function of (seed, identity, sample), so a data set is arithmetic: nothing is stored,
and the number of identities, the samples of each, the long tail and the label noise are exact.
"""

import dataclasses
import functools
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marginface.data import Faces, Pairs, Record
from marginface.data.faces import renderer as face_renderer
from marginface.data.faces import traits as face_traits
from marginface.typing import Array, Float, Shaped

__all__ = ["load", "render"]

# Goes up whenever the same numbers no longer give the same picture.
_RENDERER = 1
# Test identities start here, training identities at 0.
_TEST = 2**31


def _draw_all(seed, identity, sample, size, difficulty):
    root = jax.random.key(seed, impl="threefry2x32")

    def one(identity, sample):
        who, when = jax.random.split(jax.random.fold_in(root, identity))
        shot, noise = jax.random.split(jax.random.fold_in(when, sample))
        return face_renderer.draw(
            face_traits.draw_traits(who), face_traits.draw_shot(shot, difficulty), noise, size
        )

    images = jax.vmap(one)(identity, sample)
    return 2.0 * jnp.clip(jnp.moveaxis(images, 1, -1), 0.0, 1.0) - 1.0


# Traced numbers throughout: one compilation serves every seed and difficulty.
_compiled = jax.jit(_draw_all, static_argnames="size")


def render(
    seed: Any,
    identity: Shaped[Any, " b"],
    sample: Shaped[Any, " b"],
    *,
    size: int,
    difficulty: Any = 1.0,
) -> Float[Array, "b {size} {size} 3"]:
    """Photographs of people who do not exist: image = f(seed, identity, sample).

    Args:
        seed: integer, may be traced; another seed is another population.
        identity: who, uint32 [b].
        sample: which photograph of that person, uint32 [b].
        size: edge in pixels, a multiple of 8.
        difficulty: 0 nearly passport photographs, 1 the default, 2 hard; may be traced.

    Returns:
        RGB float32 [b, size, size, 3] in [-1, 1].

    Raises:
        ValueError: if size is not a positive multiple of 8.
    """
    if size <= 0 or size % 8:
        raise ValueError(f"image_size={size}: synthetic faces need a positive multiple of 8")
    return _compiled(seed, jnp.asarray(identity), jnp.asarray(sample), size, difficulty)


def _shuffled(index: int, count: int, seed: int) -> int:
    """Where a fixed pseudo-random permutation of range(count) sends `index`.

    A Feistel network on the smallest even number of bits, walked until it lands inside the range:
    a permutation of any length without storing it.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(right, turn, seed) & mask)
        index = left << half | right
        if index < count:
            return index


def _hash(*words: int) -> int:
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state ^ word) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 29) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 32
    return state


@dataclasses.dataclass(frozen=True)
class _Records:
    """Photograph after photograph: the first of every identity, then the second, and so on.

    Under a long tail fewer and fewer identities have another photograph, so the numbers of
    identities per round describe the whole set.
    """

    rounds: tuple[int, ...]
    first_identity: int
    noisy: int
    seed: int

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.rounds)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Record:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} in a data set of {len(self)} images")
        sample = int(np.searchsorted(self._starts, index, side="right")) - 1
        label = index - int(self._starts[sample])
        identity = self.first_identity + label
        return {
            "identity": np.uint32(identity),
            "sample": np.uint32(sample),
            "label": np.int32(self._noised(index, label)),
        }

    def labels(self) -> np.ndarray:
        """The labels of all records, int32 [n]."""
        labels = np.arange(len(self)) - np.repeat(self._starts[:-1], self.rounds)
        if self.noisy:
            labels = [self._noised(index, label) for index, label in enumerate(labels.tolist())]
        return np.asarray(labels, np.int32)

    def _noised(self, index: int, label: int) -> int:
        if self.noisy and _shuffled(index, len(self), self.seed) < self.noisy:
            classes = self.rounds[0]
            return (label + 1 + _hash(index, self.seed) % (classes - 1)) % classes
        return label


def _as_is(record: Record, rng: np.random.Generator | None = None) -> Record:
    return {**record, "unreadable": np.int32(0)}


def _to_images(batch: dict[str, Any], *, seed: int, size: int, difficulty: float) -> Array:
    return render(seed, batch["identity"], batch["sample"], size=size, difficulty=difficulty)


def _draw_pairs(
    identities: int, samples: int, pairs: int, folds: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """first, second, same, fold: no pair twice, no identity in two folds."""
    rng = np.random.default_rng([seed, identities, samples, pairs, folds])
    half = pairs // folds // 2
    chosen: dict[tuple[int, int], tuple[bool, int]] = {}
    for fold in range(folds):
        people = np.arange(fold, identities, folds)
        for same in (True, False):
            target = len(chosen) + half
            while len(chosen) < target:
                a = b = int(rng.choice(people))
                if not same:
                    a, b = (int(p) for p in rng.choice(people, 2, replace=False))
                i, j = (int(k) for k in rng.choice(samples, 2, replace=not same))
                pair = (i * identities + a, j * identities + b)
                chosen.setdefault((min(pair), max(pair)), (same, fold))
    first, second = np.array(list(chosen), np.int64).T
    same, fold = zip(*chosen.values(), strict=True)
    return first, second, np.array(same, bool), np.array(fold, np.int64)


def _with_at_least(n: int, identities: int, samples: int, long_tail: float) -> int:
    """How many identities have n photographs: the largest k with samples · k^(-long_tail) >= n."""
    if n == 1 or math.log(samples / n) >= long_tail * math.log(identities):
        return identities
    # The tiny term keeps whole numbers whole: (8 / 2)^(1 / 1) must not end below 4.
    return math.floor((samples / n) ** (1 / long_tail) + 1e-9)


def _check(condition: bool, key: str, value: Any, need: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r}: {need}")


def load(
    *,
    identities: int = 200,
    samples: int = 20,
    image_size: int = 48,
    difficulty: float = 1.0,
    seed: int = 0,
    long_tail: float = 0.0,
    label_noise: float = 0.0,
    test_identities: int = 200,
    test_samples: int = 6,
    pairs: int = 2000,
    folds: int = 10,
) -> tuple[Faces, dict[str, Pairs]]:
    """A training set of embedded faces and a verification set of other identities.

    Identity k (from 1) has n_k photographs, the largest n <= samples with
    k <= (samples / n)^(1 / long_tail), and at least one: n_k ~ samples · k^(-long_tail).
    Exactly round(label_noise · images) training labels are wrong, each uniform over the other
    classes; "identity" in the record stays the truth.

    Args:
        identities: number of training classes.
        samples: photographs of each (of the most frequent one, under a long tail).
        image_size: edge in pixels, a multiple of 8.
        difficulty: 0 nearly passport photographs, 1 the default, 2 hard.
        seed: of the population; test and training identities never coincide under one seed.
        long_tail: exponent of the power law; 0 gives every identity `samples`.
        label_noise: fraction of wrong training labels.
        test_identities: people of the verification set.
        test_samples: photographs of each of them.
        pairs: number of pairs, half same, half different, spread evenly over the folds.
        folds: no identity occurs in two of them.

    Returns:
        The training set, and {"synthetic": verification set} (protocol "folds").

    Raises:
        ValueError: naming the argument, if a value is out of range.
    """
    settings = dict(locals())
    _check(2 <= identities <= _TEST, "identities", identities, f"need 2 to {_TEST}")
    _check(1 <= samples <= 2**20, "samples", samples, f"need 1 to {2**20}")
    _check(
        image_size > 0 and image_size % 8 == 0,
        "image_size",
        image_size,
        "need a positive multiple of 8",
    )
    _check(math.isfinite(difficulty) and difficulty >= 0, "difficulty", difficulty, "need >= 0")
    _check(0 <= seed < 2**31, "seed", seed, f"need 0 to {2**31 - 1}")
    _check(math.isfinite(long_tail) and long_tail >= 0, "long_tail", long_tail, "need >= 0")
    _check(0 <= label_noise <= 1, "label_noise", label_noise, "need a fraction from 0 to 1")
    _check(folds >= 1, "folds", folds, "need at least 1")
    _check(
        2 * folds <= test_identities <= _TEST,
        "test_identities",
        test_identities,
        f"need two per fold, at least {2 * folds}",
    )
    _check(test_samples >= 2, "test_samples", test_samples, "need at least 2 for same pairs")
    room = 2 * folds * (test_identities // folds) * math.comb(test_samples, 2)
    _check(
        0 < pairs <= room and pairs % (2 * folds) == 0,
        "pairs",
        pairs,
        f"need a multiple of 2·folds = {2 * folds}, at most {room} with these test samples",
    )

    rounds = tuple(_with_at_least(n, identities, samples, long_tail) for n in range(1, samples + 1))
    train = _Records(rounds, 0, round(label_noise * sum(rounds)), seed)
    test = _Records((test_identities,) * test_samples, _TEST, 0, seed)
    to_images = functools.partial(_to_images, seed=seed, size=image_size, difficulty=difficulty)
    first, second, same, fold = _draw_pairs(test_identities, test_samples, pairs, folds, seed)
    settings["renderer"] = _RENDERER
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    faces = Faces(train, identities, train.labels, _as_is, _as_is, to_images, fingerprint)
    return faces, {
        "synthetic": Pairs(test, _as_is, to_images, first, second, same, fold, "folds", "synthetic")
    }
