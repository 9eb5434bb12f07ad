"""Face verification: are two images of one person? Exact curves and figures over pair scores.

A score is high when two images look alike (cosine; the negative of a distance); a pair is accepted
when score >= threshold. "Genuine" pairs show one person, "impostor" pairs two. Equal scores are
never split by a threshold.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from marginface.data import Pairs
from marginface.evaluators import common
from marginface.typing import Bool, Float, Int

FARS = ("1e-1", "1e-2", "1e-3")


class Roc(NamedTuple):
    """Rates at every distinct threshold, strictest first; both run from 0 to 1.

    Attributes:
        far: false accept rate [k], the accepted part of the impostor pairs.
        tar: true accept rate [k], the accepted part of the genuine pairs.
        thresholds: the score [k] from which pairs are accepted; the first, inf, accepts none.
    """

    far: Float[np.ndarray, "k"]
    tar: Float[np.ndarray, "k"]
    thresholds: Float[np.ndarray, "k"]


class FoldResult(NamedTuple):
    """Accuracy on each tested fold, and the threshold that the other pairs chose for it.

    Attributes:
        accuracies: [k].
        thresholds: [k].
        mean: mean accuracy.
        stderr: its standard error: over folds, std(accuracies, ddof=1) / √k; for a single tested
            fold of n pairs, the binomial √(a (1 − a) / n).
    """

    accuracies: Float[np.ndarray, "k"]
    thresholds: Float[np.ndarray, "k"]
    mean: float
    stderr: float


def _accepted(
    scores: Float[np.ndarray, "n"], same: Bool[np.ndarray, "n"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores, falling, and how many genuine and impostor pairs reach each of them."""
    if not np.isfinite(scores).all():
        bad = (~np.isfinite(scores)).sum()
        raise common.NotFiniteError(f"{bad} of {len(scores)} scores are not finite")
    if same.all() or not same.any():
        kind = "genuine" if same.any() else "impostor"
        missing = "impostor" if same.any() else "genuine"
        raise ValueError(
            f"all {len(same)} pairs are {kind} pairs: verification also needs {missing} pairs"
        )
    order = np.argsort(-scores, kind="stable")
    falling = scores[order].astype(np.float64)
    last_of_ties = np.append(np.flatnonzero(np.diff(falling)), len(falling) - 1)
    genuine = np.cumsum(same[order])[last_of_ties]
    return falling[last_of_ties], genuine, last_of_ties + 1 - genuine


def roc(scores: Float[np.ndarray, "n"], same: Bool[np.ndarray, "n"]) -> Roc:
    """The receiver operating characteristic, with one point for each distinct score.

    Args:
        scores: [n], higher = more alike.
        same: [n], True for genuine pairs.

    Raises:
        NotFiniteError: a score is not finite.
        ValueError: all pairs are of one kind.
    """
    thresholds, genuine, impostor = _accepted(scores, same)
    return Roc(
        far=np.append(0.0, impostor / impostor[-1]),
        tar=np.append(0.0, genuine / genuine[-1]),
        thresholds=np.append(np.inf, thresholds),
    )


def auc(curve: Roc) -> float:
    """Area under the curve by trapezoids: P(genuine > impostor) + P(genuine = impostor) / 2.

    References:
        Mann & Whitney 1947; Fawcett, An introduction to ROC analysis, 2006, Algorithm 3.
    """
    return float(np.trapezoid(curve.tar, curve.far))


def eer(curve: Roc) -> float:
    """Equal error rate: FAR where FAR = 1 − TAR, on the straight lines between the curve's points.

    FAR + TAR − 1 never falls along the curve, from −1 to 1, so its zero is found by interpolation.
    """
    excess = curve.far + curve.tar - 1.0
    right = int(np.argmax(excess >= 0))
    left = right - 1
    part = -excess[left] / (excess[right] - excess[left])
    return float(curve.far[left] + part * (curve.far[right] - curve.far[left]))


def tar_at_far(curve: Roc, far: float) -> float:
    """The largest TAR of a threshold whose FAR is at most `far`; nothing is interpolated."""
    return float(curve.tar[np.searchsorted(curve.far, far, side="right") - 1])


def rates(
    scores: Float[np.ndarray, "n"], same: Bool[np.ndarray, "n"], threshold: float
) -> tuple[float, float]:
    """(FAR, TAR) of one threshold."""
    accepted = scores.astype(np.float64) >= threshold
    return float(accepted[~same].mean()), float(accepted[same].mean())


def accuracy(
    scores: Float[np.ndarray, "n"], same: Bool[np.ndarray, "n"], threshold: float
) -> float:
    """The part of the pairs decided rightly: mean [(score ≥ threshold) = same]."""
    # In float64: a Python float would be rounded to the precision of float32 scores.
    return float(((scores.astype(np.float64) >= threshold) == same).mean())


