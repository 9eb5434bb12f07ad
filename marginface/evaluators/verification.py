"""Face verification: are two images of one person? Scores of pairs, by a protocol of folds."""

from collections.abc import Callable, Iterator
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
        curve = curves.roc(scores[shown], pairs.same[shown])
        self.scores, self.threshold = scores, float(folds.thresholds.mean())
        self.embeddings = embeddings

        yield f"{pairs.name}/accuracy", folds.mean
        yield f"{pairs.name}/accuracy_stderr", folds.stderr
        yield f"{pairs.name}/auc", curves.auc(curve)
        yield f"{pairs.name}/eer", curves.eer(curve)
        impostors = int((~pairs.same[shown]).sum())
        for far in curves.FARS:
            if float(far) >= 1 / impostors:
                yield f"{pairs.name}/tar@far={far}", curves.tar_at_far(curve, float(far))
        yield f"{pairs.name}/threshold", self.threshold
