"""Incremental CIFAR-100: its published configurations, its algorithms in a run, and its tree of results."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from cases import chosen
from killing import Killed
from test_cumulative import SETTINGS as CUMULATIVE
from test_cumulative import blobs, logged, nets  # noqa: F401 - nets is a fixture
from test_learner import require_equal

from ntkgen.cli import run as command
from ntkgen.cli.cl_preset import chosen_runs
from ntkgen.continual import run as at_work
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.learner import learn
from ntkgen.continual.plan import Plan
from ntkgen.continual.presets import ALGORITHMS, expanded, preset_of
from ntkgen.continual.published_config import FOLDER, NAMES, PRESET, seed_of_index, translated
from ntkgen.continual.reading import open_run
from ntkgen.continual.results_tree import curves, indices, write_results_tree
from ntkgen.continual.run import Run
from ntkgen.continual.streams.incremental import make_stream
from ntkgen.continual.surgery import SURGERIES
from ntkgen.errors import InputError, StoreError
from ntkgen.files.folder import LocalFolder

CPU = torch.device("cpu")
SETTINGS = dataclasses.replace(
    CUMULATIVE, select="best", validation_per_class=5, replacement_rate=0.02, maturity=2, redo_period=4, noise_std=1e-3
)


def of_algorithm(name, **others):
    values = {**SETTINGS.to_json(), **others, "method": name}
    return RunSettings.from_json({**values, **expanded({"method": name})})


def done(place, settings):
    return learn(Plan.of(settings, blobs()), LocalFolder(place, fsync=False), CPU)


def config(**changes):
    values = json.loads((FOLDER / "base_deep_learning_system.json").read_text())
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


# configurations -------------------------------------------------------------------------------------------------------


def test_the_published_configurations_differ_as_published():
    files = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in NAMES}
    shared = {"stepsize": 0.1, "momentum": 0.9, "weight_decay": 0.0005, "num_workers": 12, "early_stopping": True}
    assert sorted(files) == [
        "base_deep_learning_system", "continual_backpropagation", "head_resetting", "retrained_network",
        "shrink_and_perturb",
    ]  # fmt: skip
    for values in files.values():
        assert {key: values[key] for key in shared} == shared
    base = files.pop("base_deep_learning_system")
    differing = {
        name: {key: value for key, value in values.items() if base.get(key) != value} for name, values in files.items()
    }
    assert differing == {
        "continual_backpropagation": {
            "use_cbp": True, "replacement_rate": 1e-5, "utility_function": "contribution", "maturity_threshold": 1000,
        },
        "head_resetting": {"reset_head": True},
        "retrained_network": {"reset_network": True},
        "shrink_and_perturb": {"noise_std": 1e-5},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_deep_learning_system", ()),
        ("continual_backpropagation", ("continual-backprop",)),
        ("head_resetting", ("reset-head",)),
        ("retrained_network", ("reset-network",)),
        ("shrink_and_perturb", ("perturb",)),
    ],
)
def test_a_published_configuration_is_a_run_of_the_preset(name, expected):
    found = translated(json.loads((FOLDER / f"{name}.json").read_text()), name)
    settings = RunSettings.from_json(preset_of(PRESET).values(found.settings))
    assert settings.surgery == expected
    assert (found.name, found.data_path, found.results) == (name, None, None)
    assert (settings.learning_rate, settings.momentum, settings.weight_decay) == (0.1, 0.9, 5e-4)
    assert (settings.select, settings.epochs, settings.batch_size, settings.split) == ("best", 200, 90, "5/5")
    assert (settings.replacement_rate, settings.maturity, settings.noise_std) == (1e-5, 1000, 1e-5)
    assert (settings.activation_mean, settings.full_reset, settings.augment_evaluation) == ("ema", True, False)
    compatible = RunSettings.from_json(preset_of(PRESET).values(found.settings, compatible=True))
    assert (compatible.activation_mean, compatible.full_reset, compatible.augment_evaluation) == ("sum", False, True)


def test_a_configuration_may_have_comments_and_defaults():
    given = {"stepsize": 0.2, "momentum": 0.0, "weight_decay": 0.0, "_why_": 3, "note_": "x", "reset_head": True}
    found = translated(given, "mine")
    assert found.settings == {
        "learning_rate": 0.2, "weight_decay": 0.0, "momentum": 0.0, "select": "last", "surgery": ("reset-head",),
    }  # fmt: skip
    both = translated({**given, "reset_network": True, "results_dir": "r", "experiment_name": "e"}, "mine")
    assert both.settings["surgery"] == ("reset-network",)
    assert (both.name, str(both.results), len(both.ignored)) == ("e", "r", 1)


def test_a_configuration_has_the_published_defaults():
    """L01: what a file does not say."""
    required = {"stepsize": 0.2, "momentum": 0.5, "weight_decay": 0.0}
    assert translated(required, "mine").settings == {
        "learning_rate": 0.2, "momentum": 0.5, "weight_decay": 0.0, "select": "last", "surgery": (),
    }  # fmt: skip
    found = translated({**required, "use_cbp": True, "replacement_rate": 1e-4, "maturity_threshold": 7}, "mine")
    assert found.settings["surgery"] == ("continual-backprop",)
    assert (found.settings["unit_utility"], found.settings["maturity"]) == ("weight", 7)
    assert (found.name, found.data_path, found.results, found.ignored) == ("mine", None, None, ())


def test_algorithms_of_one_index_see_the_same_classes_and_other_indices_others():
    """L03: the same class order and the same held-out samples in all five configurations."""
    labels = np.tile(np.arange(100), 60)
    orders, held_out = {}, {}
    for index in (0, 1):
        for name in NAMES:
            (settings,) = chosen_runs(None, None, FOLDER / f"{name}.json", {}, index).sweep.runs.values()
            stream = make_stream(settings.stream_settings, labels, labels, 100, settings.seed)
            orders[index, name] = stream.order
            held_out[index, name] = [task.validation.tolist() for task in stream.tasks]
    for found in (orders, held_out):
        for index in (0, 1):
            assert all(found[index, name] == found[index, NAMES[0]] for name in NAMES)
        assert found[0, NAMES[0]] != found[1, NAMES[0]]
    assert orders[0, NAMES[0]] == tuple(np.random.RandomState(seed_of_index(0)).permutation(100).tolist())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"step_size": 0.1}, "unknown key 'step_size'.* Did you mean stepsize"),
        ({"weight_decay": None}, "has no 'weight_decay'"),
        ({"noise_std": 0}, "'noise_std' has a value of the wrong kind: expected float, found 0"),
        ({"use_cbp": 1}, "'use_cbp' has a value of the wrong kind: expected bool"),
        ({"use_cbp": True, "replacement_rate": 1e-5}, "`use_cbp` needs a `maturity_threshold`"),
        (
            {"use_cbp": True, "replacement_rate": 1e-5, "maturity_threshold": 9, "utility_function": "x"},
            "`utility_function` 'x' is unknown",
        ),
    ],
)
def test_configurations_that_cannot_be_are_refused(tmp_path, capsys, changes, match):
    with pytest.raises(InputError, match=match):
        translated(config(**changes), "base")
    (tmp_path / "mine.json").write_text(json.dumps(config(**changes)))
    assert command(["cl-run", "--config", str(tmp_path / "mine.json"), "--out", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_the_seed_of_an_index_is_the_published_one():
    table = torch.randperm(100_000, generator=torch.Generator().manual_seed(42))
    assert [seed_of_index(index) for index in (0, 7)] == [int(table[0]), int(table[7])]
    assert seed_of_index(0) != seed_of_index(1)
    with pytest.raises(InputError, match="no experiment index -1"):
        seed_of_index(-1)


# algorithms in a run --------------------------------------------------------------------------------------------------


def test_step_then_continual_backprop_then_noise(tmp_path, monkeypatch):
    order = []
    settings = dataclasses.replace(SETTINGS, surgery=("perturb", "continual-backprop"))
    run = Run(Plan.of(settings, blobs()), LocalFolder(tmp_path), CPU)
    for name, surgery in run.surgeries.items():
        monkeypatch.setattr(surgery, "after_step", lambda features, name=name: order.append((name, len(features))) or 0)
    monkeypatch.setattr(run.optimizer, "step", lambda *_, **__: order.append(("step", None)))
    run.train_on(run.plan.stream.tasks[0].train[:16])
    assert order == [("step", None), ("continual-backprop", 1), ("perturb", 1)]


@pytest.mark.parametrize("surgery", ["perturb", "continual-backprop"])
def test_a_surgery_that_does_nothing_changes_no_bit(tmp_path, surgery):
    off = dataclasses.replace(SETTINGS, surgery=(surgery,), noise_std=0.0, replacement_rate=0.0)
    done(tmp_path / "off", off)
    done(tmp_path / "plain", SETTINGS)
    found, expected = (torch.load(tmp_path / name / "models/task2.pt", weights_only=True) for name in ("off", "plain"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_units_are_replaced_and_logged(tmp_path):
    done(tmp_path, of_algorithm("continual-backprop"))
    replaced = [line["replaced"] for line in logged(tmp_path, "epoch")]
    steps = [line["iteration"] for line in logged(tmp_path, "epoch")]
    # 16 units × 0.02 = 0.32 at each step after the second, while all of them are eligible
    assert 0.5 * 0.32 * steps[-1] <= sum(replaced) <= 0.32 * steps[-1]


@pytest.mark.parametrize(("name", "changed"), [("reset-head", {"5"}), ("reset-network", {"2", "3", "5"})])
def test_a_reset_is_kept_beside_the_parameters_before_it(tmp_path, name, changed):
    done(tmp_path, of_algorithm(name))
    before, after = (torch.load(tmp_path / f"models/{part}.pt", weights_only=True) for part in ("task0", "task0-reset"))
    assert {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])} == changed
    assert not (tmp_path / "models/task2-reset.pt").exists()


def require_same_when_killed(folder, monkeypatch, algorithm, moments):
    """Kill a run after some iterations of each process, and compare its end with that of an undisturbed one."""
    settings = of_algorithm(algorithm)
    done(folder / "straight", settings)
    monkeypatch.setattr(at_work, "COMMIT_SECONDS", 0.0)  # a checkpoint after every iteration
    for moment in moments:
        count = iter(range(10**6))

        def step(run, ids, *, frozen=False, real=Run.train_on, count=count, moment=moment):
            if next(count) == moment:
                raise Killed
            return real(run, ids, frozen=frozen)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "train_on", step)
            with pytest.raises(Killed):
                done(folder / "killed", settings)
    done(folder / "killed", settings)
    assert (folder / "killed/log.jsonl").read_bytes() == (folder / "straight/log.jsonl").read_bytes()
    for name in ("models/task2.pt", "models/task1-last.pt"):
        found, expected = (torch.load(folder / run / name, weights_only=True) for run in ("killed", "straight"))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    require_equal(folder / "killed", folder / "straight")  # evaluations and kernels, and the state
    for number, run in enumerate(("killed", "straight")):
        write_results_tree(LocalFolder(folder / "tree"), open_run(folder / run), number, {})
    for path in (folder / "tree").glob("*/index-0.npy"):
        np.testing.assert_array_equal(np.load(path), np.load(path.with_name("index-1.npy")), err_msg=str(path))


@pytest.mark.parametrize("algorithm", chosen(ALGORITHMS, ["continual-backprop", "shrink-and-perturb"]))
def test_a_killed_run_of_every_algorithm_ends_like_an_undisturbed_one(tmp_path, monkeypatch, algorithm):
    require_same_when_killed(tmp_path, monkeypatch, algorithm, (5, 14, 3))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_of_every_algorithm_may_be_killed_ten_times(tmp_path, monkeypatch, algorithm):
    seed = list(ALGORITHMS).index(algorithm)
    moments = np.random.default_rng(seed).integers(1, 8, size=10).tolist()  # 84 iterations in all
    require_same_when_killed(tmp_path, monkeypatch, algorithm, moments)


def test_every_surgery_has_a_short_name():
    used = {name for values in ALGORITHMS.values() for name in values.get("surgery", ())}
    assert used == set(SURGERIES)


# the tree of results --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three tasks of three epochs, and its seconds."""
    import sys
    import types

    from test_cumulative import small

    sys.modules["nets"] = types.SimpleNamespace(small=small)
    try:
        place = tmp_path_factory.mktemp("run") / "seed0"
        run = done(place, SETTINGS)
    finally:
        del sys.modules["nets"]
    return place, run.watch.seconds


