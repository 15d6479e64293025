"""Correlations over seeds and tasks: known answers, and an interval that counts seeds and not tasks."""

import numpy as np
import pytest
from scipy import stats

from ntkgen.continual.metrics import correlation
from ntkgen.continual.metrics.correlation import correlate
from ntkgen.errors import ShapeError

pytestmark = pytest.mark.numeric


def drawn(rng, seeds=3, tasks=8):
    """A quantity and an accuracy with a common trend over tasks, and differences between networks."""
    trend, own = np.linspace(-1, 1, tasks), rng.normal(size=(2, seeds, 1)) * 0.7
    x = trend + own[0] + 0.5 * rng.normal(size=(seeds, tasks))
    return x, 0.5 * (trend + own[0]) + own[1] + 0.5 * rng.normal(size=(seeds, tasks))


def test_coefficients_are_those_of_scipy():
    x, y = drawn(np.random.default_rng(0), seeds=4)
    x = np.round(x)  # equal values, which share a mean rank
    x[1, 2], y[2, 3] = np.nan, np.inf
    known = np.isfinite(x) & np.isfinite(y)
    found = correlate(x, y)
    assert found.pearson.value == pytest.approx(stats.pearsonr(x[known], y[known]).statistic)
    assert found.spearman.value == pytest.approx(stats.spearmanr(x[known], y[known]).statistic)
    assert (found.num_pairs, found.num_seeds) == (30, 4)
    for each in (found.pearson, found.spearman):
        assert -1 <= each.interval[0] < each.value < each.interval[1] <= 1


def test_a_perfect_relation_has_a_perfect_coefficient():
    x = np.arange(12.0).reshape(3, 4)
    found = correlate(x, np.exp(-x))
    assert found.spearman.value == pytest.approx(-1)
    assert found.spearman.interval == pytest.approx((-1, -1), abs=1e-6)
    assert -1 < found.pearson.value < -0.5


def test_within_groups_a_common_trend_does_not_count():
    """Both grow from task to task, and within each task one falls as the other rises."""
    x, y = np.array([[0.0, 10], [1, 11], [2, 12]]), np.array([[2.0, 12], [1, 11], [0, 10]])
    assert correlate(x, y).pearson.value > 0.9
    assert correlate(x, y, np.array([0, 1])).pearson.value == pytest.approx(-1)
    assert correlate(x, y, np.array([0, 1])).spearman.value == pytest.approx(-1)


def test_differences_of_rounding_within_groups_are_none():
    x, y = np.tile([0.1, 0.7], (3, 1)), drawn(np.random.default_rng(0), tasks=2)[1]
    found = correlate(x, y, np.array([0, 1]))
    assert np.isnan(found.pearson.value)
    assert found.pearson.interval is None
    assert found.to_json()["pearson"] is None


def test_tasks_of_a_seed_are_not_counted_as_independent():
    """The same tasks twice tell nothing new."""
    x, y = drawn(np.random.default_rng(1), seeds=5)
    once, twice = correlate(x, y), correlate(np.tile(x, 2), np.tile(y, 2))
    assert twice.pearson.interval == pytest.approx(once.pearson.interval)
    assert twice.spearman.interval == pytest.approx(once.spearman.interval)
    assert twice.num_pairs == 2 * once.num_pairs


def test_with_fewer_than_three_seeds_there_is_no_interval():
    x, y = drawn(np.random.default_rng(0))
    assert correlate(x, y).pearson.interval is not None
    x[0] = np.nan  # this seed has no pair
    found = correlate(x, y)
    assert (found.num_seeds, found.pearson.interval, found.spearman.interval) == (2, None, None)
    assert str(found.pearson) == f"{found.pearson.value:.2f}"


def test_the_interval_depends_on_its_seed_alone():
    x, y = drawn(np.random.default_rng(0))
    assert correlate(x, y) == correlate(x, y)
    assert correlate(x, y, seed=1).pearson.interval != correlate(x, y).pearson.interval
    assert correlate(x, y, seed=1).pearson.interval == pytest.approx(correlate(x, y).pearson.interval, abs=0.1)


def test_the_interval_covers_the_truth(monkeypatch):
    """Of 60 intervals with three seeds at least 54 cover, and fewer of those that take tasks for independent."""
    monkeypatch.setattr(correlation, "RESAMPLES", 200)
    rng = np.random.default_rng(2)
    x, y = drawn(rng, seeds=100_000)
    truth = np.corrcoef(x.ravel(), y.ravel())[0, 1]
    covered, by_fisher, widths = 0, 0, []
    for _ in range(60):
        x, y = drawn(rng)
        found = correlate(x, y).pearson
        covered += found.interval[0] <= truth <= found.interval[1]
        half = 1.96 / np.sqrt(x.size - 3)
        by_fisher += abs(np.arctanh(found.value) - np.arctanh(truth)) <= half
        widths.append(found.interval[1] - found.interval[0])
    assert covered >= 54
    assert by_fisher < covered
    assert np.median(widths) < 1.6  # not the whole range


def test_boundaries_and_tasks_are_not_paired_by_chance():
    with pytest.raises(ShapeError, match="one more than tasks"):
        correlate(np.zeros((3, 5)), np.zeros((3, 4)))
    with pytest.raises(ShapeError, match=r"and \(3,\)"):
        correlate(np.zeros((3, 4)), np.zeros((3, 4)), np.zeros(3, int))
