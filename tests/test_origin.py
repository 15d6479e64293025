"""What a store was made of is found again, or it is said why not."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ntkgen
from ntkgen import cli
from ntkgen.errors import DataError, FingerprintError, StoreError
from ntkgen.fingerprints import parameter_fingerprint
from ntkgen.origin import load_origin
from ntkgen.training import checkpoint as checkpoints
from ntkgen.training import zoo

FAST = ["compute", "--epochs", "0", "--subsample", "5", "--no-certify", "--json"]


@pytest.fixture
def compute(capsys, tmp_path, monkeypatch):
    """Compute a kernel in an empty folder, and open it."""
    monkeypatch.chdir(tmp_path)

    def run_command(*args):
        assert cli.run([*FAST, *args]) == 0
        return ntkgen.open(json.loads(capsys.readouterr().out)["store"])

    return run_command


@pytest.mark.parametrize(
    "options",
    [
        ["--models", "logistic"],
        ["--models", "logistic", "--shuffle-seed", "3"],
        ["--models", "resnet9", "--width", "4", "--seed", "2"],
        ["--models", "logistic", "--output", "centered"],
    ],
)
def test_network_and_samples_are_found_again(compute, options):
    store = compute(*options)
    origin = load_origin(store)
    assert parameter_fingerprint(origin.model) == store.manifest.identity["parameters"]
    assert origin.inputs.fingerprint() == store.manifest.identity["samples"]


def test_images_of_their_own_size_are_known_by_the_checkpoint(compute, tmp_path):
    Path("rawnets.py").write_text("from torch import nn\nnet = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    assert load_origin(compute("--models", "rawnets:net", "--raw-images")).inputs.x.shape == (5, 1, 8, 8)


def test_a_file_is_looked_for_in_the_folder_that_is_named(compute, tmp_path):
    images = np.random.default_rng(0).random((8, 3, 32, 32)).astype(np.float32)
    np.savez("own.npz", x=images, y=np.arange(8) % 4)
    store = compute("--models", "logistic", "--dataset", "own.npz")
    assert load_origin(store).inputs.x.shape == (5, 3, 32, 32)
    (tmp_path / "moved").mkdir()
    Path("own.npz").rename("moved/own.npz")
    with pytest.raises(DataError, match=r"own\.npz is missing.*`data_dir`"):
        load_origin(store)
    assert load_origin(store, tmp_path / "moved").inputs.x.shape == (5, 3, 32, 32)
    assert load_origin(store, dataset="moved/own.npz").inputs.x.shape == (5, 3, 32, 32)
    np.savez("own.npz", x=images + 1, y=np.arange(8) % 4)
    with pytest.raises(FingerprintError, match="loaded samples are not those of"):
        load_origin(store)


def test_a_trained_network_is_of_its_data(compute):
    store = compute("--models", "logistic")
    file = next(Path("runs").glob("*.pt"))
    made = checkpoints.load(file)
    other = dataclasses.replace(made.recipe, num_epochs=1, data_fingerprint="0" * 64)
    checkpoints.save(file, dataclasses.replace(made, recipe=other))
    with pytest.raises(FingerprintError, match="not the one of the checkpoint"):
        load_origin(store)


def changed(store, **identity):
    manifest = dataclasses.replace(store.manifest, identity={**store.manifest.identity, **identity})
    return type(store)(store.folder, store.group, manifest)


def test_other_samples_are_refused(compute):
    with pytest.raises(FingerprintError, match="loaded samples are not those of"):
        load_origin(changed(compute("--models", "logistic"), samples="0" * 64))


def test_a_checkpoint_that_has_gone_is_named(compute):
    store = compute("--models", "logistic")
    next(Path("runs").glob("*.pt")).unlink()
    with pytest.raises(StoreError, match="expected its checkpoint at"):
        load_origin(store)


def test_a_store_made_in_python_says_that_it_cannot_be_found_again(tmp_path):
    model = zoo.build("logistic", 10, seed=0)
    store = ntkgen.compute(model, torch.randn(3, 3, 32, 32), store=tmp_path / "k.zarr", certify=False)
    with pytest.raises(StoreError, match="Was it made in Python"):
        load_origin(store)
