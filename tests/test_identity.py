"""A store is of one network: equal parameters do not make equal networks."""

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from cases import Call
from torch import Tensor, nn

import ntkgen
from ntkgen.engine import computation, identity, machine
from ntkgen.engine.machine import environment
from ntkgen.errors import FingerprintError


def network(activation=F.relu, eps=1e-5):
    def forward(self: Call, x: Tensor) -> Tensor:
        return self.out(activation(self.norm(self.body(x))))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Call(forward, body=nn.Linear(4, 6), norm=nn.LayerNorm(6, eps=eps), out=nn.Linear(6, 3))


def samples() -> Tensor:
    return torch.randn(11, 4, generator=torch.Generator().manual_seed(0))


SETTINGS = {"dtypes": ("float32",), "tile_side": 9}
OTHERS = {
    "another activation": lambda: network(torch.tanh),
    "a similar activation": lambda: network(F.relu6),
    "another epsilon": lambda: network(eps=1e-3),
    "a rounded forward pass": lambda: network(lambda h: F.relu(h.bfloat16().to(h.dtype))),
    "a factor in the code": lambda: network(lambda h: 1.001 * F.relu(h)),
}


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "a similar activation"])
def test_a_network_with_the_same_parameters_does_not_get_the_kernel_of_another(name, tmp_path):
    store = ntkgen.compute(network(), samples(), store=tmp_path / "k.zarr", certify=False, **SETTINGS)
    before = store.array[:, :]
    with pytest.raises(FingerprintError, match="another network with the same parameters") as raised:
        ntkgen.compute(OTHERS[name](), samples(), store=tmp_path / "k.zarr", certify=False, **SETTINGS)
    assert "\n" not in str(raised.value)
    again = ntkgen.compute(network(), samples(), store=tmp_path / "k.zarr", certify=False, **SETTINGS)
    assert (again.array[:, :] == before).all()


def test_it_does_not_continue_a_store_whose_rows_are_there_either(tmp_path):
    x, folder = samples(), tmp_path / "k.zarr"
    store = ntkgen.compute(network(), x[:6], x[6:], store=folder, certify=False, **SETTINGS)
    for name in ("diagonal", "logits"):  # the columns alone are known
        shutil.rmtree(folder / name / "c")
    assert store.missing_blocks() == [0, 1]
    with pytest.raises(FingerprintError, match="another network"):
        ntkgen.compute(network(torch.tanh), x[:6], x[6:], store=folder, certify=False, **SETTINGS)
    ntkgen.compute(network(), x[:6], x[6:], store=folder, certify=False, **SETTINGS)


def test_another_machine_may_add_up_in_another_order(tmp_path, monkeypatch):
    """It gets a finished kernel where its logits are the stored ones up to rounding."""
    ntkgen.compute(network(), samples(), store=tmp_path / "k.zarr", certify=False, **SETTINGS)
    here = environment(torch.device("cpu"))
    for module in (identity, machine):
        monkeypatch.setattr(
            module, "environment", lambda *_: dataclasses.replace(here, device_name="another processor")
        )
    nearly = network(lambda h: F.relu(h) * (1 + 1e-5))
    assert ntkgen.compute(nearly, samples(), store=tmp_path / "k.zarr", certify=False, **SETTINGS).is_complete
    with pytest.raises(FingerprintError, match="another network"):
        ntkgen.compute(network(torch.tanh), samples(), store=tmp_path / "k.zarr", certify=False, **SETTINGS)


def test_an_activation_that_no_sample_tells_apart_is_the_same_function(tmp_path):
    ntkgen.compute(network(), samples(), store=tmp_path / "k.zarr", certify=False, **SETTINGS)
    capped = OTHERS["a similar activation"]()  # no unit is above six
    assert ntkgen.compute(capped, samples(), store=tmp_path / "k.zarr", certify=False, **SETTINGS).is_complete


class Body(nn.Module):
    """A network whose activation may be another, with the same parameters."""

    def __init__(self, activation):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.activation = activation

    def forward(self, x):
        return self.out(self.activation(self.body(x)))


