"""What `cl-analyze` computes from stored parameters: plasticity and kernels at the boundaries of a run."""

import csv
import dataclasses
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import xarray
from test_cumulative import SETTINGS, blobs, small

import ntkgen
from ntkgen.cli import run as command
from ntkgen.cli.cl_collection import file_stem
from ntkgen.continual import boundary_kernels
from ntkgen.continual.boundary_kernels import BoundaryKernelSettings, record_boundary_kernels
from ntkgen.continual.learner import learn
from ntkgen.continual.metrics.kernels import Spectrum, centred_distance, distance
from ntkgen.continual.metrics.loss_weighted import weighted_contrasts
from ntkgen.continual.plan import Plan
from ntkgen.continual.plasticity import PlasticitySettings, measure_plasticity
from ntkgen.continual.reading import open_run
from ntkgen.continual.results_tree import index_of, published_arrays, read_metric, write_analysis, write_results_tree
from ntkgen.continual.stored_plasticity import plasticity_of
from ntkgen.continual.streams.views import NEXT, PREVIOUS, VIEWS, samples_of
from ntkgen.errors import FingerprintError, InputError, StoreError, UnknownNameError
from ntkgen.files.folder import LocalFolder

CPU = torch.device("cpu")
FEW = BoundaryKernelSettings(num_samples=8, output="full")
UNITS = PlasticitySettings(num_samples=50, threshold=0.51)


@pytest.fixture(scope="module", autouse=True)
def nets():
    sys.modules["nets"] = types.SimpleNamespace(small=small)
    yield
    del sys.modules["nets"]


def done(place, settings):
    run = learn(Plan.of(settings, blobs()), LocalFolder(place, fsync=False), CPU)
    return run.watch.seconds


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three tasks of two classes each, and its seconds."""
    place = tmp_path_factory.mktemp("runs") / "seed0"
    return place, done(place, SETTINGS)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, to which something may be added."""
    shutil.copytree(finished[0], tmp_path / "seed0")
    return open_run(tmp_path / "seed0")


def refuse():
    raise AssertionError("nothing must be measured again")


def files_of(run, *names):
    folder = LocalFolder(run.folder.path)
    return {key: folder.read(key) for key in folder.sizes() if key.startswith(names)}


# plasticity -----------------------------------------------------------------------------------------------------------


def test_measured_plasticity_is_stored_beside_the_run(run):
    before = files_of(run, "")
    with pytest.raises(StoreError, match="cl-analyze --units"):
        _ = run.plasticity
    found = plasticity_of(run, blobs, UNITS)
    expected = measure_plasticity(run, blobs(), UNITS)
    assert set(found.data_vars) == set(expected.arrays())
    for name, values in expected.arrays().items():
        assert np.array_equal(found[name].values, values, equal_nan=True), name
    assert open_run(run.folder.path).plasticity.identical(found)
    assert found.num_classes.values.tolist() == [0, 2, 4, 6]
    assert found.class_label.values.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.attrs["ntkgen_plasticity"]["num_features"] == 16
    after = files_of(run, "")
    assert {key: after[key] for key in before} == before
    assert all(key.startswith("plasticity.zarr/") for key in after.keys() - before.keys())


def test_plasticity_is_measured_again_only_with_other_settings(run):
    first = plasticity_of(run, blobs, UNITS)
    assert plasticity_of(run, refuse, UNITS).identical(first)
    others = dataclasses.replace(UNITS, threshold=0.2)
    second = plasticity_of(run, blobs, others)
    assert (second.next_task_dormant_units < first.next_task_dormant_units).any()
    assert plasticity_of(run, refuse, others).identical(second)


def test_plasticity_is_measured_again_after_more_tasks(run):
    (run.folder.path / "models/task2.pt").rename(run.folder.path / "hidden")
    assert plasticity_of(run, blobs, UNITS).sizes["boundary"] == 3
    (run.folder.path / "hidden").rename(run.folder.path / "models/task2.pt")
    assert plasticity_of(run, blobs, UNITS).sizes["boundary"] == 4


