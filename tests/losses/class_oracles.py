"""Textbook forms of the losses over classes: numpy float64, dense, one example at a time.

(x [b, d], w [c, ...], labels, margin m, scale s) → losses [b]. `at` = (x, w) is where what carries
no gradient (weights, running averages) is taken, so that differences of these forms are the
published gradients.
"""

import numpy as np
import oracles


def sigmoid_log(z):
    """log(1 + e^z)."""
    return np.logaddexp(0.0, z)


def of_logits(target, others):
    """−log softmax of each example: `others` is a list of arrays, the target not among them."""
    return np.array(
        [np.log(np.exp(t) + np.exp(o).sum()) - t for t, o in zip(target, others, strict=True)]
    )


def split(x, w, y):
    """Target cosines [b] and, for each example, the cosines to all other classes."""
    cos = oracles.cosines(x, w)
    b = len(y)
    return cos[np.arange(b), y], [np.delete(cos[i], y[i]) for i in range(b)]


def softmax(x, w, y, psi, s, at=None):
    target, others = split(x, w, y)
    return of_logits(s * psi(np.arccos(np.clip(target, -1, 1))), [s * o for o in others])


def focal(loss, gamma):
    return (1 - np.exp(-loss)) ** gamma * loss


def smoothed(x, w, y, psi, s, epsilon):
    """Cross-entropy with the wanted distribution written out."""
    cos = oracles.cosines(x, w)
    c = len(w)
    losses = []
    for i, label in enumerate(y):
        logits = s * cos[i]
        logits[label] = s * psi(np.arccos(np.clip(cos[i, label : label + 1], -1, 1)))[0]
        wanted = np.full(c, epsilon / c)
        wanted[label] += 1 - epsilon
        losses.append(-(wanted * (logits - np.log(np.exp(logits).sum()))).sum())
    return np.array(losses)


def large_margin_softmax(x, w, y, m, s, at=None):
    target, _ = split(x, w, y)
    psi = oracles.multiplicative_angular(np.arccos(np.clip(target, -1, 1)), m)
    length = np.linalg.norm(x, axis=1) * np.linalg.norm(w[y], axis=1)
    products = x @ w.T
    return of_logits(length * psi, [np.delete(products[i], y[i]) for i in range(len(y))])


def adaptive_margin_softmax(x, w, y, m, s, at=None):
    weight, margin = w
    frozen = (at or (x, w))[1][1]
    margin = margin + np.clip(frozen, 0, 1) - frozen
    target, others = split(x, weight, y)
    return of_logits(s * (target - margin[y]), [s * o for o in others])


def adacos_scale(x, w, y, scale):
    target, others = split(x, w, y)
    b_average = np.mean([np.exp(scale * o).sum() for o in others])
    angle = np.median(np.arccos(np.clip(target, -1, 1)))
    return np.log(b_average) / np.cos(min(np.pi / 4, angle))


def adacos(x, w, y, scale, at=None):
    s = adacos_scale(*(at or (x, w)), y, scale)
    return softmax(x, w, y, np.cos, s), s


def curricularface(x, w, y, m, s, t, at=None):
    still, _ = split(*(at or (x, w)), y)
    t = 0.99 * t + 0.01 * still.mean()
    target, others = split(x, w, y)
    psi = oracles.additive_angular(np.arccos(np.clip(target, -1, 1)), m)
    raised = [np.where(o > p, o * (t + o), o) for o, p in zip(others, psi, strict=True)]
    return of_logits(s * psi, [s * o for o in raised]), t


def mv_softmax(x, w, y, margin, m, s, t, adaptive):
    target, others = split(x, w, y)
    psi = margin(np.arccos(np.clip(target, -1, 1)), m)
    factor = t if adaptive else 1.0
    raised = [np.where(o > p, factor * o + t - 1, o) for o, p in zip(others, psi, strict=True)]
    return of_logits(s * psi, [s * o for o in raised])


def magface(x, w, y, lower_m, upper_m, lower, upper, s):
    a = np.clip(np.linalg.norm(x, axis=1), lower, upper)
    m = lower_m + (upper_m - lower_m) * (a - lower) / (upper - lower)
    return softmax(x, w, y, lambda theta: oracles.additive_angular(theta, m), s)


def adaface(x, w, y, m, s, mean, deviation, at=None, rate=0.01, h=0.333):
    length = np.clip(np.linalg.norm((at or (x, w))[0], axis=1), 0.001, 100)
    mean = (1 - rate) * mean + rate * length.mean()
    deviation = (1 - rate) * deviation + rate * length.std(ddof=1)
    z = np.clip(h * (length - mean) / (deviation + 0.001), -1, 1)

    def psi(theta):
        return np.cos(np.clip(theta - m * z, 0, np.pi)) - (m * z + m)

    return softmax(x, w, y, psi, s), mean, deviation


def elasticface(x, w, y, drawn, s, target, plus, at=None):
    if plus:  # the smallest margin to the nearest example, and so on
        cos, _ = split(*(at or (x, w)), y)
        given = np.empty_like(drawn)
        given[np.argsort(-cos)] = np.sort(drawn)
        drawn = given
    form = getattr(oracles, target)
    return softmax(x, w, y, lambda theta: form(theta, drawn), s)


def subcenter(x, w, y, psi, s):
    cos = np.stack([oracles.cosines(x, w[:, k]) for k in range(w.shape[1])]).max(axis=0)
    b = len(y)
    target = cos[np.arange(b), y]
    others = [np.delete(cos[i], y[i]) for i in range(b)]
    return of_logits(s * psi(np.arccos(np.clip(target, -1, 1))), [s * o for o in others])


def circle(x, w, y, m, s, at=None):
    target, others = split(x, w, y)
    still, still_others = split(*(at or (x, w)), y)
    logit = s * np.maximum(1 + m - still, 0) * (target - 1 + m)
    pairs = zip(others, still_others, strict=True)
    return of_logits(logit, [s * np.maximum(o + m, 0) * (c - m) for c, o in pairs])


def sphereface2(x, w, y, m, s, bias, balance, power):
    def g(z):
        return 2 * ((z + 1) / 2) ** power - 1

    target, others = split(x, w, y)
    pull = sigmoid_log(-(s * (g(target) - m) + bias))
    push = np.array([sigmoid_log(s * (g(o) + m) + bias).sum() for o in others])
    return balance / s * pull + (1 - balance) / s * push


def uniface(x, w, y, m, s, bias, balance):
    target, others = split(x, w, y)
    pull = sigmoid_log(-(s * (target - m) - bias))
    return pull + balance * np.array([sigmoid_log(s * o - bias).sum() for o in others])
