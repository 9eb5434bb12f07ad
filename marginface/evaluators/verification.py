"""Face verification: are two images of one person? Scores of pairs, by a protocol of folds."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from marginface.data import Pairs
from marginface.evaluators import common, curves
from marginface.typing import Bool, Float, Int


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
) -> curves.FoldResult:
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
        thresholds.append(curves.best_threshold(scores[choosing], same[choosing]))
        accuracies.append(curves.accuracy(scores[fold == k], same[fold == k], thresholds[-1]))
    mean = float(np.mean(accuracies))
    if len(shown) > 1:
        stderr = np.std(accuracies, ddof=1) / np.sqrt(len(shown))
    else:
        stderr = np.sqrt(mean * (1 - mean) / (fold == shown[0]).sum())
    return curves.FoldResult(np.array(accuracies), np.array(thresholds), mean, float(stderr))


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


def hardest_pairs(
    pairs: Pairs, scores: Float[np.ndarray, "n"], *, count: int
) -> tuple[Int[np.ndarray, "i"], Int[np.ndarray, "g"]]:
    """Numbers of the impostor pairs that score highest and the genuine pairs that score lowest."""
    shown = np.flatnonzero(tested(pairs.fold, pairs.protocol))
    rising = shown[np.argsort(scores[shown], kind="stable")]
    same = pairs.same[rising]
    return rising[~same][::-1][:count], rising[same][:count]


class Evaluator:
    """Verification on one set of pairs.

    After a run, `scores` [n] holds the score of every pair and `threshold` the mean threshold.
    """

    def __init__(self, subject: common.Subject):
        """Args: subject: with a test set; its score is the cosine if it has none."""
        self.name, self.score = subject.name, subject.score
        self.pairs, self._outputs = subject.images()
        self.scores: np.ndarray | None = None
        self.threshold: float | None = None

    @property
    def ranking(self) -> str:
        """The figure by which checkpoints are compared."""
        return f"{self.name}/accuracy"

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Scores the pairs and yields the figures.

        Accuracy follows the protocol of the pairs; AUC, EER and TAR@FAR are taken over the pairs
        that it reports on. A FAR below one impostor pair is left out: it cannot be measured.

        Raises:
            NotFiniteError: an output of the network or a score is not finite.
            ValueError: the pairs do not fit the protocol.
        """
        pairs, outputs = self.pairs, self._outputs(state)
        if self.score is None:
            scores = cosine_scores(outputs["embedding"], pairs.first, pairs.second)
        else:
            scores = self.score(state, outputs, pairs.first, pairs.second)
        folds = fold_accuracies(scores, pairs.same, pairs.fold, pairs.protocol)
        shown = tested(pairs.fold, pairs.protocol)
        curve = curves.roc(scores[shown], pairs.same[shown])
        self.scores, self.threshold = scores, float(folds.thresholds.mean())

        yield f"{self.name}/accuracy", folds.mean
        yield f"{self.name}/accuracy_stderr", folds.stderr
        yield f"{self.name}/auc", curves.auc(curve)
        yield f"{self.name}/eer", curves.eer(curve)
        impostors = int((~pairs.same[shown]).sum())
        for far in curves.FARS:
            if float(far) >= 1 / impostors:
                yield f"{self.name}/tar@far={far}", curves.tar_at_far(curve, float(far))
        yield f"{self.name}/threshold", self.threshold

    def pictures(self, folder: pathlib.Path) -> Iterator[common.Picture]:
        """Draws ROC, scores and hardest pairs into the folder."""
        if self.scores is None or self.threshold is None:
            return
        from marginface.evaluators import pictures as draw  # matplotlib takes long to import

        name, pairs, threshold = self.name, self.pairs, self.threshold
        shown = tested(pairs.fold, pairs.protocol)
        scores, same = self.scores[shown], pairs.same[shown]
        path = folder / f"{name}_roc.png"
        draw.roc(curves.roc(scores, same), path, title=name)
        caption = "Genuine pairs accepted, for each rate of impostor pairs accepted by mistake."
        yield common.Picture(path, f"{name}: {caption}")
        path = folder / f"{name}_scores.png"
        draw.histogram(scores, same, threshold, path, title=name)
        caption = "Scores of both kinds of pairs; what overlaps is decided wrongly."
        yield common.Picture(path, f"{name}: {caption}")
        path = folder / f"{name}_hardest.png"
        impostor, genuine = hardest_pairs(pairs, self.scores, count=8)
        draw.hardest(pairs, self.scores, threshold, impostor, genuine, path, title=name)
        caption = "The impostor pairs most alike and the genuine pairs least alike."
        yield common.Picture(path, f"{name}: {caption}")
