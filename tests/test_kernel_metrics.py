"""Metrics of kernels over time, by hand and by the properties that define them."""

import numpy as np
import pytest
import xarray

from ntkgen.analysis.targets import Readout
from ntkgen.continual.metrics import series
from ntkgen.continual.metrics.kernels import (
    Spectrum,
    centred_distance,
    centred_kernel,
    distance,
    interference,
    label_alignment,
    usual_step,
    velocity,
)
from ntkgen.continual.metrics.regression import RIDGE, classify
from ntkgen.continual.metrics.series import held_out_accuracy, kernel_metrics
from ntkgen.continual.metrics.switches import switches_of

RNG = np.random.default_rng(0)
LABELS = np.array([0, 0, 1, 1, 2, 2])


def kernel(size=6, seed=0):
    J = np.random.default_rng(seed).standard_normal((size, 9))
    return J @ J.T


def test_the_spectrum_by_hand():
    found = Spectrum.of(np.diag([4.0, 2.0, 1.0, 1.0]))
    p = np.array([0.5, 0.25, 0.125, 0.125])
    assert (found.trace, found.largest, found.smallest, found.condition) == (8, 4, 1, 4)
    assert found.frobenius_norm == pytest.approx(22**0.5)
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert found.participation_ratio == pytest.approx(64 / 22)
    assert (found.numerical_rank, found.num_negative) == (4, 0)


def test_the_rank_of_99_per_cent_by_hand():
    assert Spectrum.of(np.eye(50)).rank_99 == 50
    assert Spectrum.of(np.diag([0.9, 0.08, 0.02])).rank_99 == 3
    assert Spectrum.of(np.diag([0.005, 0.9, 0.095])).rank_99 == 2
    assert Spectrum.of(np.diag([1.0, -0.5])).rank_99 == 1
    assert Spectrum.of(np.zeros((2, 2))).rank_99 == 0


def test_negative_eigenvalues_are_clamped_and_counted():
    found = Spectrum.of(np.diag([1.0, 1.0, -0.5]))
    assert found.effective_rank == pytest.approx(2)
    assert (found.num_negative, found.numerical_rank) == (1, 2)
    assert np.isnan(found.condition)


def test_a_condition_that_the_precision_does_not_resolve_is_only_bounded():
    rounding = 2.0**-23
    resolved, blurred = (np.diag([1.0, 0.5, smallest]) for smallest in (4 * rounding, 2 * rounding))
    found = Spectrum.of(resolved, rounding)
    assert (found.condition, found.numerical_rank) == (1 / (4 * rounding), 3)
    assert found.condition_bound == 1 / (7 * rounding)
    found = Spectrum.of(blurred, rounding)
    assert np.isnan(found.condition)
    assert (found.condition_bound, found.numerical_rank) == (1 / (5 * rounding), 2)
    assert Spectrum.of(blurred, rounding, tolerance=0.5).numerical_rank == 1
    assert Spectrum.of(blurred).condition == 1 / (2 * rounding)


def test_distance_ignores_scale_and_is_one_for_orthogonal_kernels():
    K = kernel()
    assert distance(K, 7 * K) == pytest.approx(0, abs=1e-12)
    assert distance(np.diag([1.0, 0.0]), np.diag([0.0, 1.0])) == 1
    assert 0 < distance(K, kernel(seed=1)) < 1


def test_the_centred_distance_ignores_scale_and_what_is_common_to_all_samples():
    K, shift = kernel(), np.arange(len(kernel()), dtype=np.float64)
    shifted = 3 * K + shift[:, None] + shift[None, :]
    assert centred_distance(K, shifted, 1) == pytest.approx(0, abs=1e-10)
    assert distance(K, shifted) > 0.01
    assert 0 < centred_distance(K, kernel(seed=1), 1) <= 1
    H = np.eye(len(K)) - 1 / len(K)
    other = kernel(seed=1)
    hsic = [float(np.trace(a @ H @ b @ H)) for a, b in ((K, other), (K, K), (other, other))]
    assert centred_distance(K, other, 1) == pytest.approx(1 - hsic[0] / np.sqrt(hsic[1] * hsic[2]))


