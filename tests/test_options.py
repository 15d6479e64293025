"""The options of the commands: the names and the defaults of the settings that they set."""

import ast
import dataclasses
from collections import Counter
from pathlib import Path

import click
import numpy as np
import pytest
from filled import fill_store

from ntkgen import analysis, cli
from ntkgen.analysis.matrix import open_matrix
from ntkgen.cli.analyze import QUESTIONS, Asked, analyze
from ntkgen.cli.plot import KINDS
from ntkgen.errors import UnknownNameError
from ntkgen.plan.spec import KernelSpec
from ntkgen.training.recipe import TrainingRequest

# What a question cannot be asked without.
REQUIRED = {"extrapolate": ["--to", "9"]}


def require_defaults(command, args, cls, at_least):
    """Parse a line without options, and compare what it sets with the defaults of the settings."""
    given = command.make_context(command.name, list(args)).params
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    defaults = {name: default for name, default in defaults.items() if default is not dataclasses.MISSING}
    found = {name: None if value == () else value for name, value in given.items() if name in defaults}
    assert found == {name: defaults[name] for name in found}
    assert len(found) >= at_least


def question_and_settings(name):
    return analyze.get_command(None, name), getattr(analysis, f"{name.capitalize()}Settings")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_asked_with_the_defaults_of_its_settings(question):
    command, settings = question_and_settings(question)
    require_defaults(command, ["k.zarr", *REQUIRED.get(question, [])], settings, 1)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_options_of_a_question_have_the_names_of_its_settings(question):
    command, settings = question_and_settings(question)
    names = {param.name for param in command.params if isinstance(param, click.Option)}
    assert names - set(Asked.__dataclass_fields__) <= {field.name for field in dataclasses.fields(settings)}


@pytest.mark.parametrize(("cls", "at_least"), [(KernelSpec, 8), (TrainingRequest, 7)])
def test_a_kernel_is_computed_with_the_defaults_of_its_settings(cls, at_least):
    require_defaults(cli.cli.commands["compute"], ["--models", "lenet"], cls, at_least)


# Of a regression and of a run; of an imported kernel and of a stream; details of a computation and lines of a run;
# processes of one kernel, and runs side by side; the number of all parameters, and patterns of some.
WITH_TWO_MEANINGS = {"--method": 2, "--params": 2, "--samples": 2, "--verbose": 2, "--workers": 2}


def test_an_option_is_defined_once():
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(cli.__file__).parent.rglob("*.py")]
    calls = [node for module in modules for node in ast.walk(module) if isinstance(node, ast.Call)]
    defined = [call for call in calls if ast.unparse(call.func) == "click.option"]
    spelled = Counter(arg.value for call in defined for arg in call.args if ast.unparse(arg).startswith("'--"))
    assert len(spelled) > 40
    assert {option: count for option, count in spelled.items() if count > 1} == WITH_TWO_MEANINGS


@pytest.mark.parametrize("line", [["compute", "--models", "lenet"], ["train", "--models", "lenet"], ["plot", "k"]])
def test_an_empty_path_is_not_the_current_directory(run, tmp_path, line):
    code, out, err = run(*line, "--out", "")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "--out has an empty path" in err
    assert not list(tmp_path.iterdir())


def test_a_negative_number_is_a_value(run, tmp_path):
    fill_store(tmp_path / "k.zarr", labels=np.arange(4) % 2, num_outputs=2)
    code, _, err = run("analyze", "regress", "k.zarr", "--shifts", "-1")
    assert code == 2
    assert "found -1" in err
    assert "has no value" not in err


def test_an_output_of_a_single_matrix_is_refused_by_the_option(run, tmp_path):
    fill_store(tmp_path / "k.zarr", labels=np.arange(4) % 2, num_outputs=2)
    code, _, err = run("analyze", "spectrum", "k.zarr", "--of-output", "1")
    assert code == 2
    assert "Leave --of-output out" in err


def test_a_comparison_asked_for_by_name_needs_two_kernels(run, tmp_path):
    fill_store(tmp_path / "k.zarr", labels=np.arange(4) % 2, num_outputs=2)
    code, _, err = run("plot", "k.zarr", "--kind", *KINDS)
    assert code == 2
    assert "two paths or more" in err


@pytest.mark.parametrize(
    ("ask", "settings"),
    [
        (analysis.flow, analysis.FlowSettings(loss="hinge")),
        (analysis.flow, analysis.FlowSettings(offset="hinge")),
        (analysis.regress, analysis.RegressSettings(method="hinge")),
        (analysis.regress, analysis.RegressSettings(offset="hinge")),
    ],
)
def test_an_unknown_name_of_a_setting_is_refused(tmp_path, ask, settings):
    store, _ = fill_store(tmp_path / "k.zarr", labels=np.arange(4) % 2, num_outputs=2)
    with pytest.raises(UnknownNameError, match="hinge"):
        ask(open_matrix(store), settings)