def test_a_measurement_that_was_interrupted_is_not_read(run, monkeypatch):
    plasticity_of(run, blobs, UNITS)
    monkeypatch.setattr("ntkgen.continual.stored_plasticity.Series.create", refuse)
    with pytest.raises(TypeError):
        plasticity_of(run, blobs, dataclasses.replace(UNITS, threshold=0.2))
    assert not run.has_plasticity
    assert not list(run.folder.path.glob("*.lock"))


def test_the_tree_gets_the_published_arrays(finished, run):
    tree = run.folder.parent
    assert index_of(run) is None
    write_results_tree(tree, run, 7, finished[1])
    found = plasticity_of(run, blobs, UNITS)
    folder, index = index_of(run)
    assert (str(folder), index) == (str(tree), 7)
    write_analysis(folder, index, found)
    arrays = {path.parent.name: np.load(path) for path in tree.path.glob("*/index-7.npy")}
    analysis = {name: array for name, array in arrays.items() if name.endswith("_analysis")}
    measures = ("dormant_units", "effective_rank", "stable_rank")
    assert sorted(analysis) == sorted(
        ["weight_magnitude_analysis", *(f"{view}_{name}_analysis" for view in VIEWS for name in measures)]
    )
    assert {(array.shape, array.dtype.name) for array in analysis.values()} == {((3,), "float32")}
    ranks = np.float32(found[f"{PREVIOUS}_rank_99"].values[:3])
    assert analysis["previous_tasks_stable_rank_analysis"].tolist() == [0, *ranks[1:]]
    assert analysis["next_task_stable_rank_analysis"].tolist() == found[f"{NEXT}_rank_99"].values[:3].tolist()
    assert np.array_equal(arrays["accuracy_per_class_in_order"], np.float32(found.class_accuracy.values))
    assert (
        read_metric(tree, "next_task_stable_rank_analysis")[7].tolist() == found[f"{NEXT}_rank_99"].values[:3].tolist()
    )


def test_a_run_of_another_seed_is_not_of_the_tree(finished, run):
    write_results_tree(run.folder.parent, run, 7, finished[1])
    file = run.folder.parent.path / "config_files/index-7.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": 5}))
    assert index_of(run) is None


def test_published_arrays_have_no_entry_of_the_end():
    data = {f"{view}_{name}": ("boundary", [1.0, 2.0, 3.0]) for view in VIEWS for name in
            ("dormant_units", "effective_rank", "rank_99")}  # fmt: skip
    found = published_arrays(xarray.Dataset({**data, "weight_magnitude": ("boundary", [4.0, 5.0, 6.0])}))
    assert found["weight_magnitude_analysis"].tolist() == [4, 5]
    assert found["next_task_stable_rank_analysis"].tolist() == [1, 2]
    assert found["previous_tasks_dormant_units_analysis"].tolist() == [0, 2]
    assert "accuracy_per_class_in_order" not in found


# kernels --------------------------------------------------------------------------------------------------------------


def network_at(run, boundary):
    net = small(6)
    name = f"task{boundary - 1}" if boundary else "start"
    net.load_state_dict(torch.load(run.folder.path / f"models/{name}.pt", weights_only=True))
    return net.eval()


def ids_of(run, view, boundary, limit=8):
    data = blobs()
    stream = Plan.of(run.settings, data).stream
    return samples_of(view, stream, data.labels, boundary, limit, run.settings.seed)


@pytest.mark.numeric
def test_kernels_at_boundaries_are_products_of_jacobians(run):
    record_boundary_kernels(run, blobs(), FEW)
    for view, boundaries in ((NEXT, [0, 1, 2]), (PREVIOUS, [1, 2, 3])):
        found = run.boundary_kernels(view)
        assert found.kernel.shape == (3, 48, 48)
        assert found.boundary.values.tolist() == boundaries
        assert found.iteration.values.tolist() == run.boundary_iterations[boundaries].tolist()
        for time, boundary in enumerate(boundaries):
            ids = ids_of(run, view, boundary)
            x = blobs().train.inputs(torch.from_numpy(ids)).double()
            net = network_at(run, boundary).double()
            expected = ntkgen.reference_ntk(net, x).numpy()
            K = found.kernel.values[time].astype(np.float64)
            assert np.abs(K - expected).max() < 1e-5 * np.abs(expected).max()
            assert np.array_equal(K, K.T)
            assert np.linalg.eigvalsh(K)[0] > -1e-5 * np.linalg.eigvalsh(K)[-1]
            at = found.isel(time=time)
            assert at.row_sample_id.values.tolist() == np.repeat(ids, 6).tolist()
            assert at.row_output.values.tolist() == list(range(6)) * 8
            labels = np.repeat(blobs().labels[ids], 6)
            assert at.row_label.values.tolist() == labels.tolist()
            tasks = np.full(48, boundary) if view == NEXT else labels // 2
            assert at.row_task.values.tolist() == tasks.tolist()
            assert float(at.epoch) == 3 * boundary
            with torch.no_grad():
                assert np.abs(at.logits.values - net(x).numpy()).max() < 1e-4


