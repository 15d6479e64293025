"""Runs of continual learning: what is recorded, that looking changes nothing, and that a killed run ends the same."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
import zarr
from cases import chosen
from killing import was_killed

import ntkgen
from ntkgen.cli import run as command
from ntkgen.continual import record
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.learner import learn
from ntkgen.continual.metrics.accuracy import AccuracyMatrix
from ntkgen.continual.metrics.confusion import class_accuracy, total_accuracy
from ntkgen.continual.metrics.definitions import OF_ACCURACY, OF_COURSES, OF_KERNELS, OF_PREDICTIONS
from ntkgen.continual.metrics.worst_case import worst_case
from ntkgen.continual.network import fitting_network, require_fitting
from ntkgen.continual.plan import Data, Plan, describe
from ntkgen.continual.plots.draw import KINDS, draw_run
from ntkgen.continual.reading import open_run
from ntkgen.continual.tables import NAMES
from ntkgen.data.dataset import Dataset
from ntkgen.errors import DivergedError, FingerprintError, InputError, ModelError, StoreError, UnknownNameError
from ntkgen.files.folder import LocalFolder
from ntkgen.training.loop import EVALUATION_BATCH

CPU = torch.device("cpu")
SETTINGS = RunSettings(
    dataset="blobs", model="nets:small", split="2/2", epochs=2, batch_size=16, learning_rate=0.01, probe_per_class=3,
    kernels="1ep", evaluations="3it", dense=4,
)  # fmt: skip
# Schedules that look only at the ends of tasks.
RARELY = {"kernels": "task", "dense": None, "evaluations": "task"}


def small(num_classes):
    """A network with everything that has state: batch norm, dropout, momentum."""
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(12, 24), torch.nn.BatchNorm1d(24), torch.nn.Dropout(0.1), torch.nn.ReLU(),
        torch.nn.Linear(24, num_classes),
    )  # fmt: skip


def linear(num_outputs, *, after=None):
    """A linear network, and a function of its outputs."""

    class Net(torch.nn.Linear):
        def forward(self, x):
            outputs = super().forward(x.flatten(1))
            return outputs if after is None else after(outputs)

    return lambda: Net(12, num_outputs)


def crashing(num_classes):
    raise OSError("no such file")


def no_way(outputs):
    raise RuntimeError("no way")


def drawn(outputs):
    return outputs + 0 * torch.rand(1)


NETS = {
    "small": small,
    "few": linear(5),
    "many": linear(9),
    "crashing": crashing,
    "failing": linear(6, after=no_way),
    "flat": linear(6, after=torch.flatten),
    "mixing": linear(6, after=lambda outputs: outputs - outputs.mean(0)),
    "drawing": linear(6, after=drawn),
}


@pytest.fixture(autouse=True)
def nets(monkeypatch):
    """Make the networks importable by a name."""
    import sys
    import types

    monkeypatch.setitem(sys.modules, "nets", types.SimpleNamespace(**NETS))


def blobs(per_class=30, classes=6, spread=0.5):
    """Well separated classes of small images."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), per_class)
    means = 2 * rng.standard_normal((classes, 3, 2, 2))
    images = means[labels] + spread * rng.standard_normal((len(labels), 3, 2, 2))
    order = rng.permutation(len(labels))
    return Data(Dataset("blobs", torch.from_numpy(images[order]).float(), torch.from_numpy(labels[order]), classes))


