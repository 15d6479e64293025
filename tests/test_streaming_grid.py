"""Grids of learners and options: runs, commands, skipping, the best combination."""

import json
import shlex
import subprocess

import pytest

from ntkgen.cli import run as command
from ntkgen.continual.streaming import forecast
from ntkgen.continual.streaming import run as streaming
from ntkgen.continual.streaming.grid import read_grid, write_commands
from ntkgen.errors import InputError, UnknownNameError
from ntkgen.files.place import folder_of

GRID = {
    "stream": "label-permuted", "dataset": "digits", "model": "mlp-stream", "num_samples": 60, "samples_per_task": 30,
    "seeds": [0, 1],
    "learners": {"sgd": {"learning_rate": [0.01, 1e30]}, "usgd": {"sigma": [0.001, 0.01], "largest": ["raw"]}},
}  # fmt: skip


def written(path, **changes):
    path.write_text(json.dumps({**GRID, **changes}))
    return path


def test_numbers_learn_together_and_words_apart(tmp_path):
    learners = {"usgd": {"sigma": [1, 2, 3], "lr": [0.1, 0.2], "largest": ["raw", "corrected"]}, "sgd": {}}
    runs = read_grid(written(tmp_path / "g.json", learners=learners))
    assert {name: each.num_members for name, each in runs.items()} == {
        "usgd/largest-raw": 12, "usgd/largest-corrected": 12, "sgd": 2,
    }  # fmt: skip
    runs = read_grid(written(tmp_path / "g.json", learners=learners), networks=5)
    assert max(each.num_members for each in runs.values()) <= 5
    assert sum(each.num_members for each in runs.values()) == 26
    assert len({str(each.to_json()) for each in runs.values()}) == len(runs) == 7
    assert [each.sigma for name, each in runs.items() if "largest-raw" in name] == [1, 2, 3]


def test_commands_are_lines_of_a_shell(tmp_path):
    folder = folder_of(str(tmp_path / "out here"))
    runs = read_grid(written(tmp_path / "g.json"))
    lines = write_commands(folder, runs)
    assert (tmp_path / "out here" / "commands.txt").read_text().splitlines() == lines
    assert len(lines) == 2
    place = tmp_path / "out here"
    script = (place / "array.sh").read_text()
    assert "--array=1-2" in script
    (tmp_path / "ntkgen").write_text(f'#!/bin/sh\nfor each in "$@"; do echo "$each"; done > "{tmp_path}/found"\n')
    (tmp_path / "ntkgen").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2"}
    subprocess.run(["bash", str(place / "array.sh")], env=environment, check=True)
    found = (tmp_path / "found").read_text().splitlines()
    assert found == ["cl-run", "--config", f"{place}/configs/usgd.json", "--out", f"{place}/usgd"]


def test_a_second_call_skips_what_is_finished(tmp_path, capsys, monkeypatch):
    file, out = str(written(tmp_path / "g.json")), str(tmp_path / "out")
    line = ["cl-grid", file, "--out", out, "-q"]
    assert command([*line, "--dry-run"]) == 0
    assert "2 runs, 8 networks" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    learnt = []
    original = streaming.run_stream
    monkeypatch.setattr(streaming, "run_stream", lambda *given: learnt.append(given[0].method) or original(*given))
    assert command(line) == 0
    shown = capsys.readouterr().out
    assert "diverged" in shown
    assert "best by accuracy: " in shown
    assert "best by accuracy: sgd, lr 1e+30" not in shown
    assert command([*line, "--json"]) == 0
    found = [json.loads(each) for each in capsys.readouterr().out.splitlines()]
    assert [len(each["learners"]) for each in found] == [2, 2]
    assert learnt == ["sgd", "usgd"]
    require_a_folder_is_analysed(tmp_path, capsys)