def best_threshold(scores: Float[np.ndarray, "n"], same: Bool[np.ndarray, "n"]) -> float:
    """A threshold of the highest accuracy, halfway between the two scores that it parts.

    Of several equally accurate cuts the middle one is taken, in the order of the scores.

    Raises:
        NotFiniteError: a score is not finite.
        ValueError: all pairs are of one kind.
    """
    falling, genuine, impostor = _accepted(scores, same)
    right = np.append(0, genuine - impostor)  # correct decisions, up to a constant
    best = np.flatnonzero(right == right.max())
    cut = int(best[len(best) // 2])  # accepts the first `cut` distinct scores
    if cut == 0:
        return float(np.nextafter(falling[0], np.inf))
    lowest = falling[cut - 1]
    if cut == len(falling):
        return float(lowest)
    middle = falling[cut] + (lowest - falling[cut]) / 2
    return float(middle if middle > falling[cut] else lowest)


def tested(fold: Int[np.ndarray, "n"], protocol: str) -> Bool[np.ndarray, "n"]:
    """Which pairs a protocol reports on: fold 1 of "dev", all of "folds".

    Raises:
        ValueError: on another protocol.
    """
    if protocol not in ("dev", "folds"):
        raise ValueError(f"unknown protocol {protocol!r}: known are 'dev' and 'folds'")
    return fold == 1 if protocol == "dev" else np.ones(len(fold), bool)


def fold_accuracies(
    scores: Float[np.ndarray, "n"],
    same: Bool[np.ndarray, "n"],
    fold: Int[np.ndarray, "n"],
    protocol: str,
) -> FoldResult:
    """Accuracy with a threshold that never saw the pairs it is tested on.

    Args:
        scores: [n], higher = more alike.
        same: [n], True for genuine pairs.
        fold: [n], the fold of each pair.
        protocol: "folds" tests each fold with the best threshold of all others (LFW View 2);
            "dev" tests fold 1 with the best threshold of fold 0 (LFW View 1).

    Raises:
        ValueError: on another protocol, fewer than two folds, or choosing pairs of one kind.

    References:
        Huang et al., Labeled Faces in the Wild, 2007, sections 3 and 4.
    """
    folds = np.unique(fold)
    if len(folds) < 2:
        raise ValueError(f"protocol {protocol!r} needs two folds or more, the pairs have only one")
    if protocol == "dev" and not {0, 1} <= set(folds.tolist()):
        raise ValueError(f"protocol 'dev' needs folds 0 and 1, the pairs have {folds.tolist()}")
    shown = np.unique(fold[tested(fold, protocol)])
    accuracies, thresholds = [], []
    for k in shown:
        choosing = fold == 0 if protocol == "dev" else fold != k
        thresholds.append(best_threshold(scores[choosing], same[choosing]))
        accuracies.append(accuracy(scores[fold == k], same[fold == k], thresholds[-1]))
    mean = float(np.mean(accuracies))
    if len(shown) > 1:
        stderr = np.std(accuracies, ddof=1) / np.sqrt(len(shown))
    else:
        stderr = np.sqrt(mean * (1 - mean) / (fold == shown[0]).sum())
    return FoldResult(np.array(accuracies), np.array(thresholds), mean, float(stderr))


def cosine_scores(
    embeddings: Float[np.ndarray, "m d"],
    first: Int[np.ndarray, "n"],
    second: Int[np.ndarray, "n"],
) -> Float[np.ndarray, "n"]:
    """cos(x_first, x_second) of each pair, float64; 0 where an embedding is zero."""
    x = embeddings.astype(np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x /= np.where(norms > 0, norms, 1.0)
    return np.einsum("nd,nd->n", x[first], x[second])


Score = Callable[[Any, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Evaluator:
    """Verification on one set of pairs.

    After a run, `scores` [n] holds the score of every pair, `threshold` the mean threshold and
    `embeddings` what embed_fn gave for the images of pairs.source.
    """

    def __init__(
        self,
        embed_fn: Callable[[Any, common.Batch], np.ndarray],
        *,
        pairs: Pairs,
        batch_size: int,
        score_fn: Score | None = None,
    ):
        """Says how images become scores.

        Args:
            embed_fn: (state, batch) -> embeddings [batch_size, d], flip-averaged.
            pairs: what is verified.
            batch_size: rows of each batch.
            score_fn: (state, embeddings [m, d], first [n], second [n]) -> scores [n], larger = more
                alike; None for the cosine.
        """
        self.embed_fn = embed_fn
        self.score_fn = score_fn
        self.pairs = pairs
        self.batch_size = batch_size
        self.scores: np.ndarray | None = None
        self.embeddings: np.ndarray | None = None
        self.threshold: float | None = None

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Embeds each image once and yields the figures, named `<pairs.name>/<figure>`.

        Accuracy follows the protocol of the pairs; AUC, EER and TAR@FAR are taken over the pairs
        that it reports on. A FAR below one impostor pair is left out: it cannot be measured.

        Raises:
            NotFiniteError: an embedding or a score is not finite.
            ValueError: the pairs do not fit the protocol.
        """
        pairs = self.pairs
        embeddings = common.embed_all(
            self.embed_fn, state, pairs.source, pairs.decode, self.batch_size
        )
        if self.score_fn is None:
            scores = cosine_scores(embeddings, pairs.first, pairs.second)
        else:
            scores = self.score_fn(state, embeddings, pairs.first, pairs.second)
        folds = fold_accuracies(scores, pairs.same, pairs.fold, pairs.protocol)
        shown = tested(pairs.fold, pairs.protocol)
        curve = roc(scores[shown], pairs.same[shown])
        self.scores, self.threshold = scores, float(folds.thresholds.mean())
        self.embeddings = embeddings

        yield f"{pairs.name}/accuracy", folds.mean
        yield f"{pairs.name}/accuracy_stderr", folds.stderr
        yield f"{pairs.name}/auc", auc(curve)
        yield f"{pairs.name}/eer", eer(curve)
        impostors = int((~pairs.same[shown]).sum())
        for far in FARS:
            if float(far) >= 1 / impostors:
                yield f"{pairs.name}/tar@far={far}", tar_at_far(curve, float(far))
        yield f"{pairs.name}/threshold", self.threshold
