"""Runs of streams that are refused: in one line, and before anything is written."""

import json

import pytest
import torch
from torch import nn

from ntkgen.cli import run as command
from ntkgen.continual.presets import expanded
from ntkgen.continual.streaming.aliases import without_aliases
from ntkgen.continual.streaming.run import StreamData, StreamingRun, run_stream
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.data.dataset import Dataset
from ntkgen.errors import FingerprintError, InputError, ModelError, UnknownNameError
from ntkgen.files.place import folder_of

CPU = torch.device("cpu")
RNG = torch.Generator().manual_seed(0)
DATA = StreamData(Dataset("noise", torch.randn(24, 1, 3, 3, generator=RNG), torch.arange(24) % 3, 3))
LINE = ["cl-run", "--stream", "label-permuted", "--samples", "4", "--samples-per-task", "2", "-q"]


class Other(nn.Module):
    """A network that is no chain of layers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(9, 3)

    def forward(self, x):
        return self.inner(x.flatten(1))


def other():
    return Other()


def with_dropout():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3), nn.Dropout(0.5))


def chain(width=4, between=nn.ReLU, is_frozen=False):
    layers = nn.Sequential(nn.Flatten(), nn.Linear(9, width), between(), nn.Linear(width, 3))
    layers[1].weight.requires_grad_(not is_frozen)
    return layers


class Edited(nn.Module):
    """A network whose author exchanges the function of its forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(9, 3)

    def forward(self, x):
        return torch.tanh(self.inner(x.flatten(1)))


Edited.__qualname__ = "Other"


def frozen():
    return chain(is_frozen=True)


def all_frozen():
    return chain().requires_grad_(False)


