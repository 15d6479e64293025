"""Checkpoints: whole or not at all, plain values only, and refused where they do not fit."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn

import ntkgen
from ntkgen.errors import FingerprintError, ModelError, StoreError
from ntkgen.fingerprints import array_fingerprint, parameter_fingerprint
from ntkgen.training import checkpoint as checkpoints
from ntkgen.training.checkpoint import Checkpoint
from ntkgen.training.recipe import Recipe

RECIPE = Recipe(model="tiny", dataset="digits", data_fingerprint="abc")


def make_checkpoint(model):
    training = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict()}
    return Checkpoint(RECIPE, 3, 99.25, 0.5, False, model.state_dict(), training)


def test_what_was_read_is_written_with_the_same_bytes(tmp_path):
    """However strings and containers are shared: then a training that was interrupted ends with the same bytes."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model(torch.randn(4, 2)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    shared = "".join(["ti", "ny"])  # equal to the recipe's model, and another string
    training = {"optimizer": optimizer.state_dict(), "names": [shared, "tiny", RECIPE.model], "pair": (1, "tiny")}
    checkpoints.save(tmp_path / "a.pt", dataclasses.replace(make_checkpoint(model), training=training))
    checkpoints.save(tmp_path / "b.pt", checkpoints.load(tmp_path / "a.pt"))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_it_comes_back_as_it_was_and_needs_no_pickled_code(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    path = tmp_path / "new folder" / "net.pt"
    checkpoints.save(path, make_checkpoint(model))
    loaded = checkpoints.load(path)
    assert dataclasses.replace(loaded, state={}) == dataclasses.replace(make_checkpoint(model), state={})
    assert all(torch.equal(loaded.state[name], value) for name, value in model.state_dict().items())
    torch.load(path, weights_only=True)
    assert [file.name for file in path.parent.iterdir()] == ["net.pt"]


def test_a_failed_write_keeps_the_old_one(tmp_path, monkeypatch):
    path, model = tmp_path / "net.pt", nn.Linear(2, 3)
    checkpoints.save(path, make_checkpoint(model))
    before = path.read_bytes()

    def fail(values, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(path, make_checkpoint(nn.Linear(2, 3)))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "other"])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "net.pt"
    if content is None:
        torch.save({"weights": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(StoreError, match="is not a checkpoint") as caught:
        checkpoints.load(path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_parameters_is_found(tmp_path):
    path, model = tmp_path / "net.pt", nn.Linear(2, 3)
    checkpoints.save(path, make_checkpoint(model))
    weight, content = model.weight.detach().numpy().tobytes(), bytearray(path.read_bytes())
    content[content.index(weight) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="does not match its checksum"):
        checkpoints.load(path)


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 99)
    checkpoints.save(tmp_path / "net.pt", make_checkpoint(nn.Linear(2, 3)))
    monkeypatch.undo()
    with pytest.raises(StoreError, match="version 99"):
        checkpoints.load(tmp_path / "net.pt")


def test_another_recipe_is_refused_and_named(tmp_path):
    found = make_checkpoint(nn.Linear(2, 3))
    checkpoints.check_recipe(tmp_path, found, RECIPE)
    with pytest.raises(FingerprintError, match=r"batch_size 64, now 32; learning_rate|batch_size 64, now 32"):
        checkpoints.check_recipe(tmp_path, found, dataclasses.replace(RECIPE, batch_size=32))


def test_another_network_is_refused():
    with pytest.raises(FingerprintError, match="does not fit tiny"):
        checkpoints.load_state(nn.Linear(5, 3), make_checkpoint(nn.Linear(2, 3)))


def test_the_parameter_fingerprint_sees_values_buffers_and_what_is_trainable():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    prints = {parameter_fingerprint(model)}
    model[1].running_mean[0] += 1
    prints.add(parameter_fingerprint(model))
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    prints.add(parameter_fingerprint(model))
    model[0].bias.requires_grad_(False)
    prints.add(parameter_fingerprint(model))
    assert len(prints) == 4
    assert parameter_fingerprint(model) in prints


def test_the_array_fingerprint_sees_shape_dtype_and_values():
    x = torch.arange(6.0)
    variants = [x, x.reshape(2, 3), x.double(), x + 1]
    assert len({array_fingerprint(variant) for variant in variants}) == 4
    assert array_fingerprint(x) == array_fingerprint(x.clone())


# what earlier versions have written in stores -------------------------------------------------------------------------


def fixed_network():
    """A module with parameters, frozen and tied ones, buffers and several dtypes, made without random numbers."""
    model = nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Embedding(2, 2).bfloat16(), nn.Linear(3, 2, bias=False)
    )
    model[3].weight.requires_grad_(False)
    for at, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.arange(at, at + tensor.numel()).view(tensor.shape) / 4)
    model.register_parameter("tied", model[0].weight)
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("nothing", torch.empty(0))
    return model