def test_a_view_with_fewer_samples_is_padded(run):
    record_boundary_kernels(run, blobs(), BoundaryKernelSettings(num_samples=100, output="trace"))
    found = run.boundary_kernels(PREVIOUS)
    assert found.kernel.shape == (3, 100, 100)
    known = ~np.isnan(np.diagonal(found.kernel.values, axis1=1, axis2=2))
    assert known.sum(1).tolist() == [80, 100, 100]
    assert (found.row_sample_id.values >= 0).tolist() == known.tolist()
    metrics = run.boundary_kernel_metrics(PREVIOUS)
    block = found.kernel.values[0, :80, :80].astype(np.float64)
    assert metrics.effective_rank.values[0] == pytest.approx(Spectrum.of(block).effective_rank)
    assert np.isfinite(metrics.alignment.values).all()


def test_finished_kernels_are_not_computed_again_and_a_killed_computation_ends_the_same(run, finished, monkeypatch):
    record_boundary_kernels(run, blobs(), FEW)
    straight = files_of(run, "next", "previous")
    for key in straight:
        (run.folder.path / key).unlink()
    real, moments = boundary_kernels._measured, []

    def measured(*args):
        if len(moments) in {2, 4}:
            moments.append(None)
            raise KeyboardInterrupt
        moments.append(args[2])
        return real(*args)

    monkeypatch.setattr(boundary_kernels, "_measured", measured)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            record_boundary_kernels(run, blobs(), FEW)
    record_boundary_kernels(run, blobs(), FEW)
    assert [each for each in moments if each is not None] == [0, 1, 2, 1, 2, 3]
    assert files_of(run, "next", "previous") == straight
    record_boundary_kernels(run, blobs(), FEW)
    assert len(moments) == 8


@pytest.mark.numeric
def test_metrics_of_boundaries_are_those_of_the_kernels(run):
    record_boundary_kernels(run, blobs(), FEW)
    found, metrics = run.boundary_kernels(NEXT), run.boundary_kernel_metrics(NEXT)
    K = found.kernel.values.astype(np.float64)
    spectra = [Spectrum.of(each, 2.0**-23) for each in K]
    for name in ("effective_rank", "rank_99", "numerical_rank", "condition_bound"):
        assert metrics[name].values.tolist() == pytest.approx([getattr(each, name) for each in spectra])
    x = blobs().train.inputs(torch.from_numpy(ids_of(run, NEXT, 2))).double()
    before = ntkgen.reference_ntk(network_at(run, 1).double(), x).numpy()
    assert np.isnan(metrics.previous_distance.values[0])
    assert metrics.previous_distance.values[2] == pytest.approx(distance(before, K[2]), rel=1e-3)
    assert metrics.previous_centred_distance.values[2] == pytest.approx(centred_distance(before, K[2], 6), rel=1e-3)
    steps = np.diff(run.boundary_iterations)
    velocity = metrics.previous_distance.values[1:] / steps[:2]
    assert metrics.mean_velocity.values[1:] == pytest.approx(velocity)
    weighted = run.boundary_kernel_metrics(NEXT, weighted=True)
    block = weighted_contrasts(K[1], np.where(np.arange(6) < 4, found.logits.values[1], np.nan))
    assert weighted.effective_rank.values[1] == pytest.approx(Spectrum.of(block).effective_rank)