def settings_of(**values):
    usual = {"dataset": "noise", "model": f"{__name__}:other", "num_samples": 6, "samples_per_task": 3}
    return StreamingSettings(**{**usual, **values})


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"output": "foo"}, UnknownNameError, "foo"),
        ({"output": "index:7"}, InputError, "7"),
        ({"output": "seen"}, InputError, "`output` is seen"),
        ({"precision": "float7"}, UnknownNameError, "float7"),
        ({"method": "upgd_so_global"}, ModelError, "Other"),
        ({"model": f"{__name__}:with_dropout"}, ModelError, "without dropout, found it in the layer '2'"),
    ],
)
def test_nothing_is_written_for_a_run_that_is_not_possible(tmp_path, values, kind, message):
    with pytest.raises(kind, match=message):
        StreamingRun(settings_of(**values), DATA, folder_of(str(tmp_path), fsync=False), CPU)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "seen"], "--output is seen: expected an output map of all classes"),
        (["--output", "foo", "--dry-run"], "Unknown output 'foo'"),
        (["--precision", "float7", "--dry-run"], "Unknown precision 'float7'"),
        (["--method", "finetune"], "--method is finetune, a method of task sequences"),
        (["--stream", "label_permuted_mini_imagenet_stats"], "set --dataset to FILE.npz"),
        (["--seeds", "0", "0"], "--seeds repeats a value: expected each value once, found 0 more than once in 0 0."),
    ],
)
def test_the_command_line_refuses_in_one_line(tmp_path, capsys, options, message):
    assert command([*LINE, *options, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_learner_of_streams_is_not_called_unknown_without_a_stream():
    with pytest.raises(InputError, match="upgd_fo_global, a learner of streams of single samples"):
        expanded({"method": "upgd_fo_global"})
    with pytest.raises(UnknownNameError):
        expanded({"method": "upgd_fo_globl"})


def test_an_alias_without_data_of_its_own_needs_a_file():
    with pytest.raises(InputError, match=r"FILE\.npz"):
        without_aliases({"stream": "label_permuted_mini_imagenet"})
    assert without_aliases({"stream": "label_permuted_mini_imagenet", "dataset": "a.npz"})["dataset"] == "a.npz"


def test_an_unknown_factory_names_only_what_the_module_defines(tmp_path, monkeypatch):
    source = "import torch\nfrom torch.nn import Linear\n\nNET = Linear(9, 3)\n\ndef small():\n    return NET\n"
    (tmp_path / "nets_of_refusals.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnknownNameError, match=r"Known: NET, small\.$"):
        StreamingRun(settings_of(model="nets_of_refusals:big"), DATA, folder_of(str(tmp_path / "run")), CPU)


def test_an_edited_grid_names_the_setting_that_differs(tmp_path, capsys):
    grid = {"stream": "label-permuted", "dataset": "digits", "num_samples": 4, "samples_per_task": 2}
    file, out = tmp_path / "grid.json", str(tmp_path / "out")
    file.write_text(json.dumps({**grid, "seeds": [0], "learners": {"sgd": {}}}))
    assert command(["cl-grid", str(file), "--out", out, "-q"]) == 0
    file.write_text(json.dumps({**grid, "seeds": [1], "learners": {"sgd": {}}}))
    assert command(["cl-grid", str(file), "--out", out, "-q"]) != 0
    assert "found others (seeds [0], now [1])" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["sgd", "upgd_fo_global", "upgd_so_global", "feature_upgd_fo_global", "ewc"])
def test_frozen_parameters_are_used_and_stay_as_they_are(tmp_path, method):
    settings = settings_of(model=f"{__name__}:frozen", method=method)
    before = StreamingRun(settings, DATA, folder_of(str(tmp_path / "new"), fsync=False), CPU).learner.network.member(0)
    found = run_stream(settings, DATA, folder_of(str(tmp_path / "run"), fsync=False), CPU)
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    same = [name for name, values in before.items() if "gate" not in name and torch.equal(values, after[name][0])]
    assert same == ["1.weight"]
    norm = sum(values.square().sum() for name, values in after.items() if name.endswith("weight")).sqrt()
    assert found.weight_l2.values[-1, 0, 0] == pytest.approx(float(norm), rel=0.1)


def test_a_network_whose_weights_are_all_frozen_is_refused(tmp_path):
    with pytest.raises(ModelError, match="found none"):
        StreamingRun(settings_of(model=f"{__name__}:all_frozen"), DATA, folder_of(str(tmp_path), fsync=False), CPU)


@pytest.mark.parametrize(
    ("make", "edited", "message"),
    [
        (chain, lambda: chain(5), r"expected 1\.weight \(4, 9\), found \(5, 9\)"),
        (chain, lambda: chain(between=nn.Tanh), r"2\.__class__ .*ReLU, found .*Tanh"),
        (lambda: chain(between=nn.LeakyReLU), lambda: chain(between=lambda: nn.LeakyReLU(0.2)), "2.negative_slope"),
        (chain, frozen, r"1\.weight\.requires_grad none, found False"),
        (Other, Edited, "forward"),
    ],
)
def test_a_resume_with_an_edited_network_is_refused(tmp_path, monkeypatch, make, edited, message):
    folder, settings = folder_of(str(tmp_path), fsync=False), settings_of(model=f"{__name__}:made")
    monkeypatch.setitem(globals(), "made", make)
    run_stream(settings, DATA, folder, CPU)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run_stream(settings, DATA, folder, CPU)
    monkeypatch.setitem(globals(), "made", edited)
    with pytest.raises(FingerprintError, match=message):
        run_stream(settings, DATA, folder, CPU)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_older_checkpoint_resumes_with_networks_of_its_shapes(tmp_path, monkeypatch):
    folder, settings = folder_of(str(tmp_path), fsync=False), settings_of(model=f"{__name__}:made")
    monkeypatch.setitem(globals(), "made", chain)
    run_stream(settings, DATA, folder, CPU)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["architecture"]
    torch.save(state, tmp_path / "checkpoint.pt")
    run_stream(settings, DATA, folder, CPU)
    for edited in (lambda: chain(5), frozen):
        monkeypatch.setitem(globals(), "made", edited)
        with pytest.raises(FingerprintError, match="another network"):
            run_stream(settings, DATA, folder, CPU)
