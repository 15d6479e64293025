"""Presets: their settings, the quirks of the published code, and the published numbers beside those of a run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import xarray
from test_learner import SETTINGS, blobs, done, nets  # noqa: F401 - nets is a fixture

from ntkgen.cli import run as command
from ntkgen.continual.comparison import compare, published_run
from ntkgen.continual.configuration import METHOD_NAMES, RunSettings
from ntkgen.continual.forecast import Forecast
from ntkgen.continual.methods import METHODS
from ntkgen.continual.metrics.kernels import distance
from ntkgen.continual.metrics.switches import Switches, switches_of
from ntkgen.continual.presets import ALGORITHMS, PRESETS, Preset, preset_of
from ntkgen.continual.published import QUANTITIES, PublishedRun
from ntkgen.errors import UnknownNameError


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Print plans without the projected time, which another file tests."""
    nothing = Forecast(
        step_seconds=0.0, evaluation_seconds=0.0, kernel_seconds=0.0, measured_probe=1, kernel_bytes=0,
        checkpoint_bytes=0,
    )  # fmt: skip
    monkeypatch.setattr("ntkgen.continual.forecast.forecast", lambda *_: nothing)


SUBSET = Path(__file__).parents[2] / "shared/data/cifar100-subset.npz"


def settings_of(name, compatible=False, **given):
    return RunSettings.from_json(preset_of(name).values(given, compatible=compatible))


# settings -------------------------------------------------------------------------------------------------------------


def test_methods_are_listed_by_their_names():
    assert list(METHODS) == list(METHOD_NAMES)
    assert not set(METHOD_NAMES) & set(ALGORITHMS)


@pytest.mark.parametrize("line", [["--method", "continual-backprob"], ["--config", "mine.json"]])
def test_a_misspelt_algorithm_is_told_with_all_methods_and_algorithms(run, tmp_path, line):
    (tmp_path / "mine.json").write_text('{"method": "continual-backprob"}')
    code, _, error = run("cl-run", *line, "--out", "r")
    assert (code, error.count("\n")) == (2, 1)
    assert "Did you mean continual-backprop?" in error
    assert all(name in error for name in (*METHOD_NAMES, *ALGORITHMS))
    assert not (tmp_path / "r").exists()


def test_a_list_of_methods_is_no_method(run, tmp_path):
    (tmp_path / "mine.json").write_text('{"method": ["base", "l2"]}')
    code, _, error = run("cl-run", "--config", "mine.json")
    assert code == 2
    assert "method has a value of the wrong kind" in error


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings_that_exist(name):
    preset = preset_of(name)
    methods = {preset.settings["method"], *preset.by_method, *(run.method for run in preset.runs)}
    for method in methods:
        plain, compatible = (settings_of(name, flag, method=method) for flag in (False, True))
        for quirk in preset.quirks_of(method):
            assert getattr(compatible, quirk.setting) == quirk.value
            assert getattr(plain, quirk.setting) != quirk.value, "a quirk is never the default"
            assert quirk.source
    for run in preset.runs:
        assert run.numbers
        assert set(run.numbers) <= set(QUANTITIES)
        assert run.source


def test_the_preset_of_icarl_has_its_learning_rates():
    settings = settings_of("icarl-cifar100")
    rates = [settings.step_size_at(epoch) for epoch in (0, 48, 49, 62, 63, 69)]
    assert rates == pytest.approx([2, 2, 0.4, 0.4, 0.08, 0.08], rel=1e-12)
    assert (settings.buffer, settings.epochs, settings.batch_size, settings.weight_decay) == (2000, 70, 128, 1e-5)
    assert (settings.momentum, settings.augment, settings.binary_reduction) == (0.9, True, "mean")


def test_the_preset_of_seed_004_has_its_memory_and_its_quirk():
    assert settings_of("resnet-incremental").buffer == 10_000
    assert settings_of("resnet-incremental", method="finetune").momentum == 0.9
    assert settings_of("resnet-incremental", compatible=True, method="finetune").momentum == 0
    assert settings_of("resnet-incremental", compatible=True, method="icarl").momentum == 0.9


