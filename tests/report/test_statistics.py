"""Intervals cover, paired differences do too, and many comparisons stay honest."""

import numpy as np
import pytest
from scipy import stats

from marginface.report.study import statistics

SIMULATIONS = 20_000
ALPHA = 0.05
# Three standard errors of a simulated share of 5 %: what chance alone may add.
SLACK = 3 * np.sqrt(ALPHA * (1 - ALPHA) / SIMULATIONS)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# Coverage


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize(("mean", "sigma"), [(0.92, 0.006), (-40.0, 130.0)])
def test_intervals_cover_the_true_mean(rng, n, mean, sigma):
    found = statistics.mean_interval(rng.normal(mean, sigma, (SIMULATIONS, n)))
    covered = np.abs(found.mean - mean) <= found.half
    assert abs(covered.mean() - 0.95) <= SLACK
    assert 0.93 <= covered.mean() <= 0.97


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_of_paired_differences_cover_the_true_one(rng, n):
    seeds = rng.normal(0.9, 0.02, (SIMULATIONS, n))  # what a seed does to both
    ours = seeds + rng.normal(0.004, 0.003, seeds.shape)
    theirs = seeds + rng.normal(0, 0.005, seeds.shape)
    found = statistics.paired_difference(ours, theirs)
    covered = np.abs(found.mean - 0.004) <= found.half
    assert abs(covered.mean() - 0.95) <= SLACK
    # Pairing takes the seeds' own scatter out: unpaired intervals are several times as wide.
    assert np.median(found.half) < 0.5 * np.median(statistics.mean_interval(ours).half)


def test_other_levels(rng):
    values = rng.normal(size=(SIMULATIONS, 4))
    found = statistics.mean_interval(values, level=0.5)
    assert abs((np.abs(found.mean) <= found.half).mean() - 0.5) < 0.011
    with pytest.raises(ValueError, match="choose it between 0 and 1"):
        statistics.mean_interval(values, level=95.0)


# Agreement with scipy


@pytest.mark.parametrize("n", [2, 3, 8])
def test_agrees_with_scipy(rng, n):
    ours, theirs = rng.normal(0.9, 0.01, (2, 50, n))
    found = statistics.paired_difference(ours, theirs)
    expected = stats.ttest_rel(ours, theirs, axis=-1)
    np.testing.assert_allclose(found.p, expected.pvalue, rtol=1e-9)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found.mean - found.half, low, rtol=1e-9)
    np.testing.assert_allclose(found.mean + found.half, high, rtol=1e-9)
    interval = statistics.mean_interval(ours[0])
    low, high = stats.ttest_1samp(ours[0], 0).confidence_interval(0.95)
    np.testing.assert_allclose([interval.mean - interval.half, interval.mean + interval.half],
                               [low, high], rtol=1e-9)  # fmt: skip


def test_a_known_interval():
    found = statistics.mean_interval(np.array([92.0, 93.0, 94.0]))
    assert (float(found.mean), found.n) == (93.0, 3)
    assert float(found.half) == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)


# What cannot be told


def test_one_value_has_no_interval():
    found = statistics.mean_interval(np.array([0.9]))
    assert (float(found.mean), found.n) == (0.9, 1)
    assert np.isnan(found.half)
    difference = statistics.paired_difference(np.array([0.9]), np.array([0.8]))
    assert float(difference.mean) == pytest.approx(0.1)
    assert np.isnan(difference.half)
    assert np.isnan(difference.p)


def test_no_value_has_no_mean():
    found = statistics.mean_interval(np.array([]))
    assert np.isnan(found.mean)
    assert np.isnan(found.half)
    difference = statistics.paired_difference(np.array([]), np.array([]))
    assert np.isnan([difference.mean, difference.half, difference.p]).all()


def test_equal_figures_are_rounded_figures_not_certain_ones():
    found = statistics.mean_interval(np.array([0.9205] * 3))
    assert float(found.mean) == pytest.approx(0.9205)
    assert np.isnan(found.half)
    same = statistics.paired_difference(np.array([0.91, 0.92, 0.93]), np.array([0.91, 0.92, 0.93]))
    assert (float(same.mean), float(same.p)) == (0.0, 1.0)
    assert np.isnan(same.half)


