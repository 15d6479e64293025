"""The forgetting that kernels predict: exact where the network is linear in what it trains, and wrong if it is."""

import numpy as np
import pytest
import torch
import xarray
from scipy.linalg import helmert
from torch import nn
from torch.nn import functional as F

import ntkgen
from ntkgen.continual.metrics.forgetting import Agreement, predicted_forgetting
from ntkgen.errors import InputError, StoreError

PER_TASK, EXACT = 6, ("full", "centered", "trace", "diagonal")
X = 2 * torch.randn(2 * PER_TASK, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(2 * PER_TASK) // (PER_TASK // 2)  # two classes per task
TASKS = np.arange(2 * PER_TASK) // PER_TASK


def network():
    """A network whose head alone is trained."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, 16), nn.Tanh()).requires_grad_(False)
    return nn.Sequential(backbone, nn.Linear(16, 4, bias=False)).double()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train on both tasks by full-batch gradient descent on their probe, and record every fourth step."""
    place, net, iteration = tmp_path_factory.mktemp("runs") / "run.zarr", network(), 0
    optimizer = torch.optim.SGD([param for param in net.parameters() if param.requires_grad], lr=0.05)
    with ntkgen.Snapshots(
        place, net, X.double(), labels=Y, tasks=TASKS, output="full", precision="float64"
    ) as snapshots:
        snapshots(net, iteration=0, task=0, step_size=0.05)
        for iteration in range(1, 81):
            task = int(iteration > 40)
            ids = torch.from_numpy(np.flatnonzero(task == TASKS))
            optimizer.zero_grad()
            F.cross_entropy(net(X[ids].double()), Y[ids]).backward()
            optimizer.step()
            if iteration % 4 == 0:
                snapshots(net, iteration=iteration, task=task, step_size=0.05)
    return xarray.open_zarr(place).load()


def seen_as(run, output):
    """Return the run as it is with another output map; the kernel is a function of the full one."""
    found, n, m = run.copy(), 2 * PER_TASK, 4
    full = run.kernel.values.reshape(-1, n, m, n, m)
    if output == "trace":
        kernel = np.einsum("tiojo->tij", full)
    elif output == "diagonal":
        kernel = np.einsum("tiojo->toij", full)
    elif output == "centered":
        kernel = np.einsum("ao,tiojp,bp->tiajb", helmert(m), full, helmert(m)).reshape(-1, n * (m - 1), n * (m - 1))
    else:
        kernel = full.copy()
        if output == "seen":
            kernel[:11, :, 2:] = kernel[:11, :, :, :, 2:] = np.nan
        kernel = kernel.reshape(-1, n * m, n * m)
    dims = ("time", "o", "i", "j") if output == "diagonal" else ("time", "i", "j")
    found["kernel"] = dims, kernel
    found.attrs["ntkgen_snapshots"] = {"output": output}
    return found


# A head's kernel is φ(x) · φ(x') for an output with itself and zero for two outputs. The approximations of `trace` and
# `diagonal` are then exact.
@pytest.mark.parametrize("output", EXACT)
def test_a_trained_head_forgets_as_its_kernel_predicts(run, output):
    found = predicted_forgetting(seen_as(run, output))
    assert found.old_cosine.values[1] > 0.999
    assert found.cosine.values.min() > 0.999  # of each task, also of the one that learns and of the one to come
    assert found.old_scale.values[1] == pytest.approx(1, abs=0.02)
    assert found.old_norm_ratio.values[1] == pytest.approx(1, abs=0.02)
    assert found.interval_cosine.values[11:].min() > 0.999
    assert np.isnan(found.old_cosine.values[0])
    assert np.isnan(found.interval_cosine.values[:11]).all()
    increase, predicted = (found[name].values[1, 0] for name in ("loss_increase", "predicted_loss_increase"))
    assert increase > 0.1
    assert predicted == pytest.approx(increase, rel=0.05)
    assert 1 <= found.old_num_modes.values[1] <= PER_TASK * 4


def test_the_true_change_is_that_of_the_recorded_outputs(run):
    logits = run.logits.values
    found = predicted_forgetting(run)
    assert np.array_equal(found.true_change.values[1], logits[-1] - logits[10])
    assert found.sample_task.values.tolist() == TASKS.tolist()
    centred = predicted_forgetting(seen_as(run, "centered")).true_change.values[1]
    assert np.abs(centred - (logits[-1] - logits[10] - (logits[-1] - logits[10]).mean(1, keepdims=True))).max() < 1e-12


def test_with_swapped_blocks_the_prediction_fails(run):
    swapped = run.copy()
    rows = np.roll(np.arange(len(swapped.row)), PER_TASK * 4)
    swapped["kernel"] = swapped.kernel.dims, swapped.kernel.values[:, rows][:, :, rows]
    assert predicted_forgetting(swapped).old_cosine.values[1] < 0.9


def test_outputs_that_are_not_seen_yet_are_left_out(run):
    found = predicted_forgetting(seen_as(run, "seen"))
    assert np.isnan(found.true_change.values[0, :, 2:]).all()  # while the first two classes are learned
    assert not np.isnan(found.true_change.values[1]).any()
    assert found.old_cosine.values[1] > 0.99  # the first of the intervals has one end


def by_hand(K, logits, **changes):
    """Two samples of two tasks, with two outputs each, at the iterations 0 and 3."""
    values = {
        "kernel": (("time", "row", "col"), np.stack([K, K])),
        "logits": (("time", "sample", "output"), np.array(logits)),
        "iteration": ("time", [0, 3]),
        "step_size": ("time", [0.7, 0.5]),
        "task": ("time", [0, 1]),
        "row_sample": ("row", [0, 0, 1, 1]),
        "row_task": ("row", [0, 0, 1, 1]),
        "row_label": ("row", [0, 0, 1, 1]),
    }
    return xarray.Dataset({**values, **changes}, attrs={"ntkgen_snapshots": {"output": "full"}})


def test_the_prediction_by_hand():
    K = np.array([[9.0, 0, 1, 2], [0, 9, 3, 5], [1, 3, 4, 0], [2, 5, 0, 1]])
    after = [[0.1, -0.2], [0.0, np.log(3)]]
    found = predicted_forgetting(by_hand(K, [np.zeros((2, 2)), after]))
    # the class of the new sample is 1: residuals (1/2, −1/2), then (1/4, −1/4); 3 iterations of 0.5
    g = 0.5 * np.array([0.75, -0.75])
    assert found.predicted_change.values[1, 0] == pytest.approx(-1.5 * np.array([[1, 2], [3, 5]]) @ g)
    assert found.predicted_change.values[1, 1] == pytest.approx(-1.5 * np.array([4, 1]) * g)
    predicted, true = found.predicted_change.values[1, 0], np.array(after[0])
    assert found.old_scale.values[1] == pytest.approx(predicted @ true / (predicted @ predicted))
    assert found.loss_increase.values[1, 0] == pytest.approx(np.log(1 + np.exp(-0.3)) - np.log(2))


def test_the_binary_cross_entropy_has_other_residuals():
    found = predicted_forgetting(by_hand(np.eye(4), [[[0, 0], [np.log(3), 0]], [[0, 0], [np.log(3), 0]]]), "binary")
    assert found.predicted_change.values[1, 1] == pytest.approx(-1.5 * np.array([0.75, -0.5]))
    rising = by_hand(np.eye(4), [np.zeros((2, 2)), [[0, 1], [0, 0]]])
    assert predicted_forgetting(rising, "binary").loss_increase.values[1, 0] == pytest.approx(np.log((1 + np.e) / 2))


def test_modes_are_counted_until_a_tenth_is_missing():
    by_mode = np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 1.2]])  # of 10.44, 9 and 1.44
    assert Agreement.of(by_mode, np.array([1.0, 0.0])).num_modes == 3
    by_mode[1, 2] = 0.9
    found = Agreement.of(by_mode, np.array([2.0, 0.0]))
    assert found.num_modes == 1
    assert (found.cosine, found.norm_ratio) == pytest.approx((3 / 9.81**0.5, 9.81**0.5 / 2))
    assert np.isnan(Agreement.of(by_mode, np.zeros(2)).cosine)


def test_what_cannot_be_predicted_is_refused(run):
    with pytest.raises(InputError, match="output 'sum' do not predict"):
        predicted_forgetting(seen_as(run, "sum"))
    with pytest.raises(StoreError, match="outputs on the probe are not recorded"):
        predicted_forgetting(run.drop_vars("logits"))
    unlabelled = by_hand(np.eye(4), np.zeros((2, 2, 2)), row_label=("row", [-1] * 4))
    with pytest.raises(InputError, match="has no labels"):
        predicted_forgetting(unlabelled)
