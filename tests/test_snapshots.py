"""Kernels over the course of a training: equal to `ntkgen.ntk` at each moment, and training does not notice."""

import copy

import numpy as np
import pytest
import torch
import xarray
from cases import TOLERANCES, relative_error
from torch import nn
from torch.nn import functional as F

import ntkgen
from ntkgen.errors import FingerprintError, InputError, ShapeError

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3


def network(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, outputs))


def trained(net, look=lambda net, step: None, steps=6, first=0):
    """Train in plain PyTorch, and look before each step and after the last."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for step in range(first, first + steps):
        look(net, step)
        ids = torch.randperm(60)[:20]
        optimizer.zero_grad()
        F.cross_entropy(net(X[ids]), Y[ids]).backward()
        optimizer.step()
    look(net, first + steps)
    return net


@pytest.mark.parametrize("output", ["trace", "full", "sum", "centered", "index:1", "diagonal"])
def test_each_time_is_the_kernel_of_its_moment(tmp_path, output):
    net, expected = network(), []
    with ntkgen.Snapshots(tmp_path / "run.zarr", net, X[:5], output=output, precision="float64") as snapshots:

        def look(net, step):
            returned = snapshots(net, iteration=step)
            expected.append(ntkgen.ntk(net, X[:5], output=output, precision="float64"))
            assert relative_error(returned, expected[-1]) <= TOLERANCES["float64"]

        trained(net, look)
    data = xarray.open_zarr(tmp_path / "run.zarr")
    assert data.kernel.dtype == np.float64
    assert relative_error(data.kernel.values, torch.stack(expected)) <= TOLERANCES["float64"]
    assert data.iteration.values.tolist() == list(range(7))


def test_the_probe_is_that_of_the_beginning(tmp_path):
    net, probe = network(), X[:5].clone()
    expected = ntkgen.ntk(net, probe, output="trace")
    with ntkgen.Snapshots(tmp_path / "run.zarr", net, probe, lazy_error=True) as snapshots:
        probe.mul_(3)
        assert relative_error(snapshots(net, iteration=0), expected) <= TOLERANCES["float32"]
        net.register_buffer("unused", torch.zeros(1))  # which prepares the kernel function anew
        assert relative_error(snapshots(net, iteration=1), expected) <= TOLERANCES["float32"]


@pytest.mark.parametrize(("output", "precision"), [("trace", "float32"), ("seen", "float64")])
def test_the_logits_of_the_probe_are_kept(tmp_path, output, precision):
    net, expected = network(), []
    with ntkgen.Snapshots(tmp_path / "run.zarr", net, X[:5], output=output, precision=precision) as snapshots:

        def look(net, step):
            snapshots(net, iteration=step, num_seen=2)
            with torch.no_grad():
                copied = copy.deepcopy(net).eval().to(getattr(torch, precision))
                expected.append(copied(X[:5].to(getattr(torch, precision))))

        trained(net, look, steps=2)
    logits = xarray.open_zarr(tmp_path / "run.zarr").logits
    assert (logits.dims, str(logits.dtype)) == (("time", "sample", "output"), precision)
    assert relative_error(logits.values, torch.stack(expected)) <= TOLERANCES[precision]


def test_training_with_snapshots_ends_with_the_same_bits(tmp_path):
    plain = trained(network())
    net = network()
    snapshots = ntkgen.Snapshots(tmp_path / "run.zarr", net, X[:5])
    trained(net, lambda net, step: snapshots(net, iteration=step))
    assert len(snapshots) == 7
    for name, value in plain.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_what_is_known_of_rows_and_times_is_kept(tmp_path):
    net = network()
    place = tmp_path / "run.zarr"
    with ntkgen.Snapshots(
        place, net, X[:2], labels=Y[:2], tasks=[0, 1], sample_ids=np.array([7, 9]), output="full"
    ) as snapshots:
        snapshots(net, iteration=3, epoch=0.5, task=1, step_size=0.1)
    data = xarray.open_zarr(place)
    time = data.isel(time=0)
    found = [float(time[name]) for name in ("iteration", "epoch", "task", "step_size", "num_outputs")]
    assert found == [3, 0.5, 1, 0.1, 3]
    assert data.row_label.values.tolist() == data.col_label.values.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.row_output.values.tolist() == [0, 1, 2] * 2
    assert data.row_task.values.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.row_sample_id.values.tolist() == [7, 7, 7, 9, 9, 9]
    assert "row_label" in data.kernel.coords


def test_the_kernels_of_the_layers_add_up(tmp_path):
    net = network()
    place = tmp_path / "run.zarr"
    with ntkgen.Snapshots(place, net, X[:4], per_layer=True, precision="float64") as snapshots:
        snapshots(net, iteration=0)
    data = xarray.open_zarr(place)
    assert data.attrs["ntkgen_snapshots"]["layers"] == ["0", "1", "4"]
    expected = ntkgen.ntk(net, X[:4], output="trace", precision="float64")
    assert relative_error(data.kernel_by_layer[0].sum("layer").values, expected) <= TOLERANCES["float64"]
    assert relative_error(data.kernel[0].values, expected) <= TOLERANCES["float64"]


def grown(net, outputs):
    """Replace the head by one with more outputs that keeps the old rows."""
    other = copy.deepcopy(net)
    head = nn.Linear(6, outputs)
    with torch.no_grad():
        head.weight[: net[4].out_features], head.bias[: net[4].out_features] = net[4].weight, net[4].bias
    other[4] = head
    return other


def test_a_head_that_grows_fills_new_outputs(tmp_path):
    small = network(2)
    large = grown(small, 3)
    place = tmp_path / "run.zarr"
    with ntkgen.Snapshots(place, small, X[:4], output="full", precision="float64", num_outputs=3) as snapshots:
        snapshots(small, iteration=0)
        snapshots(large, iteration=1)
    first, second = xarray.open_zarr(place).kernel.values
    logits = xarray.open_zarr(place).logits.values
    assert np.isnan(logits[0, :, 2]).all()
    assert not np.isnan(logits[:, :, :2]).any()
    assert np.array_equal(logits[0, :, :2], logits[1, :, :2])
    expected = ntkgen.ntk(large, X[:4], precision="float64").numpy()
    old = np.tile([True, True, False], 4)
    assert np.isnan(first[~old]).all()
    assert np.isnan(first[:, ~old]).all()
    assert relative_error(first[old][:, old], ntkgen.ntk(small, X[:4], precision="float64")) <= TOLERANCES["float64"]
    assert relative_error(second, expected) <= TOLERANCES["float64"]


def test_a_head_that_grows_beyond_the_array_is_refused(tmp_path):
    small = network(2)
    snapshots = ntkgen.Snapshots(tmp_path / "run.zarr", small, X[:4], output="full")
    with pytest.raises(ShapeError, match="has 3 outputs: expected 2"):
        snapshots(grown(small, 3), iteration=0)
    assert len(snapshots) == 0


def test_contrasts_of_a_growing_head_are_the_first_of_those_in_the_end(tmp_path):
    small = network(2)
    large = grown(small, 3)
    with ntkgen.Snapshots(
        tmp_path / "run.zarr", small, X[:4], output="centered", precision="float64", num_outputs=3
    ) as snapshots:
        first, second = (snapshots(net, iteration=step) for step, net in enumerate((small, large)))
    old = torch.tensor([True, False]).repeat(4)
    expected = ntkgen.ntk(small, X[:4], output="centered", precision="float64")
    assert first[~old].isnan().all()
    assert relative_error(first[old][:, old], expected) <= TOLERANCES["float64"]
    assert relative_error(second[old][:, old], expected) <= TOLERANCES["float64"]  # the old rows of the head are kept


def test_outputs_of_classes_that_were_not_seen_are_nan(tmp_path):
    net = network()
    snapshots = ntkgen.Snapshots(tmp_path / "run.zarr", net, X[:4], output="seen", precision="float64")
    found = snapshots(net, iteration=0, num_seen=2)
    seen = torch.tensor([True, True, False]).repeat(4)
    assert found[~seen].isnan().all()
    expected = ntkgen.ntk(net, X[:4], precision="float64")[seen][:, seen]
    assert relative_error(found[seen][:, seen], expected) <= TOLERANCES["float64"]
    with pytest.raises(InputError, match="Pass `num_seen`"):
        snapshots(net, iteration=1)


def test_a_run_is_continued_and_cut_back(tmp_path):
    place, net = tmp_path / "run.zarr", network()
    with ntkgen.Snapshots(place, net, X[:5]) as snapshots:
        trained(net, lambda net, step: snapshots(net, iteration=step))
    again = ntkgen.Snapshots(place, net, X[:5])
    assert (len(again), again.last_iteration) == (7, 6)
    with pytest.raises(InputError, match="expected one after 6"):
        again(net, iteration=6)
    again.truncate(3)
    assert (len(again), again.last_iteration) == (4, 3)
    again(net, iteration=4)
    assert xarray.open_zarr(place).iteration.values.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"probe": X[1:6]}, "probe"),
        ({"output": "full"}, "output"),
        ({"precision": "float64"}, "precision"),
        ({"per_layer": True}, "layers"),
        ({"labels": [0, 1, 2, 0, 1]}, "notes"),
    ],
)
def test_snapshots_of_something_else_are_refused(tmp_path, change, name):
    place, net = tmp_path / "run.zarr", network()
    ntkgen.Snapshots(place, net, X[:5])(net, iteration=0)
    with pytest.raises(FingerprintError, match=f"{name} differs"):
        ntkgen.Snapshots(place, net, **{"probe": X[:5], **change})


def test_notes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match="`tasks` must have one integer for each of the 5"):
        ntkgen.Snapshots(tmp_path / "run.zarr", network(), X[:5], tasks=[0, 1])
    assert not (tmp_path / "run.zarr").exists()


def test_another_head_is_followed(tmp_path):
    from test_kernel_function import Heads

    torch.manual_seed(0)
    net, x = Heads(), torch.randn(5, 4)
    with ntkgen.Snapshots(tmp_path / "heads.zarr", net, x, output="trace") as snapshots:
        for task in range(2):
            net.task = task
            found = snapshots(net, iteration=task)
            expected = ntkgen.ntk(net, x, output="trace")
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