def done(place, settings=SETTINGS):
    learn(Plan.of(settings, blobs()), LocalFolder(place, fsync=False), CPU)
    return open_run(place)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing has disturbed."""
    import sys
    import types

    sys.modules["nets"] = types.SimpleNamespace(small=small)
    try:
        place = tmp_path_factory.mktemp("run") / "seed0"
        done(place)
    finally:
        del sys.modules["nets"]
    return place


def content(place):
    """Read every file of a run, and the tensors of its checkpoint."""
    folder = LocalFolder(place)
    files = {key: folder.read(key) for key in folder.sizes() if not key.endswith(".pt")}
    state = torch.load(place / "checkpoint.pt", weights_only=True)
    return files, state


def require_equal(place, other):
    (files, state), (expected, wanted) = content(place), content(other)
    assert files.keys() == expected.keys()
    assert [key for key in files if files[key] != expected[key]] == []
    assert state["position"] == wanted["position"]
    for part in ("model", "optimizer", "random"):
        assert_same(state[part], wanted[part])


def assert_same(value, expected):
    if isinstance(value, torch.Tensor):
        assert torch.equal(value, expected)
    elif isinstance(value, dict):
        assert value.keys() == expected.keys()
        for key in value:
            assert_same(value[key], expected[key])
    elif isinstance(value, list):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_same(one, other)
    else:
        assert value == expected


# what is recorded -----------------------------------------------------------------------------------------------------


def test_a_run_forgets_what_it_is_not_shown(tmp_path):
    run = done(tmp_path / "seed0", dataclasses.replace(SETTINGS, epochs=20, **RARELY))
    losses = run.evaluations.loss.values[1:]  # at the ends of tasks, of each task
    assert all(losses[task, task] < 0.5 * losses[task - 1, task] for task in (1, 2))
    matrix = run.matrix()
    assert matrix.values.shape == (3, 3)
    assert matrix.values.diagonal().min() >= 0.8
    assert matrix.values[2, 0] <= 0.2
    assert matrix.forgetting >= 0.6
    assert np.array_equal(matrix.chance, run.accuracy.values[0])  # before the training
    transfers = [matrix.values[task - 1, task] - matrix.chance[task] for task in (1, 2)]
    assert matrix.forward_transfer == pytest.approx(np.mean(transfers))
    assert run.matrix("task_accuracy").values[2].min() >= 0.5


@pytest.mark.parametrize(
    "method", chosen(["joint", "replay", "replay-mixed", "replay-two-pass"], ["joint", "replay-mixed"])
)
def test_these_methods_do_not_forget(tmp_path, method):
    settings = dataclasses.replace(SETTINGS, method=method, epochs=20, buffer=60, replay=30, **RARELY)
    assert done(tmp_path / "seed0", settings).matrix().values[2].min() >= 0.8


def test_moments_are_those_of_the_schedules(finished):
    run = open_run(finished)
    steps = 54 // 16 + 1  # of an epoch
    last = [2 * steps * task for task in (1, 2, 3)]
    expected = sorted({0, *range(3, 8, 3), *last, *(start + 3 * i for start in last[:2] for i in (1, 2))})
    assert run.evaluations.iteration.values.tolist() == expected
    dense = sorted({0, 1, 2, 4, 8, *(start + step for start in last[:2] for step in (1, 2, 4, 8))})
    assert run.kernels.iteration.values.tolist() == dense
    assert run.kernels.task.values.tolist() == [min(2, (max(step, 1) - 1) // 8) for step in dense]


def test_the_last_kernel_is_that_of_the_stored_parameters(finished):
    run = open_run(finished)
    net = small(6)
    net.load_state_dict(torch.load(finished / "models/task2.pt", weights_only=True))
    x = blobs().train.inputs(torch.from_numpy(run.evaluations.probe_id.values))
    exact = ntkgen.reference_ntk(net.eval(), x).reshape(len(x), 6, len(x), 6)
    found = run.kernels.kernel.values[-1]
    assert np.abs(found - torch.einsum("iojo->ij", exact).numpy()).max() <= 1e-4 * np.abs(found).max()


def test_the_last_evaluation_is_that_of_the_stored_parameters(finished):
    run, data = open_run(finished), blobs().train
    net = small(6)
    net.load_state_dict(torch.load(finished / "models/task2.pt", weights_only=True))
    ids = torch.from_numpy(run.evaluations.validation_1.values)
    with torch.no_grad():
        scores = net.eval()(data.inputs(ids))
    accuracy = float((scores.argmax(1) == data.labels[ids]).double().mean())
    within = float((scores[:, 2:4].argmax(1) + 2 == data.labels[ids]).double().mean())
    loss = float(torch.nn.functional.cross_entropy(scores, data.labels[ids]))
    last = run.evaluations.isel(evaluation=-1, task=1)
    assert [float(last[name]) for name in ("accuracy", "task_accuracy")] == [accuracy, within]
    assert float(last.loss) == pytest.approx(loss, rel=1e-5)
    assert len(ids) <= EVALUATION_BATCH


def test_everything_that_determines_the_run_is_kept(finished):
    config = json.loads((finished / "config.json").read_text())
    assert RunSettings.from_json(config["settings"]) == SETTINGS
    assert config["facts"]["data"] == blobs().train.fingerprint()
    data = xarray.open_zarr(finished / "run.zarr")
    assert data.class_order.values.tolist() == list(range(6))
    assert len(data.train_0) + len(data.validation_0) == 60
    assert sorted(np.bincount(data.probe_task.values)) == [6, 6, 6]
    assert np.bincount(blobs().labels[data.probe_id.values]).tolist() == [3] * 6
    logged = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    lines = [line for line in logged if line["event"] == "evaluation"]
    assert [line["iteration"] for line in lines] == data.iteration.values.tolist()
    assert lines[-1]["accuracy"] == data.accuracy.values[-1].tolist()


# nothing is disturbed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [RARELY, {"per_layer": True, "lazy_error": False}])
def test_looking_changes_no_bit_of_training(finished, tmp_path, change):
    done(tmp_path / "seed0", dataclasses.replace(SETTINGS, **change))
    for task in range(3):
        found, expected = (
            torch.load(place / f"models/task{task}.pt", weights_only=True) for place in (tmp_path / "seed0", finished)
        )
        assert_same(found, expected)


def test_a_finished_run_stays_as_it_is(finished):
    before = content(finished)[0]
    done(finished)
    assert content(finished)[0] == before


def counted(place, monkeypatch, settings=SETTINGS):
    """Run without a disturbance; return the number of writes."""
    count = 0

    def write(self, key, data, plain=LocalFolder.write):
        nonlocal count
        count += 1
        plain(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "write", write)
        done(place, settings)
    return count


def killed_at(place, monkeypatch, moment, settings=SETTINGS):
    """Run until some write, which is not made."""
    return was_killed(lambda: done(place, settings), moment, monkeypatch)


def test_a_run_that_is_killed_ends_like_an_undisturbed_one(finished, tmp_path, monkeypatch):
    writes = counted(tmp_path / "counted", monkeypatch)
    for part in (0.2, 0.7):
        moment, place = int(part * writes), tmp_path / f"seed{part}"
        assert killed_at(place, monkeypatch, moment)
        killed_at(place, monkeypatch, moment // 2 + 3)  # once more, while it resumes or later
        done(place)
        require_equal(place, finished)


def test_a_killed_run_with_a_memory_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, method="replay", buffer=20)
    writes = counted(tmp_path / "undisturbed", monkeypatch, settings)
    assert killed_at(tmp_path / "seed0", monkeypatch, writes * 2 // 3, settings)
    done(tmp_path / "seed0", settings)
    require_equal(tmp_path / "seed0", tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_write_ends_like_an_undisturbed_one(finished, tmp_path, monkeypatch):
    for moment in range(1, counted(tmp_path / "counted", monkeypatch) + 1):
        place = tmp_path / f"killed{moment}"
        assert killed_at(place, monkeypatch, moment)
        killed_at(place, monkeypatch, moment // 2 + 3)  # once more, while it resumes or later
        done(place)
        require_equal(place, finished)


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"learning_rate": 0.02}, r"learning_rate 0\.01, now 0\.02"),
        ({"seed": 1}, "seed 0, now 1"),
        ({"epochs": 3}, "epochs 2, now 3"),
    ],
)
def test_a_run_with_other_settings_is_refused(finished, change, match):
    before = content(finished)[0]
    with pytest.raises(FingerprintError, match=match):
        done(finished, dataclasses.replace(SETTINGS, **change))
    assert content(finished)[0] == before


def test_a_run_with_other_data_is_refused(finished):
    with pytest.raises(FingerprintError, match="data "):
        learn(Plan.of(SETTINGS, blobs(per_class=31)), LocalFolder(finished), CPU)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"split": "7/1"}, InputError, "does not fit 6 classes"),
        ({"probe_per_class": 100}, InputError, "probe does not fit task 0: expected 100"),
        ({"kernels": "never"}, InputError, "no schedule"),
        ({"optimizer": "lion"}, InputError, "`optimizer` 'lion'"),
        ({"epochs": 0}, InputError, "`epochs` is 0: expected a number above 0. Was it meant to switch something off"),
        ({"dense": -1}, InputError, "`dense` is -1: expected 0 or more. Is the sign wrong.*the default, 64"),
        ({"lr_milestones": (0,)}, InputError, "`lr_milestones` has the epoch 0"),
        ({"method": "replya"}, UnknownNameError, "Unknown method"),
        ({"output": "index:6"}, InputError, "no logit 6"),
        ({"output": "tracee"}, UnknownNameError, "Did you mean trace.*, seen"),
        ({"output": "index:"}, UnknownNameError, "Unknown output 'index:'"),
        ({"precision": "float16"}, UnknownNameError, "Unknown precision"),
        ({"precision": "tf32"}, InputError, "`device` cuda, found cpu"),
        ({"model": "nets:few"}, ModelError, "nets:few has 5 outputs: expected 6, one for each class of the tasks"),
        ({"model": "nets:many"}, ModelError, "has 9 outputs: expected 6.*ignore the argument num_classes"),
        ({"model": "nets:crashing"}, ModelError, "The factory nets:crashing failed.*no such file"),
        (
            {"model": "nets:failing"},
            ModelError,
            r"nets:failing was tried on 2 samples of the shape \(3, 2, 2\).*no way",
        ),
        ({"model": "nets:flat"}, ModelError, r"found a tensor of the shape \(12,\)"),
        ({"model": "nets:mixing"}, ModelError, "mix"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(tmp_path, change, error, match):
    with pytest.raises(error, match=match):
        done(tmp_path / "seed0", dataclasses.replace(SETTINGS, **change))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_trial_of_the_network_changes_nothing():
    plan = Plan.of(dataclasses.replace(SETTINGS, model="nets:drawing"), blobs())
    random = torch.get_rng_state()
    model = fitting_network(plan, CPU)
    require_fitting(plan, CPU)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(param.grad is None for param in model.parameters())


def test_a_setting_that_is_misspelt_is_refused():
    with pytest.raises(InputError, match="Did you mean epochs"):
        RunSettings.from_json({"epoch": 3})


def test_a_damaged_checkpoint_is_refused(tmp_path):
    done(tmp_path / "seed0", dataclasses.replace(SETTINGS, epochs=1))
    (tmp_path / "seed0" / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(StoreError, match="cannot be read"):
        done(tmp_path / "seed0", dataclasses.replace(SETTINGS, epochs=1))


def test_a_training_that_diverges_says_so(tmp_path):
    with pytest.raises(DivergedError, match="learning rate of 1e"):
        done(tmp_path / "seed0", dataclasses.replace(SETTINGS, optimizer="sgd", learning_rate=1e30))


# metrics --------------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    matrix = AccuracyMatrix(np.array([[0.9, 0.2, 0.0], [0.5, 0.8, 0.1], [0.3, 0.6, 1.0]]), np.array([0.1, 0.1, 0.1]))
    assert matrix.average_accuracy == pytest.approx(1.9 / 3)
    assert matrix.average_incremental_accuracy == pytest.approx((0.9 + 0.65 + 1.9 / 3) / 3)
    assert matrix.backward_transfer == pytest.approx((-0.6 - 0.2) / 2)
    assert matrix.forward_transfer == pytest.approx((0.1 + 0.0) / 2)
    assert matrix.forgetting == pytest.approx((0.6 + 0.2) / 2)
    assert matrix.new_task_accuracy.tolist() == [0.9, 0.8, 1.0]
    weighted = dataclasses.replace(matrix, num_samples=np.array([10, 30, 60]))
    assert weighted.seen_accuracy == pytest.approx([0.9, (5 + 24) / 40, (3 + 18 + 60) / 100])
    alone = AccuracyMatrix(matrix.values[:1])
    assert (alone.backward_transfer, alone.forward_transfer, alone.forgetting) == (None, None, None)


def test_worst_accuracies_by_hand():
    accuracy = np.array(
        [[0.1, 0.1, 0.1], [0.2, 0, 0], [0.9, 0, 0], [0.4, 0.5, 0], [0.7, 0.8, 0], [0.6, 0.3, 0.9], [0.5, 0.6, 1.0]]
    )
    found = worst_case(accuracy, np.array([0, 0, 0, 1, 1, 2, 2]), 3)
    assert np.isnan(found.minimum[0])
    assert found.minimum[1:] == pytest.approx([0.4, (0.4 + 0.3) / 2])  # the end of a task is not after it
    assert found.worst_case == pytest.approx([0.9, (0.8 + 0.4) / 2, 1.0 / 3 + 2 / 3 * 0.35])
    assert found.evaluations.tolist() == [3, 2, 2]
    assert worst_case(accuracy, np.array([0, 0, 0, 1, 1, 2, 2]), 1).to_json()["minimum_accuracy"] is None


def test_the_confusion_matrix_agrees_with_the_accuracies(finished):
    run = open_run(finished)
    confusion, matrix = run.confusion, run.matrix()
    assert confusion.shape == (3, 6, 6)
    assert run.num_held_out.tolist() == [6, 6, 6]
    for task, counts in enumerate(confusion):
        assert counts.sum(1).tolist() == [3] * 2 * (task + 1) + [0] * 2 * (2 - task)
        assert total_accuracy(counts) == pytest.approx(matrix.seen_accuracy[task])
        own = class_accuracy(counts)[2 * task : 2 * task + 2]
        assert own.mean() == pytest.approx(matrix.values[task, task])
    predicted = np.array([run.metrics()["class_accuracy"]])
    assert predicted.mean() == pytest.approx(matrix.average_accuracy)


def test_a_run_that_was_begun_without_confusion_matrices_goes_on(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(record, "_confusions", lambda num_targets: [])
        run = done(tmp_path / "seed0", dataclasses.replace(SETTINGS, epochs=1))
    assert run.confusion is None
    assert "confusion" not in run.metrics()
    assert run.matrix().values.shape == (3, 3)


# the command ----------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    line = ["cl-run", "--split", "5/5", "--model", "logistic", "--epochs", "1", "--kernels", "task", "--dense", "0"]
    assert command([*line, "--dry-run", "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "2 tasks, 52 iterations" in out
    assert "  evaluated on validation samples, because the data set has no test split\n" in out
    assert not (tmp_path / "r").exists()
    assert command([*line, "--seeds", "3", "4", "--json", "--out", str(tmp_path / "r")]) == 0
    *results, whole = (json.loads(text) for text in capsys.readouterr().out.splitlines())
    assert [result["seed"] for result in results] == whole["seeds"] == [3, 4]
    assert results[0]["class_incremental"]["accuracy_matrix"] != results[1]["class_incremental"]["accuracy_matrix"]
    kernels = zarr.open_group(tmp_path / "r/seed3/kernels.zarr", mode="r")
    assert kernels["kernel"].shape == (3, 100, 100)


def test_a_run_is_analysed_from_what_is_stored(finished, capsys):
    assert command(["cl-analyze", str(finished), "--json"]) == 0
    text = capsys.readouterr().out
    found, run = json.loads(text), open_run(finished)
    assert "NaN" not in text  # which JSON does not have
    assert found["class_incremental"]["accuracy_matrix"] == run.matrix().values.tolist()
    norms = [float(np.linalg.norm(K.astype(float))) for K in run.kernels.kernel.values]
    assert found["kernels"]["frobenius_norm"] == pytest.approx(norms)
    assert command(["cl-analyze", str(finished)]) == 0
    page = capsys.readouterr().out.splitlines()
    assert f"{run.matrix().average_accuracy:.3f}" in page[2]
    assert page[-1].split()[:3] == ["2", "24", f"{norms[-1]:.4g}"]
    assert max(map(len, page)) <= 120
    assert "  evaluated on validation samples, because the data set has no test split" in page
    assert "  seen accuracy after each task: " in "\n".join(page)
    assert command(["cl-analyze", str(finished / "models")]) == 2
    assert "There is no run at" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["kernels.zarr", "run.zarr"])
def test_a_run_that_lacks_a_part_is_told_in_one_line(finished, tmp_path, capsys, part):
    place = shutil.copytree(finished, tmp_path / "seed0")
    shutil.rmtree(place / part)
    for line in ("cl-analyze", "cl-plot", "report"):
        assert command([line, str(place)]) == 2
        error = capsys.readouterr().err
        assert f"There is nothing at {place / part}: expected the Zarr group" in error
        assert error.count("\n") == 1


def test_the_predicted_forgetting_of_a_run_is_analysed(finished, capsys):
    found = open_run(finished).predicted_forgetting()
    assert found.attrs["kernel"].startswith("approximation")
    assert found.cosine.values.diagonal().min() > 0.6  # of the task that learns
    assert command(["cl-analyze", str(finished), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["predicted_forgetting"]
    assert listed["old_cosine"][1:] == found.old_cosine.values[1:].tolist()
    assert listed["new_task"] == [0, 1, 2]
    assert command(["cl-analyze", str(finished)]) == 0
    cosines = " ".join(f"{cosine:.2f}" for cosine in found.old_cosine.values[1:])
    assert f"change of old outputs: {cosines}\n" in capsys.readouterr().out


def test_the_lazy_error_can_be_left_out(capsys):
    assert command(["cl-run", "--model", "logistic", "--no-lazy-error", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["lazy_error"] is False


def test_the_lazy_error_of_a_run_is_analysed(finished, capsys):
    kernels = open_run(finished).kernels
    assert command(["cl-analyze", str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kernels"]
    for name in ("lazy_error", "lazy_error_from_start", "buffer_drift"):
        assert found[name][1:] == kernels[name].values[1:].tolist()
        assert min(found[name][1:]) > 0


@pytest.mark.parametrize(
    "bad",
    [
        ["--split", "9/9"],
        ["--method", "none"],
        ["--kernels", "never"],
        ["--dataset", "nothing"],
        ["--lr", "0"],
        ["--precision", "float16"],
        ["--output", "index:"],
        ["--model", "nets:few"],
        ["--model", "nets:crashing"],
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, bad):
    for more in ([], ["--dry-run"], ["--seeds", "0", "1"]):
        assert command(["cl-run", "--model", "logistic", *bad, *more, "--out", str(tmp_path / "r")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "r").exists()


def test_a_file_of_settings_is_overridden_by_options(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model": "logistic", "split": "5/5", "epochs": 7}))
    assert command(["cl-run", "--config", str(file), "--epochs", "2", "--dry-run", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["model"], settings["split"], settings["epochs"]) == ("logistic", "5/5", 2)
    assert describe(Plan.of(dataclasses.replace(SETTINGS, epochs=1), blobs()))["kernels"] == 10


def test_every_metric_is_defined(finished):
    run = open_run(finished)
    numbers = {name for name, value in run.metrics()["class_incremental"].items() if not isinstance(value, list)}
    assert numbers == set(OF_ACCURACY)
    courses = {name for name in run.metrics()["class_incremental"] if name in OF_COURSES}
    assert courses | {"class_accuracy"} == set(OF_COURSES) <= courses | set(run.metrics())
    assert set(OF_PREDICTIONS) <= {str(name) for name in run.predicted_forgetting().data_vars}
    measured = {str(name) for name in run.kernel_metrics().data_vars if not str(name).startswith("task_")}
    assert measured == set(OF_KERNELS) - {"held_out_accuracy"}


def test_tables_have_what_is_stored(finished, tmp_path):
    assert command(["cl-analyze", str(finished), "--csv", str(tmp_path / "csv")]) == 0
    run, stem = open_run(finished), f"{finished.parent.name}-seed0"
    found = {path.name.removeprefix(f"{stem}-"): path for path in (tmp_path / "csv").iterdir()}
    assert set(found) == {f"{name}.csv" for name in NAMES.values()} - {"numerical-rank.csv"}  # of several tolerances
    with found["accuracy.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == run.accuracy.values.ravel().tolist()
    assert [int(row["iteration"]) for row in rows[::3]] == run.evaluations.iteration.values.tolist()
    with found["confusion.csv"].open() as file:
        counts = [int(row["confusion"]) for row in csv.DictReader(file)]
    assert counts == run.confusion.ravel().tolist()


@pytest.mark.slow
def test_a_page_of_a_run_has_its_metrics_and_pictures(finished, tmp_path, capsys):
    page = tmp_path / "run.html"
    assert command(["report", str(finished), "-o", str(page), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    text, run = page.read_text(), open_run(finished)
    assert text.count("<img ") == len(KINDS) - len(result["left_out"])
    assert f'data-value="{run.matrix().forgetting!r}"' in text
    shown = (OF_ACCURACY, OF_COURSES, OF_PREDICTIONS)
    assert [name for found in shown for name, definition in found.items() if definition.title not in text] == []
    assert "All are measured on validation samples, because the data set has no test split." in text
    assert f"--config {finished}/config.json --seeds 0" in text


@pytest.mark.parametrize(("others", "match"), [(["nothing.zarr"], "of one kind"), (["--dtype", "float32"], "--dtype")])
def test_a_page_is_of_runs_or_of_kernels(finished, tmp_path, capsys, others, match):
    assert command(["report", str(finished), *others, "-o", str(tmp_path / "run.html")]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "run.html").exists()


@pytest.mark.slow
def test_pictures_show_what_is_stored(finished, tmp_path, capsys):
    run = open_run(finished)
    drawn, left_out = draw_run(run)
    assert [picture.kind for picture in drawn] == [kind for kind in KINDS if kind not in left_out]
    assert list(left_out) == ["validation-eigenvalues"]
    pictures = {picture.kind: picture.figure for picture in drawn}
    accuracy = [line for line in pictures["accuracy"].axes[0].lines if line.get_label().startswith("task")]
    assert [line.get_label() for line in accuracy] == ["task 0", "task 1", "task 2"]
    since = run.evaluations.iteration.values > 8
    assert accuracy[1].get_ydata().tolist() == (100 * run.evaluations.accuracy.values[since, 1]).tolist()
    norm = pictures["norm"].axes[0]
    assert [line.get_xdata()[0] for line in norm.lines if line.get_linestyle() == ":"] == [2, 4]
    assert [tick.get_text() for tick in norm.get_xticklabels()] == ["Task 0", "Task 1", "Task 2"]
    at_epochs = [[epoch for epoch in line.get_xdata() if epoch % 1 == 0] for line in norm.lines[:3]]
    assert [len(epochs) for epochs in at_epochs] == [2 * (3 - task) for task in range(3)]
    assert [epochs[0] for epochs in at_epochs] == [1, 3, 5]
    cells = [text.get_text() for text in pictures["matrix"].axes[0].texts]
    assert cells == [f"{100 * value:.0f}" for value in run.matrix().values.ravel()]
    cells = [text.get_text() for text in pictures["confusion"].axes[0].texts]
    assert cells == [f"{100 * value / 3:.0f}" for value in run.confusion[-1].ravel()]
    seen = pictures["progress"].axes[0].lines[0]
    assert seen.get_xdata().tolist() == [2, 4, 6]
    assert seen.get_ydata().tolist() == (100 * run.matrix().seen_accuracy).tolist()
    assert [axes.get_xlabel() for axes in pictures["forgetting"].axes] == [
        "predicted × scale",
        "of the predicted change × scale, nats",
    ]
    assert pictures["forgetting"].axes[1].lines[0].get_ydata()[0] == run.predicted_forgetting().loss_increase[1, 0]
    assert command(["cl-plot", str(finished), "-o", str(tmp_path / "plots"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    files = [made["file"] for made in result["pictures"]]
    assert len({(tmp_path / "plots" / file).name for file in files}) == len(drawn)
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in files)
    assert result["left_out"] == left_out