def test_outputs_of_the_classes_so_far_are_kept(run):
    record_boundary_kernels(run, blobs(), dataclasses.replace(FEW, output="seen"))
    for view in VIEWS:
        diagonals = np.diagonal(run.boundary_kernels(view).kernel.values, axis1=1, axis2=2)
        known = ~np.isnan(diagonals.reshape(3, 8, 6))
        assert known.all(1).sum(1).tolist() == [2, 4, 6]
        assert np.isfinite(run.boundary_kernel_metrics(view).effective_rank.values).all()


def test_a_growing_head_has_no_distance_where_it_grows(tmp_path):
    done(tmp_path / "seed0", dataclasses.replace(SETTINGS, head="growing"))
    run = open_run(tmp_path / "seed0")
    record_boundary_kernels(run, blobs(), FEW)
    assert np.isnan(run.boundary_kernels(PREVIOUS).previous_distance.values[1:]).all()
    known = ~np.isnan(np.diagonal(run.boundary_kernels(NEXT).kernel.values, axis1=1, axis2=2))
    assert known.sum(1).tolist() == [16, 16, 32]


def test_kernels_of_other_settings_are_not_mixed(run):
    record_boundary_kernels(run, blobs(), FEW)
    with pytest.raises(FingerprintError, match="num_samples differs, expected 8, found 9"):
        record_boundary_kernels(run, blobs(), dataclasses.replace(FEW, num_samples=9))


def test_what_is_not_there_is_said(run):
    with pytest.raises(StoreError, match=r"no kernels of the next task.*--boundary-kernels"):
        run.boundary_kernels(NEXT)
    with pytest.raises(UnknownNameError, match="view"):
        run.boundary_kernels("last_task")
    with pytest.raises(InputError, match="positive `num_samples`"):
        BoundaryKernelSettings(num_samples=0)
    with pytest.raises(InputError, match="full, seen"):
        run.loss_weighted_metrics()  # the run has kernels of `trace`


# the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory):
    """Runs of two seeds of a data set that the command can load."""
    place = tmp_path_factory.mktemp("digits")
    line = ["cl-run", "--stream", "cumulative", "--split", "5/5", "--head", "masked", "--width", "4", "--epochs", "1"]
    line += ["--bs", "300", "--kernels", "task", "--output", "full", "--probe-per-class", "1", "--out", str(place)]
    assert command([*line, "--seeds", "0", "1", "-q"]) == 0
    return place


LOOKS = ("--units", "--boundary-kernels", "--loss-weighted", "--view-samples", "6", "-q")


def test_the_command_prints_a_table_for_each_view(of_digits, capsys):
    assert command(["cl-analyze", str(of_digits / "seed0"), *LOOKS]) == 0
    out = capsys.readouterr().out
    for title in ("units on the next task", "units on the previous tasks", "kernels of the next task",
                  "loss-weighted kernels of the probe", "loss-weighted kernels of the previous tasks",
                  "accuracy on each class at the end, in the order of arrival"):  # fmt: skip
        assert title in out, title
    lines = out.splitlines()
    place = lines.index(next(line for line in lines if "units on the next task" in line))
    row = lines[place + 2].split()
    stored = open_run(of_digits / "seed0").plasticity
    assert row[:2] == ["0", "0"]
    assert float(row[3]) == pytest.approx(float(stored.next_task_effective_rank[0]), rel=1e-3)


def test_the_command_gives_the_same_as_json(of_digits, capsys):
    assert command(["cl-analyze", str(of_digits / "seed0"), *LOOKS, "--json"]) == 0
    found, run = json.loads(capsys.readouterr().out), open_run(of_digits / "seed0")
    values = run.plasticity.previous_tasks_dormant_units.values
    assert found["plasticity"]["previous_tasks_dormant_units"] == [None, *values[1:]]
    assert found["plasticity"]["ntkgen_plasticity"]["num_samples"] == 6
    assert found["next_task_kernels"]["boundary"] == [0, 1]
    assert found["loss_weighted_previous_tasks_kernels"]["boundary"] == [1, 2]
    assert len(found["loss_weighted_kernels"]["effective_rank"]) == run.kernels.sizes["time"]


