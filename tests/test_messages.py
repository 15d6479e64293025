"""Messages: the library names the setting, and the command line its option."""

import ast
import json
import re
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import xarray
from filled import Content, filled, gram

import ntkgen
from ntkgen import analysis, cli, origin
from ntkgen.analysis.matrix import open_matrix
from ntkgen.cli.messages import in_options
from ntkgen.cli.options import Command
from ntkgen.continual.metrics.forgetting import predicted_forgetting
from ntkgen.continual.plots.draw import _REASONS
from ntkgen.engine.jobs import Job
from ntkgen.engine.scheduler import MAX_ERRORS, Scheduler, SchedulerSettings
from ntkgen.errors import BudgetError, InputError, NtkgenError, WorkerError
from ntkgen.store.foreign import SourceDescription
from ntkgen.store.importing import import_kernel

COMPUTE = ["compute", "--models", "logistic", "--epochs", "0", "--subsample", "6"]
PACKAGE = Path(ntkgen.__file__).parent
# Modules whose subject is the command line: its commands, its manual, and the commands that make a kernel or run again.
ON_COMMANDS = ("cli", "manual", "analysis/report/reproduce.py", "continual/report.py", "continual/streaming/grid.py")
OPTION = re.compile(r"(?<![\w-])--[a-z]")
COMMAND_LINE = re.compile(r"`ntkgen [^`]*`")


# the library ----------------------------------------------------------------------------------------------------------


def texts_of(path):
    """Every string of a module but its docstrings, with {} for what an f-string puts in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    left_out = {id(node.value) for node in documented}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in node.values}
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.lineno, node.value


def options_in(path):
    return [(line, text) for line, text in texts_of(path) if OPTION.search(COMMAND_LINE.sub("", text))]


def test_no_message_of_the_library_contains_an_option():
    modules = [
        path for path in PACKAGE.rglob("*.py") if not path.relative_to(PACKAGE).as_posix().startswith(ON_COMMANDS)
    ]
    assert len(modules) > 100
    assert {path.name: found for path in modules if (found := options_in(path))} == {}


def test_options_are_found_in_plain_and_in_formatted_strings(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Not --here."""\n'
        'A = "Raise --memory."\n'
        'B = f"Run `ntkgen verify --repair {A}`."\n'
        'C = f"{A}: set --tile {B}."\n'
        'D = "a--b, a -- b"\n',
        encoding="utf-8",
    )
    assert sorted(options_in(path)) == [(2, "Raise --memory."), (4, "{}: set --tile {}.")]


# the same error, from Python and from the command line ----------------------------------------------------------------


POOL = {"workers": "--workers", "client": "--scheduler"}


def compute(tmp_path, **settings):
    model = torch.nn.Linear(2, 10)
    return ntkgen.compute(model, torch.ones(6, 2), store=tmp_path / "python.zarr", **settings)


@pytest.mark.parametrize(
    ("settings", "options", "named"),
    [
        ({"tile_side": 15}, ["--tile", 15], {"tile_side": "--tile"}),
        ({"memory_bytes": 1}, ["--memory", "1B"], {"memory_bytes": "--memory"}),
        ({"precision": "tf32"}, ["--precision", "tf32"], {"precision": "--precision", "device": "--device"}),
        ({"workers": 1, "client": "a:1"}, ["--workers", 1, "--scheduler", "a:1"], POOL),
    ],
)  # fmt: skip
def test_a_kernel_that_cannot_be_computed(run, tmp_path, settings, options, named):
    with pytest.raises(NtkgenError) as raised:
        compute(tmp_path, **settings)
    code, _, err = run(*COMPUTE, "--device", "cpu", *options)
    assert code == raised.value.exit_code
    require_named(str(raised.value), err, named)


