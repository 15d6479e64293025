"""Dormant units, ranks, magnitudes and accuracies, each by hand."""

import numpy as np
import pytest

from ntkgen.continual.metrics.confusion import class_accuracy, count_confusions
from ntkgen.continual.metrics.plasticity import RelativeAccuracy, active_fraction, dormant_units, weight_magnitude
from ntkgen.continual.metrics.ranks import Ranks
from ntkgen.continual.streams.tasks import Stream
from ntkgen.errors import InputError, ShapeError

pytestmark = pytest.mark.numeric

# Of the rounding of singular values in float64, with room for other orders of summation.
TOLERANCE = 1e-12


def of_values(values, shape=(60, 55), dtype=np.float64):
    """A matrix with these singular values."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in shape)
    return ((U * values) @ V.T).astype(dtype)


# dormant units --------------------------------------------------------------------------------------------------------


def ten_units(num_active):
    """Activations of 1000 samples: three units are never active, one on some samples, and six always."""
    h = np.ones((1000, 10))
    h[:, :3] = 0
    h[num_active:, 3] = 0
    return h


@pytest.mark.parametrize(("num_active", "expected"), [(5, 0.4), (20, 0.3), (10, 0.3), (9, 0.4)])
def test_units_that_are_active_on_less_than_one_per_cent_are_dormant(num_active, expected):
    assert dormant_units([active_fraction(ten_units(num_active))]) == pytest.approx(expected)


def test_units_of_all_layers_count_alike_and_negative_activations_are_active():
    wide, narrow = np.zeros((4, 6)), -np.ones((4, 2))
    assert dormant_units([active_fraction(wide), active_fraction(narrow)]) == 6 / 8
    assert dormant_units([active_fraction(narrow)], threshold=1.0) == 0


def test_a_channel_is_active_by_its_positions():
    maps = np.zeros((5, 2, 4, 5))
    maps[3, 1, 2, 0] = 1e-30
    assert active_fraction(maps).tolist() == [0, 1 / 100]


# ranks ----------------------------------------------------------------------------------------------------------------


def test_ranks_of_the_identity_and_of_one_direction():
    found = Ranks.of(np.eye(50))
    assert (found.rank_99, found.rank_99_squared, found.numerical_rank) == (50, 50, 50)
    assert (found.effective_rank, found.stable_rank) == (pytest.approx(50), pytest.approx(50))
    found = Ranks.of(np.outer(np.arange(1.0, 9), np.ones(5)))
    assert (found.rank_99, found.rank_99_squared, found.numerical_rank) == (1, 1, 1)
    assert (found.effective_rank, found.stable_rank) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize(
    ("values", "rank_99", "squared"),
    [
        ([0.9, 0.08, 0.02], 3, 1),  # 98 % is not enough; of the squares, 0.81 of 0.8168 is 99.2 %
        ([0.9, 0.095, 0.005], 2, 2),  # 99.5 % is; of the squares, 0.81 of 0.81905 is 98.9 %
        ([0.5, 0.3, 0.195, 0.005], 3, 3),
    ],
)
def test_ranks_of_99_per_cent_by_hand(values, rank_99, squared):
    found = Ranks.of(of_values(values))
    assert (found.rank_99, found.rank_99_squared) == (rank_99, squared)


def test_ranks_are_those_of_numpy_and_ignore_scale_and_rotation():
    F = np.random.default_rng(1).standard_normal((40, 12)) @ np.diag(np.logspace(0, -4, 12))
    found, values = Ranks.of(F), np.linalg.svd(F, compute_uv=False)
    p = values / values.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=TOLERANCE)
    assert found.stable_rank == pytest.approx((np.linalg.norm(F) / np.linalg.norm(F, 2)) ** 2, rel=TOLERANCE)
    assert found.numerical_rank == np.linalg.matrix_rank(F) == 12
    assert Ranks.of(F, tolerance=1e-2).numerical_rank == np.linalg.matrix_rank(F, tol=1e-2 * values[0]) < 12
    turned = Ranks.of(1e3 * np.linalg.qr(np.random.default_rng(2).standard_normal((40, 40)))[0] @ F)
    assert (turned.rank_99, turned.rank_99_squared) == (found.rank_99, found.rank_99_squared)
    assert turned.effective_rank == pytest.approx(found.effective_rank, rel=TOLERANCE)


def test_the_numerical_rank_counts_what_the_type_resolves():
    values = [1.0, 0.5, 1e-10]
    assert Ranks.of(of_values(values)).numerical_rank == 3
    assert Ranks.of(of_values(values, dtype=np.float32)).numerical_rank == 2


def test_the_numerical_rank_may_have_several_tolerances():
    assert Ranks.of(of_values([1.0, 0.5, 1e-10]), (0.6, 1e-5, 1e-12)).numerical_rank == (1, 2, 3)


def test_ranks_of_zeros_are_zero():
    found = Ranks.of(np.zeros((3, 2), np.float32))
    assert (found.effective_rank, found.rank_99, found.rank_99_squared, found.stable_rank) == (0, 0, 0, 0)
    assert found.numerical_rank == 0


# magnitude and accuracy -----------------------------------------------------------------------------------------------


def test_the_weight_magnitude_is_the_mean_over_all_parameters_and_not_over_tensors():
    assert weight_magnitude([np.full((3, 4), -2.0), np.full(4, 6.0)]) == (12 * 2 + 4 * 6) / 16
    many = np.full(1 << 20, 0.1, np.float32)
    assert weight_magnitude([many]) == pytest.approx(float(np.float32(0.1)), rel=TOLERANCE)  # summed in float64


def test_the_accuracy_by_class_is_in_the_order_of_arrival():
    stream = Stream((), (2, 0, 1))
    labels, right = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2]), np.array([1, 1, 1, 0, 1, 1, 1, 0, 0], bool)
    predicted = np.where(right, labels, (labels + 1) % 3)
    confusion = count_confusions(stream.targets(labels), stream.targets(predicted), 3)
    assert class_accuracy(confusion).tolist() == [1 / 3, 3 / 4, 1]


def test_the_relative_accuracy_is_paired_by_seed():
    accuracy = {7: np.array([0.5, 0.6, np.nan]), 3: np.array([0.8, 0.6, 0.9])}
    retrained = {3: np.array([0.7, 0.7, 0.9]), 5: np.zeros(3), 7: np.array([0.2, 0.5, 0.8])}
    found = RelativeAccuracy.of(accuracy, retrained)
    assert found.seeds == (3, 7)
    assert found.differences[:, :2] == pytest.approx(np.array([[0.1, -0.1], [0.3, 0.1]]))
    assert found.mean == pytest.approx([0.2, 0, 0])
    # of two values, s / √2 is half of their difference, and the 0.975 quantile of Student's distribution is 12.7062
    assert found.standard_error == pytest.approx([0.1, 0.1, np.nan], nan_ok=True)
    assert found.interval[0] == pytest.approx([0.2 - 1.27062, 0.2 + 1.27062], abs=1e-5)
    assert np.isnan(found.interval[2]).all()


def test_a_relative_accuracy_needs_a_baseline_of_the_same_seeds_and_tasks():
    accuracy = {0: np.zeros(3), 1: np.zeros(3)}
    with pytest.raises(InputError, match="found none of seed 1"):
        RelativeAccuracy.of(accuracy, {0: np.zeros(3)})
    with pytest.raises(InputError, match="no baseline"):
        RelativeAccuracy.of(accuracy, {})
    with pytest.raises(ShapeError, match=r"\[\(2,\), \(3,\)\]"):
        RelativeAccuracy.of(accuracy, {0: np.zeros(3), 1: np.zeros(2)})