def require_a_folder_is_analysed(place, capsys):
    """Require that the grid is tabled and drawn as a whole."""
    assert command(["cl-analyze", str(place / "out"), "--csv", str(place / "tables")]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("sgd, lr 0.01", ", sigma 0.01", "best by accuracy"))
    names = {path.name for path in (place / "tables").iterdir()}
    assert names == {"stream-scores.csv", "stream-scores.md", "out-sgd-bins.csv", "out-usgd-bins.csv"}
    assert command(["cl-plot", str(place / "out"), "-o", str(place / "plots"), "--json"]) == 0
    drawn = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["run"] for each in drawn] == [str(place / "out"), str(place / "out/usgd")]
    names = {path.name for path in (place / "plots").iterdir()}
    assert names == {"out-stream.png", "out-usgd-stream-utilities.png"}


def test_the_commands_learn_the_same(tmp_path, capsys):
    file = written(tmp_path / "g.json", learners={"sgd": {"learning_rate": [0.01, 0.1]}})
    lines = write_commands(folder_of(str(tmp_path / "out")), read_grid(file))
    assert command([*shlex.split(lines[0])[1:], "-q"]) == 0
    capsys.readouterr()
    assert command(["cl-grid", str(file), "--out", str(tmp_path / "out"), "-q"]) == 0
    assert "1 of 1 runs are finished" in capsys.readouterr().err


def test_settings_may_be_named_as_their_options(tmp_path):
    values = {name: value for name, value in GRID.items() if name != "num_samples"}
    values |= {"samples": 60, "stats-every": 7, "compat": "published", "learners": {"sgd": {"lr": [0.1]}}}
    (tmp_path / "g.json").write_text(json.dumps(values))
    (found,) = read_grid(tmp_path / "g.json").values()
    assert (found.num_samples, found.stats_every, found.compat, found.learning_rate) == (60, 7, True, 0.1)


def test_a_plan_has_the_time_and_the_settings_of_every_run(tmp_path, capsys, monkeypatch):
    measured = []
    seconds = lambda settings, *_: measured.append(settings.method) or float(settings.num_members)  # noqa: E731
    monkeypatch.setattr(forecast, "projected_seconds", seconds)
    learners = {"sgd": {"lr": [0.1, 0.2, 0.3, 0.4]}, "pgd": {"sigma": [0, 0.1]}}
    line = ["cl-grid", str(written(tmp_path / "g.json", learners=learners)), "--networks", "2", "--dry-run"]
    assert command([*line, "--commands", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    head, *rows, shared = capsys.readouterr().out.splitlines()
    assert head == "6 runs, 12 networks; about 12 s one after the other, without kernels"
    assert "  sgd/learning_rate-0.1: 2 networks, about 2.0 s; method sgd, learning_rate 0.1, weight_decay 0.0" in rows
    assert "  pgd/sigma-0: 2 networks, about 2.0 s; method pgd, learning_rate 0.01, sigma 0" in rows
    assert "num_samples 60" in shared
    assert "method" not in shared
    assert measured == ["sgd", "pgd", "pgd"]  # without noise there is less to do
    assert command([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["projected_seconds"] == dict.fromkeys(found["runs"], 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learners": None}, "no grid"),
        ({"learners": {"usdg": {}}}, "usgd"),
        ({"learners": {"sgd": {"sigma": [1]}}}, "sigma"),
        ({"learners": {"sgd": {"learning_rate": ["a"]}}}, "learning_rate"),
        ({"epochs": 3}, "epochs"),
        ({"lerning_rate": 3}, "Did you mean learning_rate"),
        ({"seeds": 3}, "seeds"),
        ({"samples": 3}, "num_samples twice"),
        ({"method": "sgd"}, "`method` beside `learners`"),
        ({"learners": {"sgd": {"method": "usgd"}}}, "`method` beside `learners`"),
        ({"lr": 0.1}, "learning_rate twice.*for all runs and for sgd"),
        ({"learners": {"sgd": {"lr": [1], "learning-rate": [2]}}}, "learning_rate twice"),
        ({"learners": {"usgd": {"largest": []}}}, "usgd: largest"),
        ({"learners": {"usgd": {"sgima": [1]}}}, "Did you mean sigma"),
    ],
)
def test_a_mistake_in_a_grid_is_named(changes, message, tmp_path):
    with pytest.raises((InputError, UnknownNameError), match=message):
        read_grid(written(tmp_path / "g.json", **changes))
