"""What several seeds can tell: means with intervals, paired differences, many comparisons at once.

Every function works along the last axis of its arrays and is NaN where the data cannot tell: an
interval of one value, or of values that are all equal. Equal figures are figures that were rounded
(so many of 2,000 pairs decided rightly), not figures without noise: no interval of width zero, and
no p value of zero, is ever made of them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from marginface.typing import Float

# Differences below this part of the values themselves are those of floating-point rounding.
_ROUNDING = 1e-12


class Interval(NamedTuple):
    """mean ± half: the interval that covers the true mean in `level` of all repetitions.

    mean: [...], NaN for no values at all.
    half: [...], half of its width; NaN for fewer than two values, or if all are equal.
    n: how many values each mean is of.
    """

    mean: Float[np.ndarray, "..."]
    half: Float[np.ndarray, "..."]
    n: int


class Difference(NamedTuple):
    """How far values lie above those of a baseline, pair by pair.

    mean, half, n: of the differences, as an Interval's.
    p: [...], two-sided, of the hypothesis that the true mean difference is 0; 1 if every pair is
        equal, NaN for fewer than two pairs or if all differ by the same.
    """

    mean: Float[np.ndarray, "..."]
    half: Float[np.ndarray, "..."]
    p: Float[np.ndarray, "..."]
    n: int


def mean_interval(values: Float[np.ndarray, "*batch n"], *, level: float = 0.95) -> Interval:
    """Mean with Student's interval: mean ± t_{n−1}((1 + level)/2) · sd/√n.

    Args:
        values: independent, nearly normal; one a seed.
        level: how often the interval is to cover the true mean.

    Returns:
        The interval of each row.

    References:
        Student, The Probable Error of a Mean, Biometrika 6, 1908.
    """
    values = np.asarray(values, np.float64)
    mean, error = _mean_and_error(values, np.abs(values))
    return Interval(mean, _quantile(level, values.shape[-1]) * error, values.shape[-1])


def paired_difference(
    values: Float[np.ndarray, "*batch n"],
    baseline: Float[np.ndarray, "..."],
    *,
    level: float = 0.95,
) -> Difference:
    """Student's paired t test: d = values − baseline, t = mean(d) / (sd(d)/√n), n − 1 degrees.

    What a seed does to both (its initial weights, its data order) cancels within the pair.

    Args:
        values: one a seed.
        baseline: of the same shape: of the same seeds in the same order.
        level: how often the interval is to cover the true difference.

    Returns:
        The mean difference of each row, its interval and its p value.

    Raises:
        ValueError: the shapes differ.

    References:
        Student, The Probable Error of a Mean, Biometrika 6, 1908, section IX.
    """
    values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if values.shape != baseline.shape:
        raise ValueError(f"values {values.shape} and baseline {baseline.shape} are no pairs")
    n, scale = values.shape[-1], np.maximum(np.abs(values), np.abs(baseline))
    mean, error = _mean_and_error(values - baseline, scale)
    p = 2 * stats.t.sf(np.abs(mean / error), n - 1) if n > 1 else np.full(mean.shape, np.nan)
    equal = np.isnan(error) & (np.abs(mean) <= _ROUNDING * _largest(scale))
    p = np.where(equal & (n > 1), 1.0, p)
    return Difference(mean, _quantile(level, n) * error, p, n)


def common_seeds(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The values of the seeds that both have, as pairs for `paired_difference`.

    Args:
        values: seed → value.
        baseline: seed → value.

    Returns:
        Two arrays in the order of the seeds; empty if there is no common one.
    """
    seeds = sorted(values.keys() & baseline.keys())
    return (
        np.array([values[seed] for seed in seeds], np.float64),
        np.array([baseline[seed] for seed in seeds], np.float64),
    )


def holm(p: Float[np.ndarray, "*batch m"]) -> Float[np.ndarray, "*batch m"]:
    """Holm's step-down correction: p̃_(k) = max_{i≤k} min(1, (m − i + 1) p_(i)), p_(1) ≤ p_(2) ≤ …

    Rejecting where p̃ ≤ α makes any false rejection at all in at most α of all families,
    whatever the dependence between the tests (here: one baseline in all of them).

    Args:
        p: the p values of a family; NaN for a test that could not tell: it counts in m, the
            cautious way, as only the data decided that it could not.

    Returns:
        The adjusted p values in the order of `p`; NaN stays NaN.

    References:
        Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of
        Statistics 6, 1979, section 3.
    """
    p = np.asarray(p, np.float64)
    filled = np.where(np.isnan(p), 1.0, p)
    order = np.argsort(filled, axis=-1, kind="stable")
    factors = np.arange(p.shape[-1], 0, -1)
    stepped = np.take_along_axis(filled, order, axis=-1) * factors
    stepped = np.minimum(np.maximum.accumulate(stepped, axis=-1), 1.0)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, stepped, axis=-1)
    return np.where(np.isnan(p), np.nan, adjusted)


def _mean_and_error(
    values: Float[np.ndarray, "*batch n"], scale: Float[np.ndarray, "*batch n"]
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Mean and standard error; the error is NaN where the values, of this scale, cannot tell it."""
    n = values.shape[-1]
    if not n:
        return np.full(values.shape[:-1], np.nan), np.full(values.shape[:-1], np.nan)
    mean = np.asarray(values.mean(axis=-1))
    if n == 1:
        return mean, np.full(mean.shape, np.nan)
    error = values.std(axis=-1, ddof=1) / np.sqrt(n)
    return mean, np.where(np.ptp(values, axis=-1) > _ROUNDING * _largest(scale), error, np.nan)


def _largest(scale: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "..."]:
    return np.asarray(scale.max(axis=-1, initial=0.0))


def _quantile(level: float, n: int) -> float:
    """t_{n−1}((1 + level)/2): so many standard errors is half of an interval."""
    if not 0 < level < 1:
        raise ValueError(f"level={level}: choose it between 0 and 1, such as 0.95")
    return float(stats.t.ppf((1 + level) / 2, n - 1)) if n > 1 else float("nan")