def with_one_large_sample(count, at):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    x[at] *= 60
    return x


def test_samples_beyond_the_first_batch_tell_two_networks_apart(tmp_path):
    """A clipped activation is the same one for all samples but the last but one."""
    x, folder = with_one_large_sample(40, -2), tmp_path / "k.zarr"
    ntkgen.compute(Body(F.relu), x, store=folder, certify=False, **SETTINGS)
    with pytest.raises(FingerprintError, match=r"another network.*outputs"):
        ntkgen.compute(Body(nn.Hardtanh(0, 9)), x, store=folder, certify=False, **SETTINGS)


def test_a_store_is_not_continued_by_another_network_whichever_sample_shows_it(tmp_path, monkeypatch):
    """Only a few samples are run again at the start. Another sample differs, and its block is compared later."""
    monkeypatch.setattr(identity, "SPREAD_SAMPLES", 2)
    x, folder = with_one_large_sample(30, 20), tmp_path / "k.zarr"
    store = ntkgen.compute(Body(F.relu), x, store=folder, certify=False, **SETTINGS)
    shutil.rmtree(store.path / "ntk_float32/c/6")  # samples 18 to 20
    with pytest.raises(FingerprintError, match=r"another network.*outputs"):
        ntkgen.compute(Body(nn.Hardtanh(0, 9)), x, store=folder, certify=False, **SETTINGS)
    assert not (store.path / "ntk_float32/c/6").exists()
    assert ntkgen.compute(Body(F.relu), x, store=folder, certify=False, **SETTINGS).is_complete


def test_a_network_with_the_same_outputs_and_other_gradients_is_another(tmp_path):
    folder, x = tmp_path / "k.zarr", with_one_large_sample(11, 3)
    ntkgen.compute(Body(F.relu), x, store=folder, certify=False, **SETTINGS)
    with pytest.raises(FingerprintError, match=r"another network.*gradients"):
        ntkgen.compute(Body(lambda h: F.relu(h.detach()) + 0 * h), x, store=folder, certify=False, **SETTINGS)


@pytest.mark.parametrize("output", ["full", "centered", "trace", "diagonal"])
def test_a_function_whose_gradients_stop_does_not_get_the_finished_kernel_of_another(output, tmp_path):
    """The layers with a rule differ too, so that the plan of the store cannot be repeated."""
    is_cut, model, x = [False], Body(F.tanh), samples()[:, [0, 1, 2, 3, 0, 1]]

    def outputs(module, batch):
        hidden = module.activation(module.body(batch))
        return module.out(hidden.detach() if is_cut[0] else hidden)

    asked = {"store": tmp_path / "k.zarr", "function": outputs, "output": output, "certify": False}
    before = ntkgen.compute(model, x, **asked).read("diagonal")
    is_cut[0] = True
    with pytest.raises(FingerprintError, match=r"another network.*gradients"):
        ntkgen.compute(model, x, **asked)
    is_cut[0] = False
    assert (ntkgen.compute(model, x, **asked).read("diagonal") == before).all()


@pytest.mark.parametrize("output", ["full", "sum", "trace", "diagonal"])
def test_a_finished_kernel_is_that_of_a_network_with_other_rules_and_the_same_gradients(output, tmp_path, monkeypatch):
    """Another machine may leave other parameters to autograd. What counts is the value of the gradients."""
    model, x = Body(F.tanh), samples()[:, [0, 1, 2, 3, 0, 1]]
    asked = {"store": tmp_path / "k.zarr", "output": output, "certify": False}
    ntkgen.compute(model, x, **asked)
    prepare = computation.prepare_kernel
    left = frozenset({"body.weight"})
    with monkeypatch.context() as patched:
        patched.setattr(
            computation, "prepare_kernel", lambda kernel: prepare(dataclasses.replace(kernel, excluded=left))
        )
        assert ntkgen.compute(model, x, **asked).is_complete
