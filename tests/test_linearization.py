"""The lazy error: zero for a network that is linear in its parameters, by definition elsewhere, and bit-exact."""

import copy

import numpy as np
import pytest
import torch
import xarray
from torch import nn
from torch.func import functional_call, jvp

import ntkgen
from ntkgen.continual.linearization import LazyError
from ntkgen.continual.metrics.kernels import distance
from ntkgen.training import zoo

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
NAMES = ("lazy_error", "lazy_error_from_start", "buffer_drift")


def network(outputs=3, *, frozen=False):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Tanh())
    return nn.Sequential(backbone.requires_grad_(not frozen), nn.Linear(6, outputs))


def moved(net, size=0.1, *, buffers=False, seed=1):
    """Change the trained parameters, and the statistics of batch norm."""
    other, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in other.parameters():
            if param.requires_grad:
                param.add_(size * torch.randn(param.shape, generator=generator))
        if buffers:
            other[0][1].running_mean += size
    return other


def outputs_of(net, x=X):
    with torch.no_grad():
        return copy.deepcopy(net).eval().double()(x.double())


def measured(nets):
    lazy = LazyError(nets[0], X, torch.float64)
    return [lazy.measure(net, outputs_of(net), is_first=not time) for time, net in enumerate(nets)]


def expected(before, after):
    """The lazy error by its definition, with the parameters as the only change."""
    net = copy.deepcopy(before).eval().double()
    params = {name: param.detach() for name, param in net.named_parameters()}
    tangents = {name: param.detach().double() - params[name] for name, param in after.named_parameters()}
    first, linear = jvp(lambda values: functional_call(net, values, (X.double(),)), (params,), (tangents,))
    change = functional_call(net, {name: params[name] + tangents[name] for name in params}, (X.double(),)) - first
    return float((change - linear).norm() / change.norm())


def test_the_lazy_error_is_that_of_its_definition():
    nets = [network()]
    for seed in (1, 2):
        nets.append(moved(nets[-1], buffers=True, seed=seed))
    first, second, third = measured(nets)
    assert all(np.isnan(first[name]) for name in NAMES)
    assert second["lazy_error"] == second["lazy_error_from_start"] == pytest.approx(expected(*nets[:2]), rel=1e-9)
    assert third["lazy_error"] == pytest.approx(expected(*nets[1:]), rel=1e-9)
    assert third["lazy_error_from_start"] == pytest.approx(expected(nets[0], nets[2]), rel=1e-9)
    held = copy.deepcopy(nets[2])
    held[0][1].running_mean.copy_(nets[1][0][1].running_mean)
    drift, change = outputs_of(nets[2]) - outputs_of(held), outputs_of(nets[2]) - outputs_of(nets[1])
    assert third["buffer_drift"] == pytest.approx(float(drift.norm() / change.norm()), rel=1e-9)


def test_a_network_that_trains_its_head_alone_is_linear():
    net = network(frozen=True)
    last = measured([net, moved(net, size=3.0)])[1]
    assert last["lazy_error"] < 1e-12
    assert last["buffer_drift"] == 0
    assert measured([network(), moved(network())])[1]["lazy_error"] > 1e-3


def test_the_lazy_error_falls_with_the_step():
    errors = [measured([network(), moved(network(), size)])[1]["lazy_error"] for size in (1e-3, 1e-2)]
    assert errors[1] / errors[0] == pytest.approx(10, rel=0.2)  # the error is of second order


def test_outputs_that_existed_before_are_compared_when_a_head_grows():
    small = network(2)
    after = moved(small)
    grown = copy.deepcopy(after)
    grown[1] = nn.Linear(6, 3)
    with torch.no_grad():
        grown[1].weight[:2], grown[1].bias[:2] = after[1].weight, after[1].bias
    found, plain = measured([small, grown])[1], measured([small, after])[1]
    assert found["lazy_error"] == pytest.approx(plain["lazy_error"], rel=1e-9)
    assert found["buffer_drift"] == pytest.approx(0, abs=1e-12)
    later = measured([small, grown, moved(grown)])[2]
    assert 0 < later["lazy_error"] < 1
    shrunk = measured([grown, small])[1]
    assert np.isnan(shrunk["lazy_error"])


def test_a_network_that_has_not_moved_has_no_lazy_error():
    assert all(np.isnan(value) for value in measured([network(), network()])[1].values())


def test_snapshots_record_it_and_continue_with_the_same_bits(tmp_path):
    nets = [network()]
    for seed in range(3):
        nets.append(moved(nets[-1], buffers=True, seed=seed))
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    for place, restart in (("a", 9), ("b", 2)):
        snapshots = ntkgen.Snapshots(tmp_path / place, nets[0], X, lazy_error=True)
        for time, net in enumerate(nets):
            if time == restart:
                state = snapshots.state_dict()
                torch.save(state, tmp_path / "state.pt")
                snapshots = ntkgen.Snapshots(tmp_path / place, nets[0], X, lazy_error=True)
                snapshots.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            snapshots(net, iteration=time)
        snapshots.series.sync()
    one, other = (xarray.open_zarr(tmp_path / place) for place in "ab")
    for name in NAMES:
        assert np.array_equal(one[name].values, other[name].values, equal_nan=True)
        assert not np.isnan(one[name].values[1:]).any()
        assert one[name].attrs["units"] == "1"
    assert one.lazy_error.values[2] == pytest.approx(expected(nets[1], nets[2]), rel=1e-3)
    for net, state in zip(nets, before, strict=True):
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    assert all(net.training for net in nets)


def test_a_group_that_was_begun_without_it_is_continued_without_it(tmp_path):
    net = network()
    ntkgen.Snapshots(tmp_path / "a", net, X)(net, iteration=0)
    ntkgen.Snapshots(tmp_path / "a", net, X, lazy_error=True)(moved(net), iteration=1)
    assert "lazy_error" not in xarray.open_zarr(tmp_path / "a")
    ntkgen.Snapshots(tmp_path / "b", net, X, lazy_error=True)(net, iteration=0)
    ntkgen.Snapshots(tmp_path / "b", net, X)(moved(net), iteration=1)
    ntkgen.Snapshots(tmp_path / "b", net, X, lazy_error=True)(moved(net), iteration=2)  # the first time is not known
    assert np.isnan(xarray.open_zarr(tmp_path / "b").lazy_error_from_start.values).all()


@pytest.mark.slow
def test_wide_networks_in_ntk_parametrization_are_lazy():
    x, y = torch.randn(12, 48, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 4
    motion = []
    for width in (32, 128, 512):
        net = zoo.build("mlp", 4, seed=0, width=width, parametrization="ntk", inputs=48)
        kernel, lazy = ntkgen.KernelFunction(net, x, output="trace"), LazyError(net, x, torch.float64)
        before = kernel(net).double().numpy()
        lazy.measure(net, outputs_of(net, x), is_first=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        error = lazy.measure(net, outputs_of(net, x), is_first=False)["lazy_error_from_start"]
        motion.append((distance(before, kernel(net).double().numpy()), error))
    distances, errors = zip(*motion, strict=True)
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0
    assert errors[0] > 1.4 * errors[1] > 1.4**2 * errors[2] > 0