def test_the_tree_is_the_published_one(finished, tmp_path):
    place, seconds = finished
    for index in (3, 1, 3):
        write_results_tree(LocalFolder(tmp_path), open_run(place), index, seconds)
    assert indices(LocalFolder(tmp_path)) == [1, 3]
    files = {path.parent.name: np.load(path) for path in tmp_path.glob("*/index-3.npy")}
    shapes = {name: (array.shape, array.dtype.name) for name, array in files.items()}
    per_epoch = [f"{part}_{name}_per_epoch" for part in ("test", "validation") for name in ("loss", "accuracy")]
    per_epoch += ["epoch_runtime", "test_evaluation_runtime", "validation_evaluation_runtime"]
    assert shapes == {
        **dict.fromkeys(per_epoch, ((9,), "float32")),
        **dict.fromkeys(["train_loss_per_checkpoint", "train_accuracy_per_checkpoint"], ((9,), "float32")),
        "class_order": ((6,), "int64"),
    }
    assert all(np.isfinite(array).all() for array in files.values())
    models = sorted(path.name for path in (tmp_path / "model_parameters").glob("index-3*"))
    assert models == [f"index-3_epoch-{epoch}.pt" for epoch in (0, 3, 6, 9)]
    last = torch.load(tmp_path / "model_parameters/index-3_epoch-9.pt", weights_only=True)
    own = torch.load(place / "models/task2.pt", weights_only=True)
    assert all(torch.equal(last[name], own[name]) for name in own)
    assert json.loads((tmp_path / "config_files/index-3.json").read_text()) == SETTINGS.to_json()
    assert (tmp_path / "evaluated_on/index-3.txt").read_text() == "test samples\n"