def test_differences_that_are_equal_up_to_rounding_prove_nothing():
    baseline = np.array([0.1, 0.7, 0.93])
    ours = baseline + 0.01
    assert np.ptp(ours - baseline) > 0  # floating point alone
    found = statistics.paired_difference(ours, baseline)
    assert float(found.mean) == pytest.approx(0.01)
    assert np.isnan(found.half)
    assert np.isnan(found.p)


def test_large_offsets_do_not_hide_small_scatter():
    found = statistics.mean_interval(1e6 + np.array([0.0, 1e-3, 2e-3]))
    assert float(found.half) == pytest.approx(4.302653 * 1e-3 / np.sqrt(3), rel=1e-4)


def test_pairs_need_equal_shapes():
    with pytest.raises(ValueError, match="are no pairs"):
        statistics.paired_difference(np.zeros((2, 3)), np.zeros((2, 4)))


def test_common_seeds():
    ours, theirs = statistics.common_seeds({2: 0.3, 0: 0.1, 7: 0.9}, {0: 0.5, 1: 0.6, 2: 0.7})
    assert (ours.tolist(), theirs.tolist()) == ([0.1, 0.3], [0.5, 0.7])
    assert [len(x) for x in statistics.common_seeds({1: 0.1}, {2: 0.1})] == [0, 0]


# Holm


def rejected_by_the_book(p, alpha):
    """Holm 1979: the smallest p against α/m, the next against α/(m − 1), ...; stop at a failure."""
    rejected = [False] * len(p)
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] > alpha / (len(p) - k):
            break
        rejected[i] = True
    return rejected


def test_holm_rejects_what_the_book_rejects(rng):
    for _ in range(300):
        p = rng.uniform(size=rng.integers(1, 9)) ** rng.integers(1, 5)
        adjusted = statistics.holm(p)
        for alpha in (0.01, 0.05, 0.2, 0.5, 0.9):
            assert (adjusted <= alpha).tolist() == rejected_by_the_book(p.tolist(), alpha)


def test_holm_of_a_known_family():
    np.testing.assert_allclose(
        statistics.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02]
    )
    assert statistics.holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0]
    assert statistics.holm(np.array([0.03])).tolist() == [0.03]
    assert statistics.holm(np.array([])).tolist() == []


def test_holm_counts_tests_that_could_not_tell():
    found = statistics.holm(np.array([0.01, np.nan, 0.02]))
    np.testing.assert_allclose(found, [0.03, np.nan, 0.04])


def test_holm_works_row_by_row(rng):
    p = rng.uniform(size=(6, 5))
    np.testing.assert_array_equal(statistics.holm(p), [statistics.holm(row) for row in p])


def against_one_baseline(rng, effects, n):
    """p values [SIMULATIONS, len(effects)] of paired tests that share seeds and a baseline."""
    shape = (SIMULATIONS, len(effects), n)
    seeds = rng.normal(0, 0.02, (SIMULATIONS, 1, n))
    baseline = np.broadcast_to(seeds + rng.normal(0, 0.01, seeds.shape), shape)
    ours = seeds + rng.normal(0, 0.01, shape) + np.array(effects)[:, None]
    return statistics.paired_difference(ours, baseline).p


@pytest.mark.parametrize("n", [3, 5])
def test_false_discoveries_under_the_null(rng, n):
    p = against_one_baseline(rng, [0.0] * 8, n)
    correlation = np.corrcoef(stats.norm.isf(p[:, 0]), stats.norm.isf(p[:, 1]))[0, 1]
    assert correlation > 0.1  # one baseline in all: the tests are not independent
    any_wrong = (statistics.holm(p) <= ALPHA).any(axis=1).mean()
    assert any_wrong <= ALPHA + SLACK
    assert (p <= ALPHA).any(axis=1).mean() > 3 * ALPHA  # without the correction


def test_false_discoveries_beside_true_ones(rng):
    p = against_one_baseline(rng, [0.0, 0.0, 0.0, 0.05, 0.08], 6)
    found = statistics.holm(p) <= ALPHA
    assert found[:, :3].any(axis=1).mean() <= ALPHA + SLACK
    assert found[:, 4].mean() > 0.9  # and what is there is found