def test_fingerprints_are_those_of_the_first_version():
    expected = "4ab271206549316f61da09cb7a4e7774b12aa8b2102b4a9f79095f060c1823ec"
    assert parameter_fingerprint(fixed_network()) == expected
    arrays = [
        torch.arange(6.0).view(2, 3).T,
        torch.tensor(3),
        torch.tensor([True]),
        torch.empty(0, 2),
        torch.tensor([1 + 2j]),
    ]
    assert array_fingerprint(*arrays) == "5fcbdc2386e840fdae2351ea63db0241eba8ae6ab9989de5447e5bbe59f31ab3"


# what they did not see, or failed at ----------------------------------------------------------------------------------


class Extra(nn.Linear):
    """A module that says more of itself than its tensors."""

    def __init__(self, state):
        super().__init__(2, 2, bias=False)
        nn.init.ones_(self.weight)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_the_parameter_fingerprint_sees_what_a_module_says_of_itself():
    states = [
        None, 1, "1", {"scale": 1.0}, {"scale": 2.0}, [1.0], (1.0,), b"ab", {"a", "b"}, {"t": torch.ones(2)},
        {"t": torch.ones(2).bfloat16()}, {"t": torch.ones(1, 2)}, torch.ones(2), torch.ones(2, dtype=torch.uint8),
    ]  # fmt: skip
    assert len({parameter_fingerprint(Extra(state)) for state in states}) == len(states)
    for state in states:
        assert parameter_fingerprint(Extra(state)) == parameter_fingerprint(copy.deepcopy(Extra(state)))


def test_equal_states_have_equal_fingerprints():
    """Sets whose items come in another order, as in another process, and strings that are one object or two."""
    assert list({0, 8}) != list({8, 0})
    assert parameter_fingerprint(Extra({0, 8})) == parameter_fingerprint(Extra({8, 0}))
    name = "".join(["a", "b"])
    assert parameter_fingerprint(Extra(("ab", "ab"))) == parameter_fingerprint(Extra(("ab", name)))


def test_what_cannot_be_written_down_is_refused():
    with pytest.raises(ModelError, match="get_extra_state"):
        parameter_fingerprint(Extra({"lock": threading.Lock()}))


def test_the_parameter_fingerprint_sees_buffers_that_are_not_saved():
    def network(value, name="scale"):
        model = fixed_network()
        model[1].register_buffer(name, value, persistent=False)
        return model

    one = torch.ones(2)
    models = [fixed_network(), network(one), network(2 * one), network(one, "shift"), network(one.long())]
    models += [network(torch.tensor([1 + 1j])), network(torch.tensor([1 - 1j])), network(None)]
    prints = [parameter_fingerprint(model) for model in models]
    assert len(set(prints[:-1])) == len(models) - 1
    assert prints[-1] == prints[0]  # a buffer with the value None is ignored


def test_a_parameter_that_its_module_does_not_save_is_seen():
    class Forgetful(nn.Linear):
        def state_dict(self, *args, **kwargs):
            return {}

    prints = set()
    for value in (1.0, 2.0):
        model = Forgetful(2, 2)
        nn.init.constant_(model.weight, value)
        nn.init.zeros_(model.bias)
        prints.add(parameter_fingerprint(model))
    assert len(prints) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float16, torch.bool, torch.float8_e5m2])
def test_arrays_of_every_dtype_have_fingerprints(dtype):
    x = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    variants = [x, x[:1], x.T[:, :1], x.to(torch.complex128)]
    assert len({array_fingerprint(variant) for variant in variants}) == 4
    assert array_fingerprint(x) == array_fingerprint(x.clone())


def test_conjugates_and_strides_do_not_change_a_fingerprint():
    z = torch.tensor([[1 + 2j, 3 - 1j]])
    assert array_fingerprint(z.conj()) == array_fingerprint(z.conj().resolve_conj()) != array_fingerprint(z)
    assert array_fingerprint(z.T) == array_fingerprint(z.T.contiguous())


def test_a_batch_in_bfloat16_is_computed(tmp_path):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = nn.Linear(4, 2)
    store = ntkgen.compute(model, x, store=tmp_path / "k.zarr", fsync=False)
    again = ntkgen.compute(model, x.float(), store=tmp_path / "l.zarr", fsync=False)
    assert (store.array[:] == again.array[:]).all()
