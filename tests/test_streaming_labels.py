"""Names of learners: everything in which the combinations of some runs differ."""

import json

import pytest

from ntkgen.cli import run as command
from ntkgen.continual.plots.streaming import curves_of
from ntkgen.continual.streaming.grid import read_grid
from ntkgen.continual.streaming.labels import labels, read_streams
from ntkgen.continual.streaming.settings import StreamingSettings

GRID = {
    "stream": "label-permuted", "dataset": "digits", "model": "mlp-stream", "num_samples": 4, "samples_per_task": 2,
    "learners": {"pgd": {"learning_rate": [0.1, 0.01], "sigma": [0.1, 0.2]}},
}  # fmt: skip


def named(*runs):
    return labels([StreamingSettings(**each) for each in runs], [f"runs/{index}" for index in range(len(runs))])


@pytest.mark.parametrize(
    ("networks", "learners"),
    [(64, GRID["learners"]), (2, GRID["learners"]), (1, GRID["learners"]),
     (2, {"usgd": {"learning_rate": [1, 2], "bins": ["tasks", "published"]}, "sgd": {"learning_rate": [1]}})],
)  # fmt: skip
def test_the_combinations_of_a_grid_have_names_of_their_own(networks, learners, tmp_path):
    (tmp_path / "g.json").write_text(json.dumps({**GRID, "learners": learners}))
    runs = read_grid(tmp_path / "g.json", networks)
    names = [name for own in labels(list(runs.values()), [f"out/{name}" for name in runs]) for name in own]
    assert len(set(names)) == len(names) == sum(each.num_members for each in runs.values())
    assert not any(", in " in name for name in names)
    assert any("0.2" in name for name in names) == ("pgd" in learners)


def test_a_name_has_what_differs_and_nothing_else():
    assert named({"method": "pgd", "sigma": 0.5, "bins": "published"}) == [["pgd"]]
    assert named({"method": "sgd"}, {"method": "sgd", "bins": "published", "kernels_every": 2}) == [
        ["sgd, bins tasks"], ["sgd, bins published"],
    ]  # fmt: skip
    equal, published = named({"method": "usgd"}, {"method": "usgd", "compat": True})
    assert "compat no" in equal[0]
    assert "compat yes" in published[0]
    assert named({"method": "sgd", "seeds": (0, 1)}, {"method": "usgd"}) == [["sgd, seeds 0-1"], ["usgd, seeds 0"]]
    assert named({"method": "sgd"}, {"method": "sgd"}) == [["sgd, in 0"], ["sgd, in 1"]]
    alike = named({"method": "sgd", "learning_rate": (0.1234561, 0.1234562)})[0]
    assert len(set(alike)) == 2


@pytest.mark.parametrize("beside", [{"held_out": 9}, {"stats_every": 9}, {"kernels_every": 2}, {"save_every": 9}])
def test_a_name_has_no_setting_that_does_not_change_learning(beside):
    assert named({"method": "sgd"}, {"method": "usgd", **beside}) == [["sgd"], ["usgd"]]
    assert named({"method": "sgd"}, {"method": "sgd", **beside}) == [["sgd, in 0"], ["sgd, in 1"]]


def test_tables_and_pictures_of_divided_runs_show_the_same_names(tmp_path, capsys):
    (tmp_path / "g.json").write_text(json.dumps(GRID))
    line = ["cl-grid", str(tmp_path / "g.json"), "--networks", "2", "--out", str(tmp_path / "out"), "-q"]
    assert command(line) == 0
    shown = capsys.readouterr().out
    expected = {f"pgd, lr {lr}, sigma {sigma}" for lr in ("0.1", "0.01") for sigma in ("0.1", "0.2")}
    assert all(f"  {name} " in shown for name in expected)
    assert shown.partition("best by accuracy: ")[2].strip() in expected
    places = [str(path.parent) for path in sorted((tmp_path / "out").rglob("config.json"))]
    assert len(places) == 2
    assert command(["cl-analyze", *places, "--json", "--csv", str(tmp_path / "csv")]) == 0
    found = [json.loads(each) for each in capsys.readouterr().out.splitlines()]
    assert {row["name"] for each in found for row in each["learners"]} == expected
    table = (tmp_path / "csv" / "stream-scores.csv").read_text()
    assert all(f'"{name}"' in table for name in expected)
    assert {curve.name for curve in curves_of(read_streams(places), "accuracy")} == expected