def test_accuracies_of_the_tree_are_those_of_the_classes_so_far(finished):
    run = open_run(finished[0])
    found, lines = curves(run), run.epochs.lines
    assert found["validation_accuracy_per_epoch"].tolist() == [line["validation_accuracy"] for line in lines]
    accuracy = run.evaluations.accuracy.sel(evaluation=slice(None)).values
    iterations = run.evaluations.iteration.values
    row = accuracy[iterations == lines[3]["iteration"]][0]  # the first epoch of task 1
    assert found["test_accuracy_per_epoch"][3] == pytest.approx(row[:2].mean())
    last = run.epochs.selected[1]  # the last epoch of task 1, before its best one is restored
    assert found["test_accuracy_per_epoch"][5] == pytest.approx(np.mean(last["accuracy"][:2]))


def test_a_run_that_is_not_finished_has_no_tree(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "seed0")
    (tmp_path / "seed0/models/task2.pt").unlink()
    with pytest.raises(StoreError, match="found 2 tasks and 9 epochs"):
        write_results_tree(LocalFolder(tmp_path / "tree"), open_run(tmp_path / "seed0"), 0, {})
    assert not (tmp_path / "tree").exists()


# the command ----------------------------------------------------------------------------------------------------------

SMALL = (
    "--dataset", "digits", "--model", "mlp", "--width", "6", "--epochs", "1", "--bs", "300", "--lr", "0.01",
    "--lr-milestones", "60",
)  # fmt: skip


