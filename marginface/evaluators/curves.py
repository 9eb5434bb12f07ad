"""Exact curves and figures over scores of pairs.

A score is high when two images look alike (cosine; the negative of a distance); a pair is accepted
when score >= threshold. "Genuine" pairs show one person, "impostor" pairs two. Equal scores are
never split by a threshold.
"""

from typing import NamedTuple

import numpy as np

from marginface.evaluators import common
from marginface.typing import Bool, Float

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
