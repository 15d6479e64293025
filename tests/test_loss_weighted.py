"""The loss-weighted kernel against the Gauss-Newton matrix of an explicit network, and what it leaves out."""

import numpy as np
import pytest
import torch
import xarray
from torch.nn import functional as F

from ntkgen.analysis.targets import contrasts
from ntkgen.continual.metrics.kernels import Spectrum
from ntkgen.continual.metrics.loss_weighted import softmax_hessians, weighted_contrasts, weighted_kernel
from ntkgen.continual.metrics.series import loss_weighted_metrics
from ntkgen.errors import InputError, ShapeError, StoreError

pytestmark = pytest.mark.numeric

SAMPLES, OUTPUTS = 5, 4
# Relative to the largest eigenvalue: both sides are computed in float64, from matrices of at most 40 rows.
TOLERANCE = 1e-12


def explicit():
    """The Jacobian (rows, parameters) and the outputs of a network with one hidden layer, by autograd in float64."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 5), (5, OUTPUTS))]
    x = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)

    def network(first, second):
        return torch.tanh(x @ first) @ second

    jacobians = torch.autograd.functional.jacobian(network, tuple(params))
    J = torch.cat([each.reshape(SAMPLES * OUTPUTS, -1) for each in jacobians], 1)
    return J.numpy(), network(*params).numpy()


J, LOGITS = explicit()
K = J @ J.T
Q = contrasts(OUTPUTS)


def blocks_of(hessians):
    n, m, _ = hessians.shape
    H = np.zeros((n, m, n, m))
    H[np.arange(n), :, np.arange(n)] = hessians
    return H.reshape(n * m, n * m)


def assert_same_spectrum(found, expected):
    """Compare the leading eigenvalues; the others of the larger matrix are zero."""
    values, wanted = (np.linalg.eigvalsh(each)[::-1] for each in (found, expected))
    size = max(len(values), len(wanted))
    values, wanted = (np.pad(each, (0, size - len(each))) for each in (values, wanted))
    np.testing.assert_allclose(values, wanted, atol=TOLERANCE * wanted[0])
    assert wanted[0] > 0


def test_the_blocks_are_hessians_of_the_cross_entropy():
    for sample, logits in enumerate(torch.from_numpy(LOGITS)):
        expected = torch.autograd.functional.hessian(lambda f: F.cross_entropy(f, torch.tensor(1)), logits)
        np.testing.assert_allclose(softmax_hessians(LOGITS)[sample], expected, atol=TOLERANCE)


def test_the_hessian_of_a_certain_sample_is_not_lost_to_cancellation():
    found = softmax_hessians(np.array([[40.0, 0.0], [1000.0, 0.0]]))
    q = np.exp(-40.0) / (1 + np.exp(-40.0)) ** 2
    np.testing.assert_allclose(found[0], [[q, -q], [-q, q]], rtol=1e-13)
    assert np.isfinite(found[1]).all()


def test_the_spectrum_is_that_of_the_gauss_newton_matrix():
    H = blocks_of(softmax_hessians(LOGITS))
    found = weighted_kernel(K, LOGITS)
    assert found.shape == K.shape
    assert np.array_equal(found, found.T)
    assert_same_spectrum(found, J.T @ H @ J)
    assert_same_spectrum(weighted_contrasts(K, LOGITS), J.T @ H @ J)
    assert len(weighted_contrasts(K, LOGITS)) == SAMPLES * (OUTPUTS - 1)


def test_the_root_is_symmetric():
    values, vectors = np.linalg.eigh(blocks_of(softmax_hessians(LOGITS)))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    np.testing.assert_allclose(weighted_kernel(K, LOGITS), root @ K @ root, atol=1e-7 * K.max())  # √ε, by the root of 0


def test_contrasts_lose_nothing():
    C = np.kron(np.eye(SAMPLES), Q)
    H = blocks_of(softmax_hessians(LOGITS))
    found = weighted_kernel(C @ K @ C.T, LOGITS, "centered")
    assert_same_spectrum(found, J.T @ H @ J)
    np.testing.assert_allclose(found, weighted_contrasts(K, LOGITS), atol=TOLERANCE * K.max())


@pytest.mark.parametrize("missing", ["kernel", "logits", "both"])
@pytest.mark.parametrize("output", ["full", "centered"])
def test_outputs_that_are_not_there_are_left_out(missing, output):
    """As if the network had only the first two outputs."""
    kept = np.tile(np.arange(OUTPUTS) < 2, SAMPLES)
    few = J[kept]
    expected = few.T @ blocks_of(softmax_hessians(LOGITS[:, :2])) @ few
    C = np.kron(np.eye(SAMPLES), Q) if output == "centered" else np.eye(len(J))
    kernel, logits = C @ K @ C.T, LOGITS.copy()
    if missing != "logits":
        is_gone = np.tile(np.arange(len(C) // SAMPLES) >= 2 - (output == "centered"), SAMPLES)
        kernel[is_gone] = kernel[:, is_gone] = np.nan
    if missing != "kernel":
        logits[:, 2:] = np.nan
    found = weighted_kernel(kernel, logits, output)
    assert len(found) == SAMPLES * (2 - (output == "centered"))
    assert_same_spectrum(found, expected)
    assert_same_spectrum(weighted_contrasts(kernel, logits, output), expected)


@pytest.mark.parametrize("output", ["trace", "sum", "diagonal", "index:1"])
def test_sums_and_single_outputs_are_refused(output):
    with pytest.raises(InputError, match=f"'{output}' have no loss-weighted form"):
        weighted_kernel(K, LOGITS, output)


def test_a_kernel_of_other_samples_is_refused():
    with pytest.raises(ShapeError, match="expected 16 rows for 4 samples"):
        weighted_kernel(K, LOGITS[1:])


# over time ------------------------------------------------------------------------------------------------------------


def series(output="full", **changes):
    """Two times, at the first of which the last outputs do not exist."""
    early, logits = K.copy(), np.stack([LOGITS, LOGITS])
    gone = np.tile(np.arange(OUTPUTS) >= 2, SAMPLES)
    early[gone] = early[:, gone] = np.nan
    logits[0, :, 2:] = np.nan
    data = {
        "kernel": (("time", "row", "col"), np.stack([early, K])),
        "logits": (("time", "sample", "output"), logits),
        "iteration": ("time", [0, 10]),
        "task": ("time", [0, 1]),
        "epoch": ("time", [0.0, 1.0]),
        "row_output": ("row", np.tile(np.arange(OUTPUTS), SAMPLES)),
    }
    attributes = {"ntkgen_snapshots": {"output": output, "precision": "float32"}}
    return xarray.Dataset({**data, **changes}, attrs=attributes)


def test_metrics_over_time_are_those_of_the_weighted_kernels():
    found = loss_weighted_metrics(series(), rank_tolerance=0.1)
    blocks = [weighted_contrasts(K, np.where(np.arange(OUTPUTS) < kept, LOGITS, np.nan)) for kept in (2, OUTPUTS)]
    for name in ("trace", "effective_rank", "rank_99", "numerical_rank", "condition_bound"):
        expected = [getattr(Spectrum.of(block, 2.0**-23, 0.1), name) for block in blocks]
        assert found[name].values == pytest.approx(expected), name
    assert found.iteration.values.tolist() == [0, 10]
    assert found.trained_task.values.tolist() == [0, 1]


def test_the_loss_may_be_over_fewer_outputs_than_there_are():
    found = loss_weighted_metrics(series(), np.array([2, 2]))
    assert found.trace.values[1] == pytest.approx(found.trace.values[0])
    assert np.isnan(loss_weighted_metrics(series(), np.array([1, 2])).trace.values).tolist() == [True, False]


def test_kernels_without_what_is_needed_are_refused():
    with pytest.raises(InputError, match="'trace'"):
        loss_weighted_metrics(series("trace"))
    with pytest.raises(StoreError, match="array logits"):
        loss_weighted_metrics(series().drop_vars("logits"))