@pytest.mark.parametrize(
    ("question", "settings", "options", "named"),
    [
        ("spectrum", {"top": 99}, ["--top", 99], {"top": "--top"}),
        ("spectrum", {"memory_bytes": 1}, ["--memory", "1B"], {"memory_bytes": "--memory"}),
        ("density", {"bandwidth": 99.0}, ["--bandwidth", 99], {"bandwidth": "--bandwidth", "passes": "--passes"}),
        ("logdet", {"shift": -1.0}, ["--shift=-1"], {"shift": "--shift"}),
        ("extrapolate", {"to": 9, "burn_in": -1}, ["--to", 9, "--burn-in=-1"], {"burn_in": "--burn-in"}),
        ("extrapolate", {"to": 9, "q": 99}, ["--to", 9, "--q", 99], {"q": "--q", "burn_in": "--burn-in"}),
        ("regress", {"shifts": (-1.0,)}, ["--shifts=-1"], {"shifts": "--shifts"}),
        ("flow", {"num_modes": 0}, ["--modes", 0], {"num_modes": "--modes"}),
        ("flow", {"times": (-1.0,)}, ["--times=-1"], {"times": "--times"}),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_asked(run, tmp_path, question, settings, options, named):
    ask, settings_of = getattr(analysis, question), getattr(analysis, f"{question.capitalize()}Settings")
    matrix = open_matrix(stored(tmp_path))
    with pytest.raises(NtkgenError) as raised:
        ask(matrix, settings_of(**settings))
    code, _, err = run("analyze", question, "k.zarr", *options)
    assert code == raised.value.exit_code
    require_named(str(raised.value), err, named)


def stored(tmp_path):
    labels = np.arange(4) % 3
    return filled(tmp_path / "k.zarr", Content(gram(12), labels, np.zeros((4, 3))))


def require_named(from_python, from_command_line, named):
    for setting, option in named.items():
        assert f"`{setting}`" in from_python
        assert option not in from_python
        assert option in from_command_line
        assert f"`{setting}`" not in from_command_line
    assert from_command_line.count("\n") == 1


def test_a_store_that_is_not_complete(run, tmp_path):
    store = filled(tmp_path / "k.zarr", Content(gram(12), np.arange(4) % 3, np.zeros((4, 3))), skip={(1, 1)})
    with pytest.raises(NtkgenError) as raised:
        open_matrix(store)
    require_named(str(raised.value), run("analyze", "align", "k.zarr")[2], {"allow_partial": "--allow-partial"})


def test_a_kernel_that_cannot_be_imported(run, tmp_path):
    (tmp_path / "k.bin").write_bytes(bytes(8))
    with pytest.raises(InputError) as raised:
        import_kernel(
            str(tmp_path / "k.bin"), str(tmp_path / "k.zarr"), SourceDescription(num_samples=1, num_outputs=1)
        )
    _, _, err = run("import", "k.bin", "--samples", 1, "--outputs", 1)
    require_named(str(raised.value), err, {"dtype": "--dtype"})


# what is printed ------------------------------------------------------------------------------------------------------


def test_only_whole_words_that_are_settings_of_the_command_become_options():
    command = cli.cli.commands["compute"]
    for text, printed in {
        "Raise `memory_bytes`.": "Raise --memory.",
        "Use `learning_rate` 0.1, `num_epochs` 3.": "Use --lr 0.1, --epochs 3.",
        "See `top`.": "See `top`.",  # of another command
        "Run `ntkgen verify --repair layout` and `layout`.": "Run `ntkgen verify --repair layout` and --layout.",
        "Pass `tile_side=3`.": "Pass `tile_side=3`.",
        "memory_bytes and ``out`` stay": "memory_bytes and ``out`` stay",
        "The folder a`b and `out`.": "The folder a`b and --out.",
    }.items():
        assert in_options(text, command) == printed


def test_an_argument_is_no_option():
    command = click.Command("mirror", params=[click.Argument(["path"]), click.Option(["-q", "--quiet"])])
    assert in_options("`path` `quiet`", command) == "`path` --quiet"


def test_the_error_of_a_worker_is_told_in_options():
    scheduler = Scheduler([Job(indices=(0,))], SchedulerSettings(), now=0.0)
    scheduler.observe(["a"], 0.0)
    error = BudgetError("Raise `memory_bytes`.")
    for _ in range(MAX_ERRORS - 1):
        scheduler.assign(0.0)
        scheduler.fail("a", error)
    scheduler.assign(0.0)
    with pytest.raises(WorkerError) as raised:
        scheduler.fail("a", error)
    assert "(BudgetError: Raise `memory_bytes`.)" in str(raised.value)
    assert "(BudgetError: Raise --memory.)" in in_options(str(raised.value), cli.cli.commands["compute"])


def test_a_note_and_its_json_are_told_in_options(run, monkeypatch):
    store = json.loads(run(*COMPUTE, "--no-certify", "--json")[1])["store"]
    monkeypatch.setattr(origin, "QUICK_FLOPS", 0)
    code, out, err = run("verify", store, "--json")
    assert code == 0
    assert err.endswith("Request the tile with --recompute 1.\n")
    assert json.loads(out)["not_recomputed"].endswith("Request the tile with --recompute 1.")


def test_a_reason_that_a_page_is_incomplete_is_told_in_options(run, tmp_path, monkeypatch):
    stored(tmp_path)
    monkeypatch.setattr("ntkgen.analysis.answers.is_small", lambda *_: False)
    reasons = json.loads(run("report", "k.zarr", "--json")[1])["lacking"]
    assert reasons["spectrum"].endswith("Run that command first, or raise --memory.")


@pytest.mark.parametrize("name", ["cl-analyze", "cl-plot", "report"])
def test_what_a_run_was_recorded_without_is_told_in_options_of_the_command_that_records_it(name):
    sums = xarray.Dataset(attrs={"ntkgen_snapshots": {"output": "sum"}})
    with pytest.raises(InputError) as raised:
        predicted_forgetting(sums)
    texts = [*_REASONS.values(), str(raised.value)]
    assert [in_options(text, cli.cli.commands[name]) for text in texts] == texts
    named = re.findall(r"`ntkgen cl-run (--[a-z-]+)", " ".join(texts))
    assert named == ["--probe-parts", "--output", "--output"]


def leaves(group, ctx):
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from leaves(command, ctx)
        else:
            yield name, command


def test_the_errors_of_every_command_name_its_options():
    found = dict(leaves(cli.cli, click.Context(cli.cli)))
    assert {"compute", "import", "spectrum", "manual"} <= set(found)
    assert [name for name, command in found.items() if not isinstance(command, Command)] == []