def test_velocity_times_dt_is_distance_and_pairs_have_one_dt():
    kernels = np.stack([kernel(seed=seed) for seed in range(5)])

    def distance_of(time, other):
        return distance(kernels[time], kernels[other])

    starts, speed, angular = velocity(distance_of, np.array([0, 1, 10, 20, 30]), 10)
    assert starts.tolist() == [0, 10, 20]
    assert speed[1] * 10 == pytest.approx(distance(kernels[2], kernels[3]))
    assert np.cos(angular[1] * 10) == pytest.approx(1 - distance(kernels[2], kernels[3]))
    assert usual_step(np.array([0, 5, 10, 11])) == 5


def test_alignment_of_the_target_with_itself_is_one_and_centring_ignores_shifts():
    Y = (LABELS[:, None] == np.arange(3)).astype(float)
    assert label_alignment(Y @ Y.T, Y, 1, centred=False) == pytest.approx(1)
    assert label_alignment(3 * Y @ Y.T + 5, Y, 1, centred=True) == pytest.approx(1)
    column = Y.reshape(-1, 1)
    assert label_alignment(column @ column.T, column, 3, centred=False) == pytest.approx(1)
    assert label_alignment(column @ column.T, column, 3, centred=True) == pytest.approx(1)


def test_centring_is_the_product_with_its_matrix():
    K, H = kernel(12), np.eye(4) - 1 / 4
    full = np.kron(H, np.eye(3))
    np.testing.assert_allclose(centred_kernel(K, 3), full @ K @ full, atol=1e-12)


def test_interference_by_hand():
    K = np.array([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [1.0, 1.0, 4.0]])
    found = interference(K, np.array([0, 0, 1]))
    assert found == pytest.approx(np.array([[1, 2**0.5 / (8**0.5 * 4) ** 0.5], [2**0.5 / (8**0.5 * 4) ** 0.5, 1]]))


@pytest.mark.parametrize(("output", "per_sample"), [("trace", 1), ("full", 3), ("centered", 2)])
def test_leave_one_out_predictions_are_those_of_fits_without_each_sample(output, per_sample):
    labels, n = np.arange(12) % 3, 12
    J = np.random.default_rng(3).standard_normal((n * per_sample, 40)) + np.repeat(labels, per_sample)[:, None]
    K, readout = J @ J.T, Readout(output, 3, None, "")
    is_training = np.arange(n) < 9
    found = classify(K, labels, is_training, readout)
    rows = np.repeat(np.arange(n), per_sample)

    def right(fitted, asked):
        """Whether the fit to some samples classifies another one."""
        a, b = np.isin(rows, fitted), rows == asked
        shift = RIDGE * np.trace(K[rows < 9][:, rows < 9]) / (9 * per_sample)
        alpha = np.linalg.solve(K[np.ix_(a, a)] + shift * np.eye(a.sum()), readout.targets(labels[fitted]))
        return readout.scores(K[np.ix_(b, a)] @ alpha).argmax() == labels[asked]

    expected = [right(np.delete(np.arange(9), sample), sample) for sample in range(9)]
    assert found.left_out.tolist() == expected
    assert found.held_out.tolist() == [right(np.arange(9), sample) for sample in range(9, 12)]
    assert 0 < np.mean([*found.left_out, *found.held_out]) < 1