def test_a_published_configuration_runs_under_its_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["cl-run", "--config", "continual_backpropagation", *SMALL, "--experiment-index", "1", "--verbose"]
    assert command(line) == 0
    captured = capsys.readouterr()
    place = tmp_path / "runs/continual_backpropagation"
    assert (place / f"seed{seed_of_index(1)}/config.json").exists()
    assert np.load(place / "test_accuracy_per_epoch/index-1.npy").shape == (2,)
    assert np.load(place / "experiment_indices.npy").tolist() == [1]
    assert "task 1/2, epoch 1/1: training loss" in captured.out
    assert "ignored in the configuration: num_workers" in captured.err
    settings = json.loads((place / "config_files/index-1.json").read_text())
    assert (settings["surgery"], settings["select"]) == (["continual-backprop"], "best")
    kernels = open_run(place / f"seed{seed_of_index(1)}").kernels  # before the first task, and after each
    assert kernels.iteration.values.tolist() == [0, 3, 8]
    told = (place / "evaluated_on/index-1.txt").read_text()
    assert told == (
        "validation samples, because the data set has no test split; best epochs are chosen on the same samples\n"
    )
    assert f"  evaluated on {told}" in captured.out
    assert command(["cl-analyze", str(place / f"seed{seed_of_index(1)}"), "--units", "--view-samples", "9", "-q"]) == 0
    analysis = {path.parent.name: np.load(path).shape for path in place.glob("*analysis/index-1.npy")}
    assert len(analysis) == 7
    assert set(analysis.values()) == {(2,)}
    assert np.load(place / "accuracy_per_class_in_order/index-1.npy").shape == (10,)


