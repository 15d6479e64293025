"""Checkpoints: whole or not at all, plain values only, and refused where they do not fit."""

import dataclasses

import pytest
import torch
from torch import nn

from ntkgen import checkpoint as checkpoints
from ntkgen.checkpoint import Checkpoint, Recipe, array_fingerprint, parameter_fingerprint
from ntkgen.errors import FingerprintError, StoreError

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