def test_heads_grow_where_the_published_ones_do():
    heads = {method: settings_of("resnet-incremental", method=method).head for method in ("finetune", "lwf", "icarl")}
    assert heads == {"finetune": "fixed", "lwf": "growing", "icarl": "growing"}
    assert settings_of("icarl-cifar100").head == "fixed"


def test_the_preset_of_the_course_project():
    settings = settings_of("eth-cifar10", compatible=True)
    found = {name: getattr(settings, name) for name in ("optimizer", "learning_rate", "epochs", "batch_size", "output")}
    assert found == {"optimizer": "adam", "learning_rate": 1e-3, "epochs": 10, "batch_size": 32, "output": "sum"}
    assert 2 * settings.probe_per_class == 10
    assert 10 * settings_of("eth-cifar100").probe_per_class == 10
    assert settings_of("eth-cifar10", method="replay-mixed").replay == 2000
    assert settings_of("eth-cifar100", method="replay-two-pass").replay == 500
    assert settings.normalise == "dataset"


def test_given_settings_override_a_preset_and_its_quirks():
    settings = settings_of("eth-cifar10", compatible=True, epochs=3, output="trace")
    assert (settings.epochs, settings.output, settings.normalise) == (3, "trace", "dataset")


def test_unknown_presets_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean eth-cifar10"):
        preset_of("eth-cifar")


# published numbers ----------------------------------------------------------------------------------------------------


def test_motion_at_switches_by_hand():
    angles = np.array([0, 0.1, 0.4, 0.6, 1.2])  # ends of epochs; the task changes after the second and the fourth
    kernels = np.stack([np.diag([np.cos(angle), np.sin(angle)]) for angle in angles])
    kernels *= np.array([1, 2, 1, 3, 6])[:, None, None]
    found = Switches.of(kernels, np.array([0, 0, 1, 1, 2]))
    S = 1 - np.cos(np.diff(angles))
    assert found.distance_ratio == pytest.approx((S[1] + S[3]) / (S[0] + S[2]))
    assert (found.norm_first, found.norm_before, found.norm_after, found.norm_last) == pytest.approx((1, 2, 1, 6))
    assert found.norm_ratio == pytest.approx((1 / 2 + 6 / 3) / 2)


def test_motion_needs_a_kernel_after_each_epoch():
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((6, 4, 4))
    data = xarray.Dataset(
        {"kernel": (("time", "row", "col"), factors @ factors.transpose(0, 2, 1))},
        {
            "epoch": ("time", [0, 0.5, 1, 2, 3, 4]),
            "task": ("time", [0, 0, 0, 0, 1, 1]),
            "row_task": ("row", [0, 0, 0, 1]),
            "row_sample": ("row", [0, 1, 2, 3]),
        },
    )
    K = data.kernel.values[2:, :2, :2]
    found = switches_of(data, 0, np.array([True, True, False, True]))
    within = [distance(K[0], K[1]), distance(K[2], K[3])]
    assert found.distance_ratio == pytest.approx(distance(K[1], K[2]) / np.mean(within))
    assert switches_of(data.isel(time=[2, 3, 5])) is None
    assert switches_of(data.isel(time=[0, 2, 3])) is None