@pytest.mark.parametrize(
    ("file", "options", "surgery", "weight_decay"),
    [
        ("base_deep_learning_system", {"method": "reset-network"}, ("reset-network",), 5e-4),
        ("base_deep_learning_system", {"method": "continual-backprop"}, ("continual-backprop",), 5e-4),
        ("retrained_network", {"method": "base"}, (), 5e-4),
        ("retrained_network", {"method": "l2"}, (), 1e-3),
        ("retrained_network", {"method": "l2", "weight_decay": 0.5}, (), 0.5),
        ("retrained_network", {"method": "base", "surgery": ("redo",)}, ("redo",), 5e-4),
        ("retrained_network", {"epochs": 3}, ("reset-network",), 5e-4),
        ("retrained_network", {}, ("reset-network",), 5e-4),
    ],
)
def test_an_algorithm_of_the_options_replaces_that_of_the_file(file, options, surgery, weight_decay):
    settings = chosen_runs(None, None, FOLDER / f"{file}.json", options).sweep.settings
    assert (settings.method, settings.surgery, settings.weight_decay) == ("finetune", surgery, weight_decay)


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (["--experiment-index", "0", "--seeds", "1"], "--experiment-index chooses the seed"),
        (["--experiment-index", "-1"], "-1 is not in the range"),
        (["--verbose", "--workers", "2"], "--verbose prints what one run does"),
        (["--surgery", "lobotomy"], "Unknown surgery 'lobotomy'"),
        (["--replacement-rate", "2"], "2.0 is not in the range"),
        (["--method", "continual-backprop", "--model", "ntk-rnn", "--width", "4"], "hidden units"),
        (["--method", "continual-backprop", "--model", "logistic"], "has no hidden units to replace"),
        (["--method", "redo", "--model", "logistic"], "has no hidden units to replace"),
    ],
)
def test_runs_that_cannot_be_are_refused_in_one_line(tmp_path, capsys, bad, found):
    assert command(["cl-run", "--epochs", "1", "--out", str(tmp_path / "r"), "-q", *bad]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()