def test_several_seeds_are_shown_together(of_digits, capsys):
    assert command(["cl-analyze", str(of_digits), "--units", "--view-samples", "6", "-q"]) == 0
    out = capsys.readouterr().out
    runs = open_run(of_digits)
    means = runs.plasticity.weight_magnitude.mean("seed").values
    assert f"{means[1]:.4g} ± " in out
    assert runs.plasticity.sizes["seed"] == 2
    assert command(["cl-analyze", str(of_digits), "--units", "--view-samples", "6", "-q", "--json"]) == 0
    assert all("plasticity" in each for each in json.loads(capsys.readouterr().out)["runs"])


def test_the_command_without_these_options_says_nothing_of_them(of_digits, capsys):
    assert command(["cl-analyze", str(of_digits / "seed1")]) == 0
    assert "units on" not in capsys.readouterr().out


def test_views_are_loss_weighted_although_the_kernels_of_the_run_are_not(run, monkeypatch, capsys):
    monkeypatch.setattr("ntkgen.continual.plan.load_data", lambda *_: blobs())
    line = ["cl-analyze", str(run.folder.path), "--loss-weighted", "--view-samples", "6", "-q", "--json"]
    assert command([*line, "--boundary-kernels", "--view-output", "seen"]) == 0
    found, told = capsys.readouterr()
    assert "'trace'" in told
    assert told.count("\n") == 1
    assert "loss_weighted_kernels" not in (result := json.loads(found))
    expected = run.boundary_kernel_metrics(NEXT, weighted=True).effective_rank.values
    assert result["loss_weighted_next_task_kernels"]["effective_rank"] == expected.tolist()


def test_a_loss_weighted_kernel_that_nothing_has_is_refused_before_anything_is_computed(run, monkeypatch, capsys):
    monkeypatch.setattr("ntkgen.continual.plan.load_data", refuse)
    for options in ([], ["--units"], ["--boundary-kernels"], ["--boundary-kernels", "--view-output", "sum"]):
        assert command(["cl-analyze", str(run.folder.path), "--loss-weighted", "-q", *options]) == 2
        out, error = capsys.readouterr()
        assert not out
        assert "--view-output" in error
        assert error.count("\n") == 1


