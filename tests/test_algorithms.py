"""Comparisons of algorithms over tasks: what is read, the curves as numbers, and the pictures."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch
from test_cumulative import SETTINGS, blobs, small

from ntkgen.cli import run as command
from ntkgen.continual import algorithms
from ntkgen.continual.algorithms import METRICS, Results, curves_of, list_algorithms, read_results
from ntkgen.continual.learner import learn
from ntkgen.continual.metrics.kernels import Spectrum, distance
from ntkgen.continual.metrics.over_tasks import Curve, of_selected_epochs
from ntkgen.continual.plan import Plan
from ntkgen.continual.plasticity import PlasticitySettings
from ntkgen.continual.plots.plasticity import FIXED, PANELS, draw_algorithms
from ntkgen.continual.reading import open_run
from ntkgen.continual.results_tree import indices
from ntkgen.continual.stored_plasticity import plasticity_of
from ntkgen.errors import InputError, StoreError, UnknownNameError
from ntkgen.files.folder import LocalFolder

FIVE = (
    "base_deep_learning_system", "continual_backpropagation", "head_resetting", "retrained_network",
    "shrink_and_perturb",
)  # fmt: skip
TASKS, EPOCHS = 4, 3


def tree(place, level, seeds=(0, 1, 2)):
    """Write metric directories as the published code does, of 4 tasks of 3 epochs."""
    for seed in seeds:
        files = {}
        accuracy = level + 0.1 * np.arange(TASKS)[:, None] + np.array([0.0, 0.02, 0.01]) + 0.001 * seed
        files["test_accuracy_per_epoch"] = accuracy.ravel()
        files["validation_accuracy_per_epoch"] = np.tile([0.5, 0.4, 0.5], TASKS)
        files["test_loss_per_epoch"] = 1 - accuracy.ravel()
        for name in METRICS:
            if name.endswith("_analysis"):
                files[name] = np.arange(TASKS) * (256.0 if "rank" in name else 0.1) + seed
        files["class_order"] = np.arange(20)
        for name, values in files.items():
            (place / name).mkdir(parents=True, exist_ok=True)
            np.save(place / name / f"index-{seed}.npy", values.astype(np.int64 if "order" in name else np.float32))
        (place / "config_files").mkdir(exist_ok=True)
        config = {"stepsize": 0.1, "early_stopping": True, "epochs": EPOCHS}
        (place / "config_files" / f"index-{seed}.json").write_text(json.dumps(config))
    np.save(place / "experiment_indices.npy", np.array(0))  # without an axis, as the published code


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    place = tmp_path_factory.mktemp("results")
    for level, name in enumerate(FIVE):
        tree(place / name, 0.1 * level)
    return place


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two algorithms with two seeds each, of which one algorithm is analysed."""
    place = tmp_path_factory.mktemp("runs")
    sys.modules["nets"] = types.SimpleNamespace(small=small)
    try:
        for name, surgery in (("base", ()), ("retrained_network", ("reset-network",))):
            for seed in (0, 1):
                settings = dataclasses.replace(SETTINGS, surgery=surgery, seed=seed)
                folder = LocalFolder(place / name / f"seed{seed}", fsync=False)
                learn(Plan.of(settings, blobs()), folder, torch.device("cpu"))
                if name == "base":
                    plasticity_of(open_run(folder), blobs, PlasticitySettings(num_samples=50))
    finally:
        del sys.modules["nets"]
    return place


# curves as numbers ----------------------------------------------------------------------------------------------------


def test_a_curve_is_mean_and_standard_error_over_seeds():
    values = {0: np.array([1.0, 4.0, 9.0]), 2: np.array([3.0, 8.0]), 5: np.array([8.0, 9.0])}
    curve = Curve.of(np.array([5, 10, 15, 20]), values)
    assert curve.classes.tolist() == [5, 10, 15]
    assert curve.mean.tolist() == [4, 7, 9]
    # deviations −3, −1, 4 and −3, 1, 2: s² = 26 / 2 and 14 / 2, and s / √3
    assert curve.standard_error[:2].tolist() == pytest.approx([(13 / 3) ** 0.5, (7 / 3) ** 0.5])
    assert np.isnan(curve.standard_error[2])
    assert curve.num_seeds == 3


