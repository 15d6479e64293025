"""Settings of streams: defaults, names, and what is refused."""

import fnmatch
import json
import re

import click
import pytest

from ntkgen import manual
from ntkgen.cli import run as command
from ntkgen.cli.cl_run import cl_run
from ntkgen.cli.cl_streaming import grid_of
from ntkgen.continual.optim.names import NAMES, OPTIONS
from ntkgen.continual.streaming.settings import OTHER_NAMES, StreamingSettings, without_defaults

LINE = ("cl-run", "--stream", "label-permuted", "--samples", "4", "--samples-per-task", "2", "-q")


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("method", NAMES)
def test_a_record_has_the_value_of_every_option_of_its_learner(method, compat):
    settings = StreamingSettings(method=method, compat=compat)
    learner, values = NAMES[method], settings.to_json()
    expected = {**learner.defaults, **(learner.quirks if compat else {})}
    expected.pop("published", None)
    assert settings.combinations == [expected]
    assert {name: values[OTHER_NAMES.get(name, name)] for name in expected} == expected
    assert (values["samples_per_task"], values["compounding"]) == (2500, True)
    assert StreamingSettings.from_json(values) == settings


def test_a_record_without_defaults_is_the_same_run():
    settings = StreamingSettings(method="usgd", sigma=(0.1, 0.2), stream="input-permuted")
    older = {**settings.to_json(), "beta_utility": None, "learning_rate": None, "samples_per_task": None}
    assert StreamingSettings.from_json(older) == settings
    assert settings.samples_per_task == 5000


def test_another_learner_takes_the_place_of_that_of_a_record(tmp_path, capsys):
    values = StreamingSettings(method="adam", num_samples=4, stats_every=9).to_json()
    (tmp_path / "config.json").write_text(json.dumps({"settings": values, "facts": {}}))
    line = ["cl-run", "--config", str(tmp_path / "config.json"), "--method", "pgd", "--stream", "input-permuted"]
    assert command([*line, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert (found["learning_rate"], found["sigma"], found["samples_per_task"]) == (0.01, 0.005, 5000)
    assert (found["beta1"], found["stats_every"]) == (None, 9)
    written = {"method": "adam", "learning_rate": 0.001}
    assert without_defaults(written) == written


def test_an_option_of_a_grid_has_the_names_of_its_setting():
    expected = {"learning_rate": (0.1, 0.2), "beta_utility": (0.5,)}
    for name in ("lr", "learning_rate", "learning-rate"):
        assert grid_of([f"{name}=0.1,0.2", "beta-utility=0.5"]) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sigma", "0.1", "--grid", "sigma=0.2"], "--sigma is given twice: expected one value, or several in --grid"),
        (["--lr", "0.1", "--grid", "lr=0.2"], "--lr is given twice"),
        (["--grid", "lr=0.1", "--grid", "learning_rate=0.2"], "--grid has learning_rate twice"),
        (["--grid", "sigma=0.1,0.2", "lr=0.1"], "Give it once per option: --grid sigma=0.1,0.2 --grid lr=0.1"),
        (["--grid=sigma=0.1", "lr=0.1"], "Give it once per option: --grid sigma=0.1 --grid lr=0.1"),
        (["--grid", "largest=raw,corrected"], "Write them to a file for `ntkgen cl-grid FILE`"),
        (["--grid", "sgima=0.1"], "Did you mean sigma"),
        (["--sigma", "-1"], "--sigma has a wrong value: expected a number of 0 or more, found -1.0"),
        (["--epochs", "3"], "--epochs has no effect on a stream of single samples"),
        (["--preset", "bic"], "--preset has no effect on a stream of single samples"),
    ],
)
def test_a_mistake_in_options_is_one_line(given, message, tmp_path, capsys):
    assert command([*LINE, "--method", "pgd", *given, "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_a_file_is_one_line(tmp_path, capsys):
    for values, message in (
        ({"sampels": 4}, "There is no setting 'sampels' of a stream of single samples. Did you mean samples"),
        ({"epochs": 4}, "--epochs has no effect"),
    ):
        (tmp_path / "s.json").write_text(json.dumps(values))
        assert command([*LINE, "--config", str(tmp_path / "s.json"), "--out", str(tmp_path / "run")]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert len(shown.strip().splitlines()) == 1
    (tmp_path / "s.json").write_text(json.dumps({"samples": 4, "lr": 0.5}))
    assert command(["cl-run", "--stream", "label-permuted", "--config", str(tmp_path / "s.json"), "--dry-run"]) == 0
    assert "num_samples 4" in (shown := capsys.readouterr().out)
    assert "learning_rate 0.5" in shown


def test_a_folder_that_is_missing_is_no_run_of_another_kind(tmp_path, capsys):
    place, missing = str(tmp_path / "run"), str(tmp_path / "missing")
    assert command([*LINE, "--out", place]) == 0
    for line in (["cl-analyze", place, missing], ["cl-plot", missing, place, "--out", str(tmp_path / "plots")]):
        capsys.readouterr()
        assert command(line) == 2
        shown = capsys.readouterr().err
        assert "There is no run" in shown
        assert missing in shown
        assert "two kinds" not in shown


@pytest.fixture(scope="module")
def help_page():
    """What `cl-run --help` prints, in one line."""
    shown = cl_run.get_help(click.Context(cl_run, max_content_width=10_000))
    return " ".join(shown.split())


@pytest.mark.parametrize(
    "expected",
    [
        "the learner of a stream, does in another way. --dry-run lists it",
        "[mlp; streams of single samples: mlp-stream]",
        "Learning rate [0.0003; streams of single samples: that of the learner]",
        "Weight decay [0.0; streams of single samples: that of the learner]",
        "Give --grid once per option.",
        "[10; streams of single samples: 2]",
        "[dataset; streams of single samples: symmetric]",
        ", ".join(NAMES),
    ],
)
def test_the_help_has_the_learners_and_the_defaults_of_streams(expected, help_page):
    assert expected in help_page


def test_the_manual_has_every_learner():
    cells = re.findall(r"^\| (`[^|]*) \|", manual.page("streams").text, re.MULTILINE)
    patterns = [name.replace("…", "*") for cell in cells for name in re.findall(r"`([\w…]+)`", cell)]
    assert [name for name in NAMES if not any(fnmatch.fnmatchcase(name, each) for each in patterns)] == []


def test_every_option_belongs_to_a_learner():
    assert set(OPTIONS) - {"published"} == {option for each in NAMES.values() for option in each.defaults}


def test_a_plan_lists_what_is_done_as_published(capsys):
    line = [*LINE, "--method", "entire_kernel", "--compat", "published", "--dry-run"]
    assert command(line) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("1 network (entire_kernel")
    assert "as published: largest raw, not corrected; step_scale 2, not 1" in shown
    assert "sigma 0.001" in shown
    assert "None" not in shown
    assert command([*line, "--step-scale", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["as_published"] == ["largest raw, not corrected"]
    assert found["settings"]["samples_per_task"] == 2
