"""`ntkgen analyze`, `ntkgen plot` and `ntkgen report` run where torch is not installed."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from filled import fill_store

from ntkgen.cli.analyze import QUESTIONS

# None in sys.modules makes `import torch` fail as where it is not installed.
WITHOUT = (
    "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision']));"
    "import json; from ntkgen import cli;"
    "sys.exit(max(cli.run(command) for command in json.loads(sys.argv[1])))"
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two kernels of the same 16 samples, 2 outputs each."""
    folder, labels = tmp_path_factory.mktemp("stores"), np.arange(16) % 2
    first, K = fill_store(folder / "a.zarr", labels=labels, num_outputs=2)
    second, _ = fill_store(folder / "b.zarr", K + np.eye(len(K)), labels=labels, num_outputs=2)
    return first.name, second.name


def run(commands):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(commands)], capture_output=True, text=True, check=False
    )


ARGUMENTS = {
    **{question: ["analyze", question, "FIRST", "--json"] for question in QUESTIONS},
    "extrapolate": ["analyze", "extrapolate", "FIRST", "--to", "100", "--json"],
    "compare": ["analyze", "compare", "FIRST", "SECOND", "--top", "3", "--json"],
    "plot": ["plot", "FIRST", "SECOND", "-o", "OUT", "--kind", "matrix", "comparison", "--json"],
    "report": ["report", "FIRST", "-o", "OUT/report.html", "--json"],
}


@pytest.mark.parametrize("names", [("spectrum", "compare"), pytest.param(ARGUMENTS, marks=pytest.mark.slow)])
def test_commands_run_without_torch(names, stores, tmp_path):
    """All in one process, which is as good and quicker."""
    places = {"FIRST": stores[0], "SECOND": stores[1]}
    commands = [[places.get(arg, arg.replace("OUT", str(tmp_path))) for arg in ARGUMENTS[name]] for name in names]
    done = run(commands)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) >= len(commands)
    for result in results:
        assert result["store"] in stores
        assert result["peak_bytes"] > 0


def test_every_question_is_asked():
    assert set(QUESTIONS) < set(ARGUMENTS)
    for question in QUESTIONS:
        assert importlib.util.find_spec(f"ntkgen.cli.analyze.{question}"), question


def test_torch_is_indeed_missing():
    done = run([["models"]])
    assert done.returncode != 0
    assert "torch" in done.stderr