def test_relative_curves_are_paired_by_seed():
    values, baseline = {0: np.array([0.5, 0.6]), 1: np.array([0.9])}, {1: np.array([0.7, 0.8]), 0: np.array([0.4, 0.8])}
    curve = Curve.relative(np.array([2, 4]), values, baseline)
    assert curve.mean.tolist() == pytest.approx([0.15, -0.2])
    assert curve.standard_error[0] == pytest.approx(0.05)
    with pytest.raises(InputError, match="found none of seed 1"):
        Curve.relative(np.array([2, 4]), values, {0: np.array([0.4, 0.8])})


def test_the_selected_epoch_is_the_first_best_one_on_validation_samples():
    values, validation = np.arange(6.0), np.array([0.1, 0.3, 0.3, 0.9, 0.2, 0.1])
    assert of_selected_epochs(values, 3, validation).tolist() == [1, 3]
    assert of_selected_epochs(np.arange(7.0), 3).tolist() == [2, 5]


def test_ranks_are_divided_where_the_features_are_known():
    values = {"next_task_stable_rank_analysis": {0: np.array([4.0, 8.0])}}
    known = Results("a", values, np.array([5, 10]), 16)
    unknown = dataclasses.replace(known, name="b", num_features=None)
    metric = "next_task_stable_rank_analysis"
    assert curves_of([known], metric)["a"].mean.tolist() == [0.25, 0.5]
    assert curves_of([known, unknown], metric)["a"].mean.tolist() == [4, 8]


# what is read ---------------------------------------------------------------------------------------------------------


def test_published_trees_are_read(trees):
    folder = LocalFolder(trees)
    assert list_algorithms(folder) == sorted(FIVE)
    assert indices(folder / FIVE[0]) == [0]
    results = read_results(folder, "head_resetting")
    assert (results.num_seen.tolist(), results.num_features) == ([5, 10, 15, 20], 512)
    # the first epoch is the best one on validation samples, although another one is better on the test samples
    assert results.values["test_accuracy_per_epoch"][1] == pytest.approx([0.201, 0.301, 0.401, 0.501])
    assert results.values["test_loss_per_epoch"][1] == pytest.approx([0.799, 0.699, 0.599, 0.499])
    # the first entry of the previous tasks is none
    assert results.values["previous_tasks_stable_rank_analysis"][2].tolist() == [258, 514, 770]
    curve = curves_of([results], "next_task_stable_rank_analysis")["head_resetting"]
    assert curve.mean == pytest.approx(np.array([1, 257, 513, 769]) / 512)
    assert curve.classes.tolist() == [5, 10, 15, 20]
    assert curves_of([results], "weight_magnitude_analysis")["head_resetting"].classes.tolist() == [0, 5, 10, 15]
    assert curves_of([results], "previous_tasks_stable_rank_analysis")["head_resetting"].classes.tolist() == [5, 10, 15]
    baseline = read_results(folder, "retrained_network")
    relative = curves_of([results], algorithms.RELATIVE, baseline)["head_resetting"]
    assert relative.mean == pytest.approx([-0.1] * 4)
    assert relative.standard_error == pytest.approx([0] * 4, abs=1e-8)


def test_a_tree_without_selection_has_the_last_epoch_of_each_task(tmp_path):
    tree(tmp_path / "base", 0.2, seeds=(3,))
    file = tmp_path / "base/config_files/index-3.json"
    file.write_text(json.dumps({"epochs": EPOCHS, "seed": 7, "model": "mlp", "split": "10/5"}))
    results = read_results(LocalFolder(tmp_path), "base")
    assert results.values["test_accuracy_per_epoch"][7] == pytest.approx([0.213, 0.313, 0.413, 0.513])
    assert (results.num_seen.tolist(), results.num_features) == ([10, 15, 20], None)


