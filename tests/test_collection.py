"""Runs of several seeds and widths: read together, summarised, drawn, and trained side by side."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from ntkgen.cli import run as command
from ntkgen.cli.cl_preset import chosen_runs
from ntkgen.cli.progress import progress_bars
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.forecast import Forecast, forecast
from ntkgen.continual.joining import joined
from ntkgen.continual.learner import learn
from ntkgen.continual.metrics.definitions import OF_ACCURACY
from ntkgen.continual.metrics.spread import Spread
from ntkgen.continual.plan import Plan, describe, load_data
from ntkgen.continual.plots.overlay import draw_collection
from ntkgen.continual.reading import RunCollection, RunReader, open_run
from ntkgen.continual.side_by_side import Job, train_side_by_side
from ntkgen.errors import DivergedError, FingerprintError, StoreError
from ntkgen.files.folder import LocalFolder

SETTINGS = RunSettings(
    split="5/5", width=8, epochs=1, batch_size=200, learning_rate=0.01, probe_per_class=1, kernels="2it", dense=None,
    evaluations="2it",
)  # fmt: skip
RUNS = [(8, 0), (8, 1), (16, 0)]  # width and seed
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of one width, and one of another."""
    place, data = tmp_path_factory.mktemp("runs") / "cl", load_data(SETTINGS)
    for width, seed in RUNS:
        settings = dataclasses.replace(SETTINGS, width=width, seed=seed)
        folder = LocalFolder(place / f"width{width}/seed{seed}", fsync=False)
        learn(Plan.of(settings, data), folder, torch.device("cpu"))
    return place


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of them that may be changed."""
    shutil.copytree(trained, tmp_path / "cl")
    return tmp_path / "cl"


# reading --------------------------------------------------------------------------------------------------------------


def test_several_runs_are_one_data_set(trained):
    runs = open_run(trained)
    assert isinstance(runs, RunCollection)
    assert (runs.widths, runs.seeds, runs.num_tasks) == ([8, 16], [0, 1], 2)
    assert runs.accuracy.dims == ("width", "seed", "evaluation", "task")
    assert runs.kernels.kernel.dims == ("width", "seed", "time", "row", "col")
    measured = runs.kernel_metrics()
    predicted = runs.predicted_forgetting()
    assert measured.velocity.dims == ("width", "seed", "start")
    assert runs.metrics().accuracy_matrix.dims == ("width", "seed", "scores", "after_task", "task")
    for (width, seed), run in runs.runs.items():
        here = {"width": width, "seed": seed}
        assert np.array_equal(runs.accuracy.sel(here), run.accuracy)
        assert np.array_equal(runs.kernels.kernel.sel(here), run.kernels.kernel)
        assert np.array_equal(measured.distance.sel(here), run.kernel_metrics().distance)
        changes = predicted.old_cosine.sel(here), run.predicted_forgetting().old_cosine
        assert np.array_equal(*changes, equal_nan=True)
        found = runs.metrics().sel(here | {"scores": "task_incremental"})
        assert float(found.forgetting) == run.metrics()["task_incremental"]["forgetting"]
        assert np.array_equal(runs.evaluations.iteration, run.evaluations.iteration)
        assert np.array_equal(runs.kernels.row_sample_id.sel(here), run.kernels.row_sample_id)
    assert runs.config["settings"]["epochs"] == 1
    assert "seed" not in runs.config["settings"]
    assert np.isnan(runs.accuracy.sel(width=16, seed=1)).all()  # there is no such run


def test_one_width_is_no_dimension(trained):
    runs = open_run(trained / "width8")
    assert runs.accuracy.dims == ("seed", "evaluation", "task")
    assert runs.metrics().average_accuracy.dims == ("seed", "scores")
    assert isinstance(open_run(trained / "width8/seed1"), RunReader)


def test_a_run_that_is_not_finished_has_gaps(copied):
    stopped = LocalFolder(copied / "width8/seed1")
    stopped.remove("models/task1.pt")
    runs = open_run(copied)
    assert list(runs.complete) == [(8, 0), (16, 0)]
    found = runs.metrics().average_accuracy
    assert found.sizes == {"width": 2, "seed": 2, "scores": 2}
    assert np.isnan(found.sel(seed=1)).all()
    stopped.remove("models/task0.pt")
    with pytest.raises(StoreError, match="no finished task"):
        open_run(copied / "width8/seed1").matrix()


def test_times_of_runs_are_joined():
    import xarray

    def run(iterations, tasks):
        values = ("time", np.array(iterations, float))
        where = {"iteration": ("time", iterations), "trained_task": ("time", tasks)}
        return xarray.Dataset({"value": values}, where)

    shorter = joined({(None, 0): run([0, 2, 4], [0, 0, 1]), (None, 3): run([0, 2], [0, 0])}, "time", "trained_task")
    assert shorter.iteration.values.tolist() == [0, 2, 4]
    assert shorter.value.values[1].tolist()[:2] == [0, 2]
    assert np.isnan(shorter.value.values[1, 2])
    later = joined({(None, 0): run([0, 2, 4], [0, 0, 1]), (None, 1): run([0, 3, 6], [0, 0, 1])}, "time", "trained_task")
    assert later.iteration.values.tolist() == [[0, 2, 4], [0, 3, 6]]
    assert later.trained_task.values.tolist() == [0, 0, 1]
    other = joined({(None, 0): run([0, 2, 4], [0, 0, 1]), (None, 1): run([0, 2, 6], [0, 1, 1])}, "time", "trained_task")
    assert other.value.sel(seed=1).values.tolist()[:2] == [0, 2]
    assert other.sizes["time"] == 4


def test_runs_of_other_settings_are_not_read_together(copied):
    file = copied / "width8/seed1/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "settings": {**config["settings"], "epochs": 2}}))
    with pytest.raises(FingerprintError, match="epochs 1, now 2"):
        open_run(copied)
    file.write_text(json.dumps({**config, "facts": {"data": "another"}}))
    with pytest.raises(FingerprintError, match="other data"):
        open_run(copied)
    file.write_text(json.dumps({**config, "settings": {**config["settings"], "seed": 0}}))
    with pytest.raises(FingerprintError, match="same width and seed"):
        open_run(copied)


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(StoreError, match="There is no run at"):
        open_run(tmp_path)
    for line, found in (("cl-analyze", "There is no run at"), ("report", "or a run of `ntkgen cl-run`, found no file")):
        assert command([line, str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert found in error
        assert error.count("\n") == 1


# mean and spread ------------------------------------------------------------------------------------------------------


def test_mean_and_spread_by_hand():
    found = Spread.of([1.0, 2.0, 6.0, np.nan])
    assert (found.mean, found.n) == (3.0, 3)
    assert found.deviation == pytest.approx(7**0.5)  # √((4 + 1 + 9) / 2)
    # Student's t for 2 degrees of freedom and 97.5 %, from tables: 4.302653.
    assert found.interval == pytest.approx((3 - 4.302653 * (7 / 3) ** 0.5, 3 + 4.302653 * (7 / 3) ** 0.5))
    assert Spread.of([2.0]) == Spread(2.0, None, None, 1)
    assert Spread.of([np.nan]) is None


def test_several_runs_are_analysed_together(trained, capsys):
    assert command(["cl-analyze", str(trained), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    runs = open_run(trained)
    assert [each["width"] for each in result["summary"]] == [8, 16]
    values = [runs.runs[8, seed].matrix().average_accuracy for seed in SEEDS]
    found = result["summary"][0]["class_incremental"]["average_accuracy"]
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    norms = result["kernels"]["frobenius_norm"]
    assert norms["dims"] == ["width", "seed", "time"]
    assert np.array_equal(np.array(norms["values"], float), runs.kernel_metrics().frobenius_norm, equal_nan=True)
    assert len(result["runs"]) == 3
    assert command(["cl-analyze", str(trained)]) == 0
    page = capsys.readouterr().out
    assert "width 8, 2 seeds" in page
    titles = [line.strip() for line in page.splitlines()]
    assert all(any(line.startswith(each.title) for line in titles) for each in OF_ACCURACY.values())
    assert "centred alignment" in page
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} [" in page
    last = [float(norms["values"][0][seed][-1]) for seed in SEEDS]
    (line,) = (line for line in page.splitlines() if line.split()[:2] == ["8", "1"])
    assert line.split()[2] == f"{np.mean(last):.4g}"


# pictures -------------------------------------------------------------------------------------------------------------


def test_pictures_show_means_with_bands(trained):
    runs = open_run(trained)
    pictures = {picture.kind: picture.figure for picture in draw_collection(runs)}
    assert list(pictures) == ["accuracy-width8", "accuracy-width16", "average-accuracy", "norm", "distance", "velocity"]
    accuracy = 100 * runs.accuracy.sel(width=8).values
    (line,) = (line for line in pictures["accuracy-width8"].axes[0].lines if line.get_label() == "task 0")
    assert line.get_ydata() == pytest.approx(accuracy[:, 1:, 0].mean(0))  # the first evaluation is before its training
    assert pictures["norm"].axes[0].get_ylabel() == "‖K‖$_F$ of the whole probe"
    norms = runs.kernel_metrics().frobenius_norm.values
    lines = {line.get_label(): line for line in pictures["norm"].axes[0].lines}
    assert lines["width 8"].get_ydata() == pytest.approx(norms[0].mean(0))
    assert lines["width 8"].get_xdata().tolist() == runs.kernels.iteration.values.tolist()
    assert lines["width 16"].get_ydata() == pytest.approx(norms[1, 0])
    (band,) = (each.get_paths()[0].vertices for each in pictures["norm"].axes[0].collections)  # one seed has none
    assert band[:, 1].max() == pytest.approx((norms[0].mean(0) + norms[0].std(0, ddof=1)).max())
    average = {line.get_label(): line for line in pictures["average-accuracy"].axes[0].lines}["width 8"].get_ydata()
    assert average[-1] == pytest.approx(100 * np.mean([runs.runs[8, s].matrix().average_accuracy for s in SEEDS]))
    assert average[1] == pytest.approx(accuracy[:, 1, 0].mean())  # only the first task is seen


@pytest.mark.slow
def test_pictures_of_several_runs_are_written(trained, tmp_path, capsys):
    place = str(trained / "width8")
    assert command(["cl-plot", place, "-o", str(tmp_path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["pictures"]
    assert [each["kind"] for each in made] == ["accuracy", "average-accuracy", "norm", "distance", "velocity"]
    assert "2 seeds" in made[0]["caption"]


# the command ----------------------------------------------------------------------------------------------------------

LINE = ("cl-run", "--split", "5/5", "--epochs", "1", "--bs", "400", "--lr", "0.01", "--probe-per-class", "1")
QUICK = ("--kernels", "task", "--evaluations", "task", "--dense", "0")


def test_a_sweep_has_a_folder_per_width_and_seed(tmp_path, capsys):
    place = tmp_path / "r"
    assert command([*LINE, *QUICK, "--width", "4", "6", "--seeds", "3", "--json", "--out", str(place)]) == 0
    *each, whole = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [(one["width"], one["seed"]) for one in each] == [(4, 3), (6, 3)]
    assert each[1]["settings"]["width"] == 6
    assert (whole["widths"], whole["seeds"]) == ([4, 6], [3])
    found = whole["summary"][1]["class_incremental"]["average_accuracy"]
    assert found == {
        "mean": each[1]["class_incremental"]["average_accuracy"], "standard_deviation": None, "interval_95": None,
        "n": 1,
    }  # fmt: skip
    assert (place / "width4/seed3/config.json").exists()
    before = (place / "width4/seed3/checkpoint.pt").read_bytes()
    assert command([*LINE, *QUICK, "--width", "4", "6", "--seeds", "3", "--bs", "300", "--out", str(place)]) == 2
    assert "batch_size 400, now 300" in capsys.readouterr().err
    assert (place / "width4/seed3/checkpoint.pt").read_bytes() == before


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    from ntkgen.continual import side_by_side

    def learned(plan, *others, learn=side_by_side.learn):
        if plan.settings.seed != 1:
            raise DivergedError("The training diverged: expected finite numbers.")
        return learn(plan, *others)

    monkeypatch.setattr(side_by_side, "learn", learned)
    assert command([*LINE, *QUICK, "--width", "4", "--seeds", "0", "1", "2", "--out", str(tmp_path / "r")]) == 1
    captured = capsys.readouterr()
    reason, same = captured.err.splitlines()
    assert reason == "Error: seed0: The training diverged: expected finite numbers."
    assert same == "Error: seed2: the same as seed0."
    assert captured.out.startswith("Settings: split 5/5; learning rate 0.01; epochs 1; batch size 400; ")
    assert "seed1: 3 kernels" in captured.out


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (["--seeds", "0", "1", "0"], "--seeds repeats a value: expected each value once, found 0"),
        (["--width", "4", "4"], "--width repeats a value"),
        (["--width", "0"], "0 is not in the range"),
        (["--model", "lenet", "--width", "4", "6"], "--width was given for lenet"),
        (["--workers", "0"], "0 is not in the range"),
        (["--seeds", "a"], "'a' is not a whole number. Is it a name or a fraction? Write digits alone"),
        (["--blend-steps", "-1"], "--blend-steps is -1: expected 0 or more iterations. Is the sign wrong?"),
        (["--tasks", "0"], "--tasks is 0: expected 1 or more"),
        (["--dense", "-1"], "--dense is -1: expected 0 or more"),
        (["--config", "nothere.json"], "There is no file nothere.json: expected settings, found nothing"),
        (["--class-order", "1,a"], "'1,a' is no class order"),
        (["--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_runs_that_cannot_be_are_refused_in_one_line(tmp_path, capsys, bad, found):
    assert command([*LINE, *bad, "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_an_interval_and_milestones_that_never_occur_are_noted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ntkgen.cli.cl_sweep.show_runs", lambda *_: 0)
    line = [*LINE, "--width", "4", "6", "--out", str(tmp_path / "r")]
    assert command([*line, "--kernels", "9it", "--evaluations", "2ep", "--lr-milestones", "1,5"]) == 0
    kernels, evaluations, rate = capsys.readouterr().err.splitlines()
    assert kernels.startswith("Note: The interval of --kernels 9it never ends within a task: the longest task has 3 ")
    assert "--evaluations 2ep" in evaluations
    assert rate.startswith("Note: The learning rate never changes at --lr-milestones 1, 5: a task has 1 epoch,")
    assert command([*line, "--kernels", "3it", "--evaluations", "1ep"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("layout", "widths"), [("width8/seed0", ["4"]), ("seed0", ["4", "6"])])
def test_runs_that_could_not_be_read_together_are_refused_in_one_line(tmp_path, capsys, layout, widths):
    (tmp_path / layout).mkdir(parents=True)
    (tmp_path / layout / "config.json").write_text("{}")
    assert command([*LINE, "--width", *widths, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"found {layout}" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.json"]


@pytest.mark.parametrize(
    ("layout", "line", "found"),
    [
        ("seed0", ["--width", "4", "--lr", "0.02"], "those of seed0 (learning_rate 0.01, now 0.02)"),
        ("seed0", ["--width", "6"], "those of seed0 (width 4, now 6)"),
        ("width4/seed0", ["--width", "4", "6", "--lr", "0.02"], "those of width4/seed0 (learning_rate 0.01, now 0.02)"),
    ],
)
def test_another_seed_with_other_settings_is_refused_in_one_line(tmp_path, capsys, layout, line, found):
    settings = RunSettings(split="5/5", width=4, epochs=1, batch_size=400, learning_rate=0.01, probe_per_class=1)
    (tmp_path / layout).mkdir(parents=True)
    (tmp_path / layout / "config.json").write_text(json.dumps({"settings": settings.to_json(), "facts": {}}))
    assert command([*LINE, *line, "--seeds", "1", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert "Use another --out" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.json"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", '{"split": "5/5", "learning_rate": 1e-2, "width": [4, 6], "seeds": [1, 2]}'),
        ("run.toml", 'split = "5/5"\nlearning_rate = 1e-2\nwidth = [4, 6]\nseeds = [1, 2]\n'),
        ("run.yaml", "split: 5/5\nlearning_rate: 1e-2\nwidth: [4, 6]\nseeds: [1, 2]\n"),
        ("config.json", '{"settings": {"split": "5/5", "learning_rate": 0.01, "width": 4, "seed": 1}, "facts": {}}'),
    ],
)
def test_settings_are_read_from_files(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    sweep = chosen_runs(None, None, file, {"epochs": 2, "width": (), "seeds": ()}).sweep
    assert sweep.settings == RunSettings(split="5/5", learning_rate=0.01, width=4, epochs=2)
    assert list(sweep.runs) == (
        ["seed1"] if name == "config.json" else [f"width{width}/seed{seed}" for width in (4, 6) for seed in (1, 2)]
    )
    assert list(chosen_runs(None, None, file, {"width": (9,), "seeds": (5,)}).sweep.runs) == ["seed5"]


def test_settings_may_have_the_names_of_their_options(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('lr = 0.1\nbs = 8\ntasks = 2\nmemory_kind = "balanced"\nlr-milestones = [1, 2]\nseeds = [3, 4]\n')
    sweep = chosen_runs(None, None, file, {"learning_rate": 0.2}).sweep
    expected = RunSettings(learning_rate=0.2, batch_size=8, num_tasks=2, memory="balanced", lr_milestones=(1, 2))
    assert sweep.settings == expected
    assert sweep.seeds == (3, 4)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("run.json", '{"epochs": 2', "expected JSON, found an error"),
        ("run.toml", "epochs = ", "expected TOML, found an error"),
        ("run.yaml", "epochs: [", "expected YAML, found an error"),
        ("run.json", "[1]", "expected names with values, found list"),
        ("run.ini", "epochs=2", "found .ini"),
        ("run.json", '{"epoch": 2}', "Did you mean epochs"),
        ("run.toml", 'epochs = "2"', 'expected a whole number, found "2"'),
        ("run.yaml", "epochs: true", "expected a whole number, found true"),
        ("run.json", '{"seeds": ["0"]}', "--seeds has a value of the wrong kind"),
        ("run.json", '{"class_order": [1, "a"]}', 'expected a word or a list of whole numbers, found [1, "a"]'),
        ("run.json", '{"lr_milestones": 3}', "expected a list of whole numbers, found 3"),
        ("run.json", '{"task": 3}', "Did you mean tasks"),
        ("run.json", '{"memory_kin": "balanced"}', "Did you mean memory_kind"),
        ("run.json", '{"lr": 0.1, "learning_rate": 0.2}', "have learning_rate twice"),
    ],
)
def test_files_that_cannot_be_meant_are_refused_in_one_line(tmp_path, capsys, name, text, found):
    file = tmp_path / name
    file.write_text(text)
    assert command(["cl-run", "--config", str(file), "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1


# the progress ---------------------------------------------------------------------------------------------------------


def test_the_progress_is_that_of_the_whole_run(tmp_path):
    reports = []
    plan = Plan.of(dataclasses.replace(SETTINGS, epochs=2, batch_size=400, kernels="task"), load_data(SETTINGS))
    learn(plan, LocalFolder(tmp_path, fsync=False), torch.device("cpu"), lambda *report: reports.append(report))
    assert [(stage, done, total) for stage, done, total, _ in reports] == [("training", k, 12) for k in range(1, 13)]
    assert reports[2][3].startswith("task 1/2, epoch 1/2, accuracy 0.")
    assert reports[-1][3].startswith("task 2/2, epoch 2/2, accuracy 0.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rich.console.Console.is_terminal", True)
        with progress_bars("seed 0", quiet=False) as report:
            for stage in ("training", "seed1: training"):
                for done in (1, 2, 3):
                    report(stage, done, 3, "task 1/2")


# what a run will take -------------------------------------------------------------------------------------------------


def test_bytes_and_time_are_projected(trained, tmp_path, capsys):
    plan = Plan.of(dataclasses.replace(SETTINGS, width=8, probe_per_class=2), load_data(SETTINGS))
    random = torch.get_rng_state()
    found = forecast(plan, torch.device("cpu"), seconds=0.1)
    assert torch.equal(torch.get_rng_state(), random)
    described = describe(plan)
    result = found.to_json(described)
    assert result["bytes"]["kernels"] == described["kernels"] * 20 * 20 * 4  # float32
    sizes = LocalFolder(trained / "width8/seed0").sizes()
    stored = sum(size for key, size in sizes.items() if key.endswith(".pt"))
    assert abs(found.checkpoint_bytes - stored) < 0.02 * stored
    assert found.measured_probe in {8, 20}
    seconds = result["projected_seconds"]
    assert min(found.step_seconds, found.evaluation_seconds, found.kernel_seconds) > 0
    assert seconds["training"] == found.step_seconds * described["iterations"]
    assert seconds["total"] == pytest.approx(seconds["training"] + seconds["evaluations"] + seconds["kernels"])


def test_a_dry_run_says_that_its_numbers_are_projected(tmp_path, capsys, monkeypatch):
    made = Forecast(
        step_seconds=2.0, evaluation_seconds=0.5, kernel_seconds=1.0, measured_probe=8, kernel_bytes=10**6,
        checkpoint_bytes=5000,
    )  # fmt: skip
    monkeypatch.setattr("ntkgen.continual.forecast.forecast", lambda *_: made)
    line = [*LINE, *QUICK, "--seeds", "0", "1", "--dry-run", "--out", str(tmp_path / "r")]
    assert command(line) == 0
    out = capsys.readouterr().out
    assert out.startswith("Settings: split 5/5; learning rate 0.01; epochs 1;")
    assert out.count("Settings: ") == 1
    assert "; dense 0; seed 0, 1. The others have their defaults.\n" in out
    assert "\nseed0: 2 tasks, 6 iterations, 3 evaluations, 3 kernels of 10 probe samples\n" in out
    assert out.count("without the start of the program, which takes some seconds") == 2
    assert out.count("projected: 16 s on this machine (training 12 s, evaluations 1.5 s, kernels 3.0 s)") == 2
    assert "on the disk: kernels 3.0 MB, parameters and state 5.0 kB" in out
    assert out.splitlines()[-1] == "2 runs, one after another: projected 33 s"
    assert not (tmp_path / "r").exists()


# side by side ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_side_by_side_have_the_bytes_of_runs_in_turn(trained, tmp_path):
    jobs = [
        Job(
            f"width{width}/seed{seed}",
            dataclasses.replace(SETTINGS, width=width, seed=seed),
            str(tmp_path),
            None,
            "cpu",
        )
        for width, seed in RUNS
    ]
    reports = []
    outcomes = list(train_side_by_side(jobs, 2, lambda *report: reports.append(report)))
    assert sorted(outcome.job.name for outcome in outcomes) == sorted(job.name for job in jobs)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    files, expected = LocalFolder(tmp_path), LocalFolder(trained)
    keys = [key for key in expected.sizes() if not key.endswith(".pt")]
    assert [key for key in keys if files.read(key) != expected.read(key)] == []
    assert {stage for stage, *_ in reports} == {f"{job.name}: training" for job in jobs}


@pytest.mark.slow
def test_a_run_that_fails_in_its_process_does_not_stop_the_others(tmp_path):
    bad = dataclasses.replace(SETTINGS, optimizer="sgd", learning_rate=3e38)
    jobs = [Job("bad", bad, str(tmp_path), None, "cpu"), Job("good", SETTINGS, str(tmp_path), None, "cpu")]
    outcomes = {outcome.job.name: outcome for outcome in train_side_by_side(jobs, 2)}
    assert isinstance(outcomes["bad"].error, DivergedError)
    assert outcomes["good"].error is None


@pytest.mark.slow
def test_an_interrupt_stops_all_processes_and_keeps_what_is_recorded(tmp_path):
    line = [*LINE, "--kernels", "task", "--dense", "0", "--epochs", "5000", "--seeds", "0", "1", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ntkgen", *line, "--out", str(tmp_path / "r")],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    files = [tmp_path / f"r/seed{seed}/checkpoint.pt" for seed in (0, 1)]
    while not all(file.exists() for file in files):
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.strip() == "Interrupted. What was finished before is kept. The same command continues from there."
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert open_run(tmp_path / "r").evaluations.sizes["evaluation"] > 1