def test_the_probe_is_loss_weighted_although_the_views_are_not(of_digits, tmp_path, capsys):
    not_views = shutil.ignore_patterns("*_task*_kernels.zarr")
    shutil.copytree(of_digits / "seed0", tmp_path / "seed0", ignore=not_views)
    line = ["cl-analyze", str(tmp_path / "seed0"), "--loss-weighted", "--boundary-kernels", "--view-output", "trace"]
    assert command([*line, "--view-samples", "6", "-q", "--json"]) == 0
    found, told = capsys.readouterr()
    assert "views" in told
    names = [name for name in json.loads(found) if name.startswith("loss_weighted")]
    assert names == ["loss_weighted_kernels"]


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (["--threshold", "0.01"], "--units"),
        (["--batch-norm", "batch", "--boundary-kernels"], "--units"),
        (["--view-output", "seen", "--units"], "--boundary-kernels"),
        (["--view-samples", "9", "--loss-weighted"], "--units or --boundary-kernels"),
    ],
)
def test_options_without_effect_are_refused(of_digits, capsys, options, needed):
    assert command(["cl-analyze", str(of_digits / "seed0"), *options]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert f"{options[0]} has no effect: expected {needed} beside it" in error
    assert error.count("\n") == 1


def rows_of(place, folder, name):
    with (folder / f"{file_stem(place)}-{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_tables_have_what_is_measured_at_boundaries(of_digits, tmp_path):
    assert command(["cl-analyze", str(of_digits / "seed0"), *LOOKS, "--csv", str(tmp_path)]) == 0
    run = open_run(of_digits / "seed0")
    units = rows_of(of_digits / "seed0", tmp_path, "plasticity")
    assert [row["boundary"] for row in units] == ["0", "1", "2"]
    assert [row["num_classes"] for row in units] == ["0", "5", "10"]
    assert [float(row["next_task_stable_rank"]) for row in units[:2]] == run.plasticity.next_task_stable_rank.values[
        :2
    ].tolist()
    assert units[0]["previous_tasks_rank_99"] == ""  # there are none
    assert [row["class_label"] for row in rows_of(of_digits / "seed0", tmp_path, "plasticity-of-classes")] == [
        str(k) for k in range(10)
    ]
    kernels = rows_of(of_digits / "seed0", tmp_path, "previous-tasks-kernels")
    assert [row["boundary"] for row in kernels] == ["1", "2"]
    expected = run.boundary_kernel_metrics(PREVIOUS)
    assert [float(row["effective_rank"]) for row in kernels] == expected.effective_rank.values.tolist()
    assert len(rows_of(of_digits / "seed0", tmp_path, "loss-weighted-kernels")) == run.kernels.sizes["time"]
    assert len(rows_of(of_digits / "seed0", tmp_path, "loss-weighted-next-task-kernels")) == 2


def test_tables_of_several_seeds_have_a_row_for_each(of_digits, tmp_path):
    line = ["cl-analyze", str(of_digits), *LOOKS, "--rank-tolerance", "0.3", "1e-3", "--csv", str(tmp_path)]
    assert command(line) == 0
    names = ["plasticity", "next-task-kernels", "loss-weighted-kernels", "loss-weighted-previous-tasks-kernels"]
    for name in [*names, *(f"{name}-numerical-rank" for name in names), "numerical-rank"]:
        seeds = [row["seed"] for row in rows_of(of_digits, tmp_path, name)]
        assert sorted(set(seeds)) == ["0", "1"]
        assert seeds.count("0") == seeds.count("1")
    rows = [row for row in rows_of(of_digits, tmp_path, "plasticity") if row["seed"] == "1"]
    magnitudes = open_run(of_digits / "seed1").plasticity.weight_magnitude.values
    assert [float(row["weight_magnitude"]) for row in rows] == magnitudes.tolist()


def test_several_tolerances_of_the_numerical_rank(of_digits, tmp_path, capsys):
    shutil.copytree(of_digits / "seed0", tmp_path / "seed0")
    line = ["cl-analyze", str(tmp_path / "seed0"), *LOOKS, "--rank-tolerance", "0.3", "1e-3"]
    assert command([*line, "--csv", str(tmp_path / "csv")]) == 0
    out = capsys.readouterr().out
    heads = [text for text in out.splitlines() if "eff. rank" in text and "finished" in text]
    assert len(heads) == 7  # units, kernels and loss-weighted kernels of two views, and those of the probe
    assert all("rank > 0.3 rank > 0.001" in " ".join(head.split()) for head in heads)
    run = open_run(tmp_path / "seed0")
    units, measured = run.plasticity, run.boundary_kernel_metrics(PREVIOUS, (0.3, 1e-3))
    assert units.previous_tasks_numerical_rank.dims == ("boundary", "rank_tolerance")
    assert units.rank_tolerance.values.tolist() == measured.rank_tolerance.values.tolist() == [0.3, 1e-3]
    assert np.isnan(units.previous_tasks_numerical_rank.values[0]).all()
    assert command([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for data, name, values in (
        (found["plasticity"], "next_task_numerical_rank", units.next_task_numerical_rank),
        (found["previous_tasks_kernels"], "numerical_rank", measured.numerical_rank),
    ):
        assert data[name] == [[None if np.isnan(x) else x for x in row] for row in values.values.tolist()]
    rows = rows_of(tmp_path / "seed0", tmp_path / "csv", "previous-tasks-kernels-numerical-rank")
    assert [(row["boundary"], row["rank_tolerance"]) for row in rows] == [
        (boundary, tolerance) for boundary in "12" for tolerance in ("0.3", "0.001")
    ]
    assert [float(row["numerical_rank"]) for row in rows] == measured.numerical_rank.values.ravel().tolist()


def test_plasticity_of_several_tolerances_is_kept(run):
    several = dataclasses.replace(UNITS, rank_tolerance=(0.3, 1e-3))
    first = plasticity_of(run, blobs, several).load()
    assert plasticity_of(run, refuse, several).identical(first)
    one = plasticity_of(run, blobs, dataclasses.replace(UNITS, rank_tolerance=1e-3))
    np.testing.assert_array_equal(one.next_task_numerical_rank, first.next_task_numerical_rank.sel(rank_tolerance=1e-3))
