"""Textbook forms in numpy float64: one-hot, dense, slow, and written without a look at the code."""

import numpy as np


def identity(theta):
    return np.cos(theta)


def multiplicative_angular(theta, m):
    """SphereFace eq. 7, interval by interval."""
    psi = np.empty_like(theta)
    for i, angle in enumerate(theta):
        k = 0
        while angle > (k + 1) * np.pi / m:
            k += 1
        psi[i] = (-1) ** k * np.cos(m * angle) - 2 * k
    return psi


def additive_cosine(theta, m):
    return np.cos(theta) - m


def additive_angular(theta, m):
    return np.where(theta + m > np.pi, -1.0, np.cos(theta + m))


def combined(theta, m1, m2, m3):
    angle = m1 * theta + m2
    return np.where(angle > np.pi, -1.0, np.cos(angle)) - m3


def cosines(x, w):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (
        w / np.linalg.norm(w, axis=1, keepdims=True)
    ).T


def cross_entropy(logits, labels):
    """−log softmax at the label, per example."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]


def margin_softmax(x, w, labels, psi, scale):
    """Cross-entropy of s·(cos + onehot·(ψ − cos)); psi takes angles, scale may be "norm"."""
    cos = cosines(x, w)
    onehot = np.eye(len(w))[labels]
    target = (cos * onehot).sum(axis=1)
    margin = psi(np.arccos(np.clip(target, -1, 1))) - target
    scale = np.linalg.norm(x, axis=1, keepdims=True) if isinstance(scale, str) else scale
    return cross_entropy(scale * (cos + onehot * margin[:, None]), labels)


def exclusive(w):
    """Sep_i: the largest cosine to another prototype, by two loops."""
    cos = cosines(w, w)
    return np.array([max(cos[i, j] for j in range(len(w)) if j != i) for i in range(len(w))])


def gradient(f, *arrays, step=1e-4):
    """Central differences of fourth order of a scalar function, with respect to each array."""
    grads = []
    for which, array in enumerate(arrays):
        grad = np.zeros_like(array)
        for index in np.ndindex(array.shape):

            def at(offset, which=which, array=array, index=index):
                moved = array.copy()
                moved[index] += offset
                return f(*arrays[:which], moved, *arrays[which + 1 :])

            grad[index] = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (
                12 * step
            )
        grads.append(grad)
    return grads


def relative_error(got, wanted):
    """Largest difference over the largest magnitude wanted."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.abs(got - wanted).max() / np.abs(wanted).max()
