"""Samples of any form from the command line: named inputs in `.npz` files, selected outputs, chosen parameters."""

import json

import numpy as np
import pytest
import torch

import ntkgen
from ntkgen.data.dataset import load
from ntkgen.errors import DataError
from ntkgen.training.zoo import build

RNG = np.random.default_rng(0)
IDS, MASK = RNG.integers(0, 9, (8, 4)), np.repeat([[1, 1, 1, 1], [1, 1, 0, 0]], 4, axis=0)
NETWORK = """
import torch
from torch import nn

class Lm(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 9)

    def forward(self, input_ids, attention_mask):
        kept = attention_mask[..., None].to(self.head.weight.dtype)
        mean = (self.table(input_ids) * kept).cumsum(1) / kept.cumsum(1)
        return {"logits": self.head(torch.tanh(self.mix(mean))), "hidden": mean}

def plain():
    return nn.Linear(3, 2)
"""
COMMAND = ["compute", "--models", "nets:Lm", "--dataset", "prompts.npz", "--device", "cpu", "--select"]
COMMAND += ["logits[:, -1, [5, 7]]", "--params", "mix.*", "head.*", "!*bias", "--dtype", "float64", "--precision"]
COMMAND += ["float64"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(NETWORK)
    np.savez("prompts.npz", input_ids=IDS, attention_mask=MASK, y=RNG.random(8))
    return tmp_path


def test_a_part_of_a_network_of_named_inputs(folder, run):
    code, out, err = run(*COMMAND, "--json", "-q")
    assert (code, err) == (0, "")
    done = json.loads(out)
    store = ntkgen.open(done["store"])
    model = build("nets:Lm", 1, seed=0)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    asked = {"select": "logits[:, -1, [5, 7]]", "params": ["mix.*", "head.*", "!*bias"]}
    expected = ntkgen.reference_ntk(model, batch, **asked).numpy()
    np.testing.assert_allclose(store.array[...], expected, rtol=1e-10, atol=1e-12)
    assert {name: done["provenance"][name] for name in asked} == asked
    assert store.manifest.identity["inputs"] == ["attention_mask", "input_ids"]
    assert store.read("row_label").tolist() == [-1] * 16
    code, out, err = run("verify", done["store"], "--recompute", 1)
    assert code == 0, err
    code, out, err = run("info", done["store"])
    assert "mix.*, head.*, !*bias" in out
    assert run(*COMMAND, "--explain")[0] == 0
    others = run(*COMMAND[:8], "logits[:, 0, :2]", "--json", "-q")
    assert json.loads(others[1])["store"] != done["store"]


def test_it_is_continued_after_an_interruption(folder, run, monkeypatch):
    from ntkgen.store.store import KernelStore

    commit, calls = KernelStore.commit, []

    def killed(self, tile, values):
        calls.append(tile)
        if len(calls) == 3:
            raise KeyboardInterrupt
        commit(self, tile, values)

    with monkeypatch.context() as patch:
        patch.setattr(KernelStore, "commit", killed)
        assert run(*COMMAND, "--tile", 4, "-q")[0] != 0
    (path,) = folder.glob("runs/*.zarr")
    assert len(ntkgen.open(path).missing_tiles()) > 0
    assert run(*COMMAND, "--tile", 4, "-q")[0] == 0
    assert ntkgen.open(path).is_complete


BAD = {
    "selects nothing": (["--select", "logits[:, 9:]"], "No output is selected"),
    "no such output": (["--select", "logit"], "found a dict with logits, hidden"),
    "not read": (["--select", "logits.sum()"], "cannot be read"),
    "no such parameter": (["--select", "logits", "--params", "haed.*"], "Names that are close: head"),
    "trained": (["--select", "logits", "--epochs", "3"], "cannot be trained on prompts.npz"),
    "network of the zoo": (["--models", "lenet"], "Set --epochs 0"),
    "different axes": (["--dataset", "axes.npz", "--select", "logits"], "input_ids: 8, attention_mask: 7"),
    "without names": (["--dataset", "unnamed.npz", "--select", "logits"], "no named inputs"),
    "text": (["--dataset", "text.npz"], "holds no samples"),
    "not finite": (["--dataset", "nan.npz"], "the first in sample 2"),
    "integers": (["--models", "nets:plain", "--dataset", "integers.npz"], "floating-point numbers instead of integers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(folder, run, case):
    np.savez("axes.npz", input_ids=IDS, attention_mask=MASK[:7])
    np.savez("unnamed.npz", IDS, MASK)
    np.savez("text.npz", input_ids=IDS.astype(str))
    np.savez("nan.npz", x=np.where(np.arange(8)[:, None] == 2, np.nan, 1.0))
    np.savez("integers.npz", x=np.arange(24).reshape(8, 3))
    given, message = BAD[case]
    network = [] if "--models" in given else ["--models", "nets:Lm"]
    options = ["compute", "--dataset", "prompts.npz", *network, "--device", "cpu", *given]
    code, _, err = run(*options)
    assert code == 2
    assert err.count("\n") == 1
    assert message in err
    assert not list(folder.glob("runs/*.zarr")) + list(folder.glob("runs/*.pt"))


def test_one_array_of_any_shape_with_targets(folder, run):
    x = RNG.random((6, 3), dtype=np.float32)
    np.savez("points.npz", x=x, y=RNG.random((6, 2)))
    data = load("points.npz", any_form=True)
    assert (data.num_classes, data.is_trainable) == (2, False)
    assert torch.equal(data.arguments(torch.arange(6)), torch.from_numpy(x))
    code, out, _ = run("compute", "--models", "nets:plain", "--dataset", "points.npz", "--json", "-q", "--no-certify")
    assert code == 0
    store = ntkgen.open(json.loads(out)["store"])
    np.testing.assert_allclose(store.array[...], ntkgen.ntk(build("nets:plain", 2, seed=0), x), rtol=1e-5)


def test_images_and_labels_are_a_data_set_as_before(tmp_path):
    x, y = np.ones((3, 1, 2, 2), np.float32), np.arange(3)
    np.savez(tmp_path / "images.npz", x=x, y=y)
    data = load(str(tmp_path / "images.npz"), any_form=True)
    assert data.arrays == {}
    assert data.is_trainable
    assert data.fingerprint() == load(str(tmp_path / "images.npz")).fingerprint()


def test_other_commands_take_images_alone(folder):
    with pytest.raises(DataError, match="no array x"):
        load("prompts.npz")


def test_wrong_input_in_a_late_sample_leaves_no_store_and_the_same_command_works_after_it_is_corrected(folder, run):
    ids = np.resize(IDS, (60, 4))
    wrong = ids.copy()
    wrong[58, 0] = 9  # the table has 9 rows
    command = ["compute", "--models", "nets:Lm", "--dataset", "late.npz", "--device", "cpu", "--epochs", 0, "-q"]
    command += ["--select", "logits[:, -1, :1]", "--params", "mix.*", "--no-certify", "--json"]
    np.savez("late.npz", input_ids=wrong, attention_mask=np.ones((60, 4)))
    code, _, err = run(*command)
    assert code == 2
    assert "IndexError" in err
    assert not [path.name for path in folder.rglob("*.zarr*")]
    np.savez("late.npz", input_ids=ids, attention_mask=np.ones((60, 4)))
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert run("verify", json.loads(out)["store"], "--recompute", 1)[0] == 0