def test_runs_are_read(runs):
    base = read_results(LocalFolder(runs), "base")
    run = open_run(runs / "base/seed1")
    assert base.num_seen.tolist() == [2, 4, 6]
    assert base.num_features == 16
    assert base.values["test_accuracy_per_epoch"][1].tolist() == run.matrix().seen_accuracy.tolist()
    losses = run.evaluations.loss.values[run.evaluations.trained_task.values == 1][-1]
    assert base.values["test_loss_per_epoch"][1][1] == pytest.approx(losses[:2].mean())
    plasticity = run.plasticity
    assert (
        base.values["previous_tasks_stable_rank_analysis"][1].tolist()
        == plasticity.previous_tasks_rank_99.values[1:].tolist()
    )
    assert base.values["weight_magnitude_analysis"][1].tolist() == plasticity.weight_magnitude.values.tolist()
    K = run.kernels.kernel.values.astype(np.float64)
    assert run.boundary_iterations.tolist() == [0, *run.kernels.iteration.values]  # none of the beginning
    moved = [distance(K[0], K[1]), distance(K[1], K[2])]
    assert base.values["kernel_distance"][1] == pytest.approx([np.nan, np.nan, *moved], nan_ok=True)
    ranks = [Spectrum.of(each).effective_rank for each in K]
    assert base.values["kernel_effective_rank"][1] == pytest.approx([np.nan, *ranks], nan_ok=True)
    other = read_results(LocalFolder(runs), "retrained_network")
    assert other.num_features is None
    assert not other.values["weight_magnitude_analysis"]


def test_samples_of_the_evaluation_are_read(trees, runs, tmp_path):
    assert read_results(LocalFolder(runs), "base").evaluated_on == "test samples"
    assert read_results(LocalFolder(trees), FIVE[0]).evaluated_on == "test samples"  # of the published code
    tree(tmp_path / "mine", 0.2)
    (tmp_path / "mine/evaluated_on").mkdir()
    for seed in range(3):
        (tmp_path / f"mine/evaluated_on/index-{seed}.txt").write_text("validation samples, because\n")
    assert read_results(LocalFolder(tmp_path), "mine").evaluated_on == "validation samples, because"


def test_what_has_no_results_is_refused(trees, runs, tmp_path):
    with pytest.raises(StoreError, match="no results of algorithms"):
        list_algorithms(LocalFolder(tmp_path))
    with pytest.raises(StoreError, match=r"no results of 'redo'.*expected one of base"):
        read_results(LocalFolder(runs), "redo")
    results = [read_results(LocalFolder(runs), "base")]
    with pytest.raises(UnknownNameError, match="metric"):
        curves_of(results, "accuracy")
    with pytest.raises(InputError, match="expected results of retrained_network, found none"):
        curves_of(results, algorithms.RELATIVE)


# pictures -------------------------------------------------------------------------------------------------------------


def test_every_metric_has_a_picture(trees, runs):
    assert set(PANELS) == set(METRICS)
    results = [read_results(LocalFolder(runs), name) for name in ("base", "retrained_network")]
    pictures, left_out = draw_algorithms(results, baseline=results[1])
    assert [each.kind for each in pictures] == ["plasticity", *(name.replace("_", "-") for name in METRICS)]
    assert left_out == {}
    panels = [axes for axes in pictures[0].figure.axes if axes.get_visible()]
    assert len(panels) == 6
    assert {axes.get_xlabel() for axes in panels} == {"number of classes"}