def test_published_runs_are_found_by_network_and_method():
    run = published_run(preset_of("eth-cifar10"), settings_of("eth-cifar10", model="ntk-rnn", width=100))
    assert run.numbers["distance_ratio"] == 11.5
    assert published_run(preset_of("eth-cifar10"), settings_of("eth-cifar10", width=64)) is None
    seed = preset_of("resnet-incremental")
    assert published_run(seed, settings_of(seed.name, exemplars="herding")) is None
    found = published_run(seed, settings_of(seed.name, method="finetune"))
    assert found.numbers["average_incremental_accuracy"] == pytest.approx(0.230, abs=5e-4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    import sys
    import types

    from test_learner import small

    sys.modules["nets"] = types.SimpleNamespace(small=small)
    try:
        return done(tmp_path_factory.mktemp("run") / "seed0", dataclasses.replace(SETTINGS, dense=None))
    finally:
        del sys.modules["nets"]


def test_a_run_is_compared_with_its_published_numbers(finished):
    numbers = {"average_accuracy": 0.5, "distance_ratio": 2.0}
    published = PublishedRun("nets:small", None, "finetune", numbers, "a paper", seen=(0.9, 0.5, 0.4))
    preset = Preset("mine", "a paper", {**SETTINGS.to_json(), "dense": 64}, runs=(published,))
    found = compare(preset, finished)
    assert found.differences == ()
    assert found.numbers["average_accuracy"] == finished.matrix().average_accuracy
    assert found.numbers["distance_ratio"] > 0
    assert found.seen[-1] == pytest.approx(finished.matrix().average_accuracy)
    text = "\n".join(found.lines())
    assert "distance at switches / within" in text
    assert "0.900 0.500 0.400" in text
    assert "not comparable" not in text
    other = dataclasses.replace(preset, settings={**preset.settings, "epochs": 10, "output": "sum"})
    assert compare(other, finished).differences == ("epochs 2, published 10", "output trace, published sum")
    fewer = dataclasses.replace(preset, settings={**preset.settings, "num_tasks": 2})
    assert compare(fewer, finished).differences == ("num_tasks not set, published 2",)
    assert "not comparable: epochs 2, published 10" in "\n".join(compare(other, finished).lines())
    accuracies = dataclasses.replace(published, numbers={"average_accuracy": 0.5})
    assert compare(dataclasses.replace(other, runs=(accuracies,)), finished).differences == ("epochs 2, published 10",)
    assert compare(dataclasses.replace(preset, runs=()), finished) is None


# the command ----------------------------------------------------------------------------------------------------------


def dry(*line):
    return command(["cl-run", "--dry-run", *line])


def test_a_dry_run_prints_the_configuration_of_a_preset(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"epochs": 4, "batch_size": 16, "dataset": "digits", "split": "5/5"}))
    line = ["--preset", "eth-cifar10", "--config", str(file), "--bs", "8", "--out", str(tmp_path)]
    assert dry(*line, "--json") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert [settings[name] for name in ("epochs", "batch_size", "normalise", "width")] == [4, 8, "dataset", 1000]
    assert dry(*line, "--compat", "published", "--no-freeze-batch-norm") == 0
    page = capsys.readouterr().out
    assert "probe rule first (as published)" in page
    assert "freeze batch norm yes (published, not used)" in page
    assert "Settings: " in page
    assert "; learning rate 0.001; " in page


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (["--preset", "eth"], "Unknown preset 'eth'"),
        (["--compat", "published"], "--compat reproduces the published code of a preset"),
        (["--config", "FILE"], "expected JSON"),
    ],
)
def test_bad_presets_are_one_line_and_code_2(tmp_path, capsys, line, match):
    (tmp_path / "file.json").write_text("[1")
    assert dry(*(str(tmp_path / "file.json") if part == "FILE" else part for part in line)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert match in error


@pytest.mark.slow
@pytest.mark.skipif(not SUBSET.exists(), reason="needs the subset of CIFAR-100 in ../shared/data")
@pytest.mark.parametrize("name", ["icarl-cifar100", "resnet-incremental", "eth-cifar100"])
def test_presets_of_cifar100_run_on_its_subset(tmp_path, capsys, name):
    line = [
        "cl-run",
        "--preset",
        name,
        "--dataset",
        str(SUBSET),
        "--tasks",
        "2",
        "--epochs",
        "1",
        "--out",
        str(tmp_path),
    ]
    small = ["--buffer", "40", "--split", "2/2"]
    assert command([*line, *small, "-q"]) == 0
    page = capsys.readouterr().out
    assert "published by" in page
