"""Slowly changing regression from the command line, its table and its picture."""

import csv
import json

import numpy as np
import pytest
import xarray

from ntkgen.analysis.plots.style import render
from ntkgen.cli import run as command
from ntkgen.continual.plots.slow_regression import draw_slow_regression
from ntkgen.continual.slow_regression.record import read_bins
from ntkgen.continual.slow_regression.summary import LAST_BINS, outcomes

LINE = ("cl-run", "--stream", "slow-regression", "-q")


def bins_of(errors):  # (bin, algorithm, seed)
    errors = np.array(errors, np.float64)
    sizes = dict(zip(("bin", "algorithm", "seed"), errors.shape, strict=True))
    names = [f"algorithm {index}" for index in range(sizes["algorithm"])]
    zeros = np.zeros(errors.shape)
    data = {"error": errors, "dead_units": zeros + np.arange(sizes["bin"])[:, None, None], "weight_magnitude": zeros}
    found = xarray.Dataset({name: (("bin", "algorithm", "seed"), value) for name, value in data.items()})
    return found.assign_coords(algorithm=names, samples=("bin", 10 * np.arange(1, sizes["bin"] + 1)))


def test_outcomes_by_hand():
    assert LAST_BINS == 3
    (found,) = outcomes(bins_of([[[4.0, 2.0]], [[1.0, 1.0]], [[2.0, 3.0]], [[3.0, 5.0]]]))
    assert (found.first.mean, found.last.mean) == (3.0, 2.5)
    assert found.last.deviation == pytest.approx(2**-0.5)  # of 2 and 3
    assert found.increase.mean == 1.5  # from 1 to 2, and from 1 to 3
    assert (found.dead_units.mean, found.dead_units.n) == (3.0, 2)


def test_the_picture_says_what_it_shows():
    picture = draw_slow_regression(bins_of(np.random.default_rng(0).random((5, 2, 3))))
    assert "means over 3 seeds, bands are ± one standard error" in picture.caption
    left, right = picture.figure.axes
    assert [line.get_label() for line in left.get_lines()] == ["algorithm 0", "algorithm 1"]
    assert left.get_lines()[0].get_xdata().tolist() == [10, 20, 30, 40, 50]
    assert right.get_lines()[0].get_ydata().tolist() == [0, 1, 2, 3, 4]
    assert render(picture, "png").startswith(b"\x89PNG")


def test_a_run_continues_where_it_was(tmp_path, capsys):
    place = str(tmp_path / "r")
    options = ["--samples", "40000", "--seeds", "3", "5", "--method", "base", "--lr", "0.02", "--width", "4"]
    assert command([*LINE, *options, "--json", "--out", place]) == 0
    found = json.loads(capsys.readouterr().out)
    settings = found["settings"]
    assert (settings["algorithms"], settings["seeds"], settings["units"]) == (["base"], [3, 5], 4)
    assert (settings["learning_rate"], settings["num_samples"]) == (0.02, 40_000)
    bins = read_bins(place)
    assert found["algorithms"][0]["first"]["mean"] == pytest.approx(float(bins.error.isel(bin=0).mean()))
    assert command([*LINE, *options, "--out", place]) == 0
    shown = capsys.readouterr().out
    assert f"{place}: 40,000 samples, 2 seeds" in shown
    assert "base" in shown
    for option in (["--units"], ["--boundary-kernels"], ["--dt", "3"], ["--rank-tolerance", "0"], ["--loss-weighted"]):
        assert command(["cl-analyze", place, *option]) == 2
        refused = capsys.readouterr()
        assert not refused.out
        assert f"{option[0]} does not apply" in refused.err
        assert refused.err.count("\n") == 1
    assert command(["cl-analyze", place]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == shown.splitlines()[1:]
    assert command(["cl-analyze", place, "--csv", str(tmp_path / "csv")]) == 0
    (table,) = (tmp_path / "csv").iterdir()
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert table.name == f"{tmp_path.name}-r-bins.csv"
    assert [(row["samples"], row["algorithm"], row["seed"]) for row in rows] == [
        (samples, "base", seed) for samples in ("20000", "40000") for seed in ("3", "5")
    ]
    assert [float(row["error"]) for row in rows] == bins.error.values.ravel().tolist()
    assert command(["cl-plot", place, "--out", str(tmp_path / "plots")]) == 0
    assert [path.name for path in (tmp_path / "plots").iterdir()] == [f"{tmp_path.name}-r-slow-regression.png"]


def test_settings_are_read_from_a_file(tmp_path, capsys):
    (tmp_path / "slow.toml").write_text('stream = "slow-regression"\nnum_samples = 20000\nactivation = "tanh"\n')
    assert command(["cl-run", "--config", str(tmp_path / "slow.toml"), "--seeds", "1", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["networks"], found["bins"], found["settings"]["activation"]) == (4, 1, "tanh")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (["--split", "2/2"], "--split does not apply to --stream slow-regression"),
        (["--experiment-index", "1"], "--experiment-index does not apply to --stream slow-regression"),
        (["--verbose"], "--verbose does not apply to --stream slow-regression"),
        (["--workers", "2"], "--workers does not apply to --stream slow-regression"),
        (["--device", "cuda"], "--device does not apply to --stream slow-regression"),
        (["--method", "lwf"], "Unknown algorithm of slowly changing regression 'lwf'"),
        (["--width", "4", "5"], "networks of one width: expected one number, found 2"),
        (["--samples", "30000"], "The last bin would not be full"),
        (["--preset", "eth-cifar10"], "--preset does not apply to --stream slow-regression"),
        (["--seeds", "1", "1"], "each value once"),
    ],
)
def test_runs_that_cannot_be_are_refused_in_one_line(tmp_path, capsys, bad, found):
    assert command([*LINE, *bad, "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_samples_belong_to_a_stream_of_samples(tmp_path, capsys):
    assert command(["cl-run", "--samples", "10", "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "--samples applies to streams of single samples alone, such as slow-regression" in error
    assert error.count("\n") == 1


def test_a_setting_of_a_file_that_is_none_of_this_stream(tmp_path, capsys):
    (tmp_path / "slow.json").write_text('{"stream": "slow-regression", "utility": 0.9}')
    assert command(["cl-run", "--config", str(tmp_path / "slow.json"), "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "There is no setting 'utility' of slowly changing regression. Did you mean" in error


def test_a_run_of_one_bin_has_one_error(tmp_path, capsys):
    (found,) = outcomes(bins_of([[[4.0, 2.0]]]))
    assert (found.first, found.increase, found.last.mean) == (None, None, 3.0)
    (found,) = outcomes(bins_of([[[4.0, 2.0]], [[1.0, 2.0]]]))  # the first bin is none of the last ones
    assert (found.first.mean, found.last.mean) == (3.0, 1.5)
    options = ["--samples", "20000", "--seeds", "0", "--method", "base", "--out", str(tmp_path / "r")]
    assert command([*LINE, *options]) == 0
    shown = capsys.readouterr().out
    assert "one bin" in shown
    assert "first error" not in shown
    assert command([*LINE, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["algorithms"][0]["first"] is None