def test_lines_are_the_curves_in_fixed_colours(trees):
    results = [read_results(LocalFolder(trees), name) for name in FIVE]
    (picture,), _ = draw_algorithms(results, ["next_task_dormant_units_analysis"])
    (axes,) = picture.figure.axes
    assert {line.get_label(): line.get_color() for line in axes.lines} == {name: FIXED[name].color for name in FIVE}
    assert len({(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in axes.lines}) == 5
    assert axes.lines[0].get_ydata() == pytest.approx(100 * np.array([1, 1.1, 1.2, 1.3]))
    (reversed_picture,), _ = draw_algorithms(results[:2], ["next_task_dormant_units_analysis"])
    assert [line.get_color() for line in reversed_picture.figure.axes[0].lines] == [
        FIXED[name].color for name in FIVE[:2]
    ]
    unknown = [dataclasses.replace(each, name=f"mine-{each.name}") for each in results]
    (picture,), _ = draw_algorithms(unknown, ["next_task_dormant_units_analysis"])
    assert len({line.get_color() for line in picture.figure.axes[0].lines}) == 5


def test_accuracies_on_validation_samples_are_not_called_test_accuracies(trees):
    test = read_results(LocalFolder(trees), FIVE[0])
    validation = dataclasses.replace(test, name="mine", evaluated_on="validation samples, because")
    for results, title, told in (
        ([test], "Test accuracy", "on the test samples of all classes"),
        ([validation], "Validation accuracy", "on the validation samples of all classes"),
        ([test, validation], "Held-out accuracy", f"({FIVE[0]}: test samples; mine: validation samples, because)"),
    ):
        (picture,), _ = draw_algorithms(results, [algorithms.ACCURACY])
        assert picture.title == title
        assert told in picture.caption
        (picture,), _ = draw_algorithms(results, [algorithms.LOSS])
        assert picture.title == title.replace("accuracy", "loss")


def test_a_picture_names_its_metric_and_its_baseline(trees):
    results = [read_results(LocalFolder(trees), name) for name in FIVE]
    (picture,), _ = draw_algorithms(results[:2], [algorithms.RELATIVE], results[3])
    (axes,) = picture.figure.axes
    assert axes.get_title(loc="left") == picture.title == "Test accuracy relative to retrained_network"
    assert axes.get_ylabel() == "percentage points"
    (picture,), _ = draw_algorithms(results, ["next_task_stable_rank_analysis"])
    (axes,) = picture.figure.axes
    assert axes.get_title(loc="left") == picture.title == "Rank of 99 %, next task"
    assert axes.get_ylabel() == "rank / features"
    assert axes.lines[0].get_ydata() == pytest.approx(np.array([1, 257, 513, 769]) / 512)


def test_ranks_are_named_by_the_algorithms_that_are_drawn(runs):
    results = [read_results(LocalFolder(runs), name) for name in ("base", "retrained_network")]
    (picture,), _ = draw_algorithms(results, ["next_task_stable_rank_analysis"])
    (axes,) = picture.figure.axes
    assert [line.get_label() for line in axes.lines] == ["base"]  # the other one is not analysed
    assert axes.get_ylabel() == "rank / features"
    assert axes.lines[0].get_ydata().max() <= 1


def test_numbers_of_classes_are_whole(runs):
    results = [read_results(LocalFolder(runs), "base")]
    (picture,), _ = draw_algorithms(results, [algorithms.ACCURACY])
    ticks = picture.figure.axes[0].get_xticks()
    assert len(ticks) > 1
    assert ticks.tolist() == np.round(ticks).tolist()


def test_the_command_draws_as_the_predecessor_did(trees, tmp_path, capsys):
    line = ["cl-plot", str(trees), "--algorithms", ",".join(FIVE), "--metric", "relative_accuracy_per_epoch"]
    assert command([*line, "-o", str(tmp_path), "--format", "svg", "png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = [made["file"] for made in found["pictures"]]
    assert [file.rsplit(".", 1)[1] for file in files] == ["svg", "png"]
    assert (tmp_path / f"{trees.name}-relative-accuracy-per-epoch.svg").read_bytes().startswith(b"<?xml")
    assert (
        "on the test samples of all classes so far, at the end of each task, minus that of retrained_network"
        in found["pictures"][0]["caption"]
    )


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--algorithms", "base", "--baseline", "nothing"], "no results of 'nothing'"),
        (["--algorithms", "base", "--metric", "next_task_ranks"], "Unknown metric 'next_task_ranks'"),
        (["--algorithms", ","], "names none"),
        (["--algorithms", "retrained_network", "--metric", "weight_magnitude_analysis"], "No algorithm has values"),
    ],
)
def test_comparisons_that_cannot_be_are_refused_in_one_line(runs, tmp_path, capsys, options, found):
    assert command(["cl-plot", str(runs), *options, "-o", str(tmp_path)]) != 0
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1


def test_a_missing_baseline_is_refused_in_one_line(trees, tmp_path, capsys):
    (tmp_path / "base").symlink_to(trees / FIVE[0])
    line = ["cl-plot", str(tmp_path), "--metric", "relative_accuracy_per_epoch", "-o", str(tmp_path / "plots")]
    assert command(line) == 2
    error = capsys.readouterr().err
    assert "no baseline: expected results of retrained_network" in error
    assert error.count("\n") == 1
    assert command(["cl-plot", str(trees), *line[2:], "--baseline", FIVE[0]]) == 0