def data_of(kernels, num_outputs=1):
    n = kernels.shape[1] // num_outputs
    times, labels = len(kernels), LABELS[:n] % num_outputs if num_outputs > 1 else LABELS[:n]
    return xarray.Dataset(
        {
            "kernel": (("time", "row", "col"), kernels),
            "iteration": ("time", 10 * np.arange(times)),
            "task": ("time", np.zeros(times, int)),
            "epoch": ("time", np.arange(times) / 2),
            "row_task": ("row", np.repeat(np.arange(n) // (n // 2), num_outputs)),
            "row_label": ("row", np.repeat(labels, num_outputs)),
            "row_output": ("row", np.tile(np.arange(num_outputs), n)),
        },
        attrs={"ntkgen_snapshots": {"output": "trace" if num_outputs == 1 else "full", "precision": "float64"}},
    )


def test_metrics_of_a_series_are_those_of_its_kernels():
    kernels = np.stack([kernel(seed=seed) for seed in range(3)])
    found = kernel_metrics(data_of(kernels), rank_tolerance=0.5)
    assert found.numerical_rank.values[0] == (np.linalg.eigvalsh(kernels[0]) > found.largest.values[0] / 2).sum()
    assert found.largest.values == pytest.approx([np.linalg.eigvalsh(K)[-1] for K in kernels])
    assert found.distance.values == pytest.approx([0, *[distance(kernels[0], K) for K in kernels[1:]]], abs=1e-12)
    assert found.task_frobenius_norm.values[1, 1] == pytest.approx(np.linalg.norm(kernels[1][3:, 3:]))
    assert found.velocity.values == pytest.approx([distance(*pair) / 10 for pair in (kernels[:2], kernels[1:])])
    assert found.interference.shape == (3, 2, 2)
    assert found.attrs["dt"] == 10
    expected = classify(kernels[1][:3, :3], LABELS[:3], np.ones(3, bool), Readout("trace", 3, None, ""))
    assert found.leave_one_out_accuracy.values[1] == expected.left_out.mean()  # of the task in training


def test_the_numerical_rank_may_have_several_tolerances():
    kernels = np.stack([kernel(seed=seed) for seed in range(3)])
    found = kernel_metrics(data_of(kernels), rank_tolerance=(0.5, 1e-2))
    assert found.numerical_rank.dims == ("time", "rank_tolerance")
    assert found.rank_tolerance.values.tolist() == [0.5, 1e-2]
    for tolerance in (0.5, 1e-2):
        expected = kernel_metrics(data_of(kernels), rank_tolerance=tolerance).numerical_rank
        np.testing.assert_array_equal(found.numerical_rank.sel(rank_tolerance=tolerance), expected)
    assert found.numerical_rank.values[0, 0] < found.numerical_rank.values[0, 1]
    columns = series._columns([series._MISSING], (0.5, 1e-2))  # of a kernel without values
    assert np.isnan(columns["numerical_rank"][1]).tolist() == [[True, True]]


def test_distances_from_the_previous_kernel_are_those_of_consecutive_ones_at_any_pace():
    kernels = np.stack([kernel(seed=0), 2 * kernel(seed=0), kernel(seed=1), kernel(seed=2)])
    data = data_of(kernels).assign(iteration=("time", [0, 5, 30, 130]))
    found = kernel_metrics(data)
    last = np.vdot(kernels[2], kernels[3]) / np.linalg.norm(kernels[2]) / np.linalg.norm(kernels[3])
    assert np.isnan([found[name].values[0] for name in ("previous_distance", "mean_velocity")]).all()
    assert found.previous_distance.values[1] == pytest.approx(0, abs=1e-12)
    assert found.previous_centred_distance.values[1] == pytest.approx(0, abs=1e-12)
    assert found.previous_distance.values[3] == pytest.approx(1 - last)
    assert found.previous_centred_distance.values[3] == pytest.approx(centred_distance(*kernels[2:], 1))
    assert found.mean_velocity.values[1:] == pytest.approx(found.previous_distance.values[1:] / [5, 25, 100])
    one = kernel_metrics(data.isel(time=[0]))
    assert np.isnan(one.mean_velocity.values).tolist() == [True]


def test_kernel_regression_is_measured_on_held_out_samples_of_the_tasks_so_far():
    kernels, is_validation = np.stack([kernel(seed=seed) for seed in range(2)]), np.array([False, False, True] * 2)
    found = held_out_accuracy(data_of(kernels), is_validation)
    expected = classify(kernels[1][:3, :3], LABELS[:3], ~is_validation[:3], Readout("trace", 3, None, ""))
    assert found[1] == expected.held_out.mean()


def test_outputs_that_do_not_exist_yet_are_left_out():
    kernels = np.stack([kernel(12, seed=seed) for seed in range(2)])
    missing = np.tile([False, True], 6)
    kernels[0][missing] = np.nan
    kernels[0][:, missing] = np.nan
    found = kernel_metrics(data_of(kernels, num_outputs=2))
    kept = kernels[0][~missing][:, ~missing]
    assert found.trace.values[0] == pytest.approx(np.trace(kept))
    assert found.distance.values[1] == pytest.approx(distance(kept, kernels[1][~missing][:, ~missing]))
    of_first = np.flatnonzero(LABELS % 2 == 0)  # the samples of the only class that has an output
    own = kept[np.ix_(of_first, of_first)]
    assert found.alignment.values[0] == pytest.approx(own.sum() / np.linalg.norm(own) / len(own))
    assert not np.isnan(found.alignment.values[1])


def test_a_kernel_without_any_values_has_no_metrics():
    kernels = np.stack([kernel(), np.full((6, 6), np.nan)])
    found = kernel_metrics(data_of(kernels))
    for name in ("largest", "effective_rank", "distance", "alignment", "centred_alignment", "leave_one_out_accuracy"):
        assert np.isnan(found[name].values[1]), name


@pytest.mark.parametrize("output", ["trace", "sum"])
def test_sums_over_different_numbers_of_outputs_are_not_compared(output):
    data = data_of(np.stack([kernel(seed=seed) for seed in range(4)]))
    data = data.assign(num_outputs=("time", [2, 2, 4, 4])).assign_attrs(ntkgen_snapshots={"output": output})
    found = kernel_metrics(data)
    assert np.isnan(found.distance.values).tolist() == [False, False, True, True]
    assert np.isnan(found.velocity.values).tolist() == np.isnan(found.angular_velocity.values).tolist()
    assert np.isnan(found.velocity.values).tolist() == [False, True, False]
    assert switches_of(data) is None
    found = kernel_metrics(data.assign(num_outputs=("time", [4, 4, 4, 4])))
    assert not np.isnan(found.distance.values).any()


def test_velocities_are_those_of_the_outputs_that_both_times_have():
    kernels = np.stack([kernel(12, seed=seed) for seed in range(2)])
    missing = np.tile([False, True], 6)
    kernels[0][missing] = kernels[0][:, missing] = np.nan
    kept = [K[~missing][:, ~missing] for K in kernels]
    found = kernel_metrics(data_of(kernels, num_outputs=2).assign(num_outputs=("time", [1, 2])))
    assert found.velocity.values == pytest.approx([distance(*kept) / 10])
    kernels[0][:] = np.nan
    assert np.isnan(distance(*kernels))


def test_diagonal_kernels_are_compared_on_the_sum_of_common_outputs():
    kernels = np.stack([[kernel(seed=seed + 10 * output) for output in range(3)] for seed in range(2)])
    expected = distance(kernels[0, :2].sum(0), kernels[1, :2].sum(0))
    kernels[0, 2] = np.nan
    data = data_of(np.stack([kernel(seed=seed) for seed in range(2)]))
    data = data.assign(kernel=(("time", "output", "row", "col"), kernels), num_outputs=("time", [2, 3]))
    found = kernel_metrics(data.assign_attrs(ntkgen_snapshots={"output": "diagonal"}))
    assert found.distance.values == pytest.approx([0, expected], abs=1e-12)
