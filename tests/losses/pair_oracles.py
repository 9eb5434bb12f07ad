"""Textbook pair and triplet losses in numpy float64: loops over all pairs and all triplets."""

import math

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def square_distances(x):
    return ((x[:, None] - x) ** 2).sum(axis=2).tolist()


def contrastive(x, labels, margin):
    """Hadsell eq. 4, the mean over the pairs of each example."""
    d, b = np.sqrt(square_distances(x)).tolist(), len(x)
    losses = np.zeros(b)
    for i in range(b):
        for j in range(b):
            if i != j and labels[i] == labels[j]:
                losses[i] += 0.5 * d[i][j] ** 2 / (b - 1)
            elif i != j:
                losses[i] += 0.5 * max(0.0, margin - d[i][j]) ** 2 / (b - 1)
    return losses


def category(ap, an, margin):
    if ap + margin < an:
        return "easy"
    return "semi_hard" if ap < an else "hard"


def mine(x, labels, margin, triplets="semi_hard", positives="all", negatives="all"):
    """[(anchor, positive, negative)] and the squared distances they were chosen by."""
    d, everyone, chosen = square_distances(x), range(len(x)), []
    for a in everyone:
        friends = [p for p in everyone if p != a and labels[p] == labels[a]]
        if positives == "hardest":
            friends = sorted(friends, key=lambda p: -d[a][p])[:1]
        for p in friends:
            strangers = [
                n
                for n in everyone
                if labels[n] != labels[a]
                and triplets in ("all", category(d[a][p], d[a][n], margin))
            ]
            if negatives == "hardest":
                strangers = sorted(strangers, key=lambda n: d[a][n])[:1]
            chosen += [(a, p, n) for n in strangers]
    return chosen, d


def triplet(x, labels, margin, active=False, **choice):
    """FaceNet eq. 4 over the chosen triplets; b times each anchor's share of the mean."""
    chosen, d = mine(x, labels, margin, **choice)
    losses, count = np.zeros(len(x)), 0
    for a, p, n in chosen:
        loss = max(0.0, d[a][p] - d[a][n] + margin)
        losses[a] += loss
        count += loss > 0 or not active
    return len(x) * losses / max(count, 1)


def siamese(x, labels, weight, bias, features):
    """Two-class cross-entropy, ½ of the mean over same and ½ of that over different pairs.

    Where a batch has no pairs of a kind, that half is 0.
    """
    f, b = unit(x), len(x)
    sums, counts = np.zeros((2, b)), np.zeros(2)
    for i in range(b):
        for j in range(b):
            if i == j:
                continue
            values = np.abs(f[i] - f[j])
            if features == "chi_square":
                values = (f[i] - f[j]) ** 2 / (np.abs(f[i]) + np.abs(f[j]))
            same = int(labels[i] == labels[j])
            probability = 1 / (1 + math.exp(-(values @ weight + bias)))
            sums[same, i] -= math.log(probability if same else 1 - probability)
            counts[same] += 1
    return b * (sums / np.maximum(counts, 1)[:, None]).sum(axis=0) / 2
