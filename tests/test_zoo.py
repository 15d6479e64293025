"""Networks by name: names, import strings, seeds, and the errors of wrong ones."""

import importlib
import re
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from ntkgen.errors import InputError, ModelError, UnknownNameError
from ntkgen.training import zoo


@pytest.fixture
def mylab(tmp_path, monkeypatch):
    """A researcher's own module in the current directory."""
    (tmp_path / "mylab_nets.py").write_text(
        "from torch import nn\n"
        "def wide(): return nn.Linear(4, 3)\n"
        "def sized(num_classes): return nn.Linear(4, num_classes)\n"
        "def any_options(**options): return nn.Linear(4, options['num_classes'])\n"
        "instance = nn.Linear(4, 2)\n"
        "def broken(): raise KeyError('weights.pt')\n"
        "def wrong(): return 3\n"
        "number = 5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mylab_nets", None)


@pytest.mark.parametrize(("factory", "outputs"), [("wide", 3), ("sized", 7), ("any_options", 7), ("instance", 2)])
def test_anybodys_network_is_built_from_its_import_string(mylab, factory, outputs):
    assert zoo.build(f"mylab_nets:{factory}", 7, seed=0).out_features == outputs


@pytest.mark.parametrize(
    ("name", "error", "part"),
    [
        ("resnet81", UnknownNameError, "or resnet18"),
        ("mylab_nets:wied", UnknownNameError, "Did you mean wide"),
        ("mylab_nests:wide", InputError, "Cannot import 'mylab_nests'"),
        ("mylab_nets:number", InputError, "is a int"),
        ("mylab_nets:broken", ModelError, "KeyError: 'weights.pt'"),
        ("mylab_nets:wrong", ModelError, "returned a int"),
    ],
)
def test_a_wrong_name_says_what_is_wrong_in_one_line(mylab, name, error, part):
    with pytest.raises(error) as caught:
        zoo.build(name, 10, seed=0)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_width_scales_resnets_alone(mylab):
    assert zoo.build("resnet9", 10, seed=0, width=8).get_parameter("head.weight").shape[1] == 64
    for name in ("lenet", "mylab_nets:wide"):
        with pytest.raises(InputError, match="`width`"):
            zoo.build(name, 10, seed=0, width=8)
    with pytest.raises(InputError, match="-3"):
        zoo.build("resnet9", 10, seed=0, width=-3)


def test_the_seed_decides_the_parameters_and_nothing_else():
    before = torch.get_rng_state()
    one, same, other = (zoo.build("lenet", 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_the_listing_builds_no_parameters(monkeypatch):
    some = {name: entry for name, entry in zoo._zoo().items() if name in {"lenet", "resnet152"}}
    monkeypatch.setattr(zoo, "_zoo", lambda: some)  # test_cli lists them all
    rows = {row["model"]: row for row in zoo.listing()}
    assert rows["resnet152"]["num_params"] == 58_156_618
    assert "1512.03385" in rows["resnet152"]["paper"]


@pytest.mark.slow
def test_the_command_line_finds_modules_of_the_current_directory(mylab, tmp_path):
    script = "import sys; from ntkgen.training import zoo; print(zoo.build('mylab_nets:wide', 10, seed=0))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "Linear(in_features=4, out_features=3" in done.stdout


def test_a_module_is_returned_as_it_is(mylab):
    assert isinstance(zoo.build("mylab_nets:instance", 10, seed=0), nn.Module)


# another package of the zoo's name ------------------------------------------------------------------------------------


def python(folder, *lines):
    """Run lines of Python in a folder, which is searched first for modules."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=folder, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr


ASK = [
    "from ntkgen.training import zoo",
    "from ntkgen.errors import InputError",
    "try: print(zoo.build('lenet', 10, seed=0))",
    "except InputError as error: print(error)",
]


NET = "from torch import nn\ndef net(): return nn.Linear(4, 3)\n"


@pytest.fixture(params=["module", "package", "package with a table"])
def theirs(request, tmp_path):
    """A lab's own `models`: its file, and the import string of a network."""
    if request.param == "module":
        (tmp_path / "models.py").write_text(NET)
        return tmp_path / "models.py", "models:net"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "nets.py").write_text(NET)
    (tmp_path / "models" / "__init__.py").write_text("MODELS = {}\n" * request.param.endswith("table"))
    return tmp_path / "models" / "__init__.py", "models.nets:net"


@pytest.fixture
def found_first(monkeypatch, tmp_path):
    """Let Python find their `models` first, as in a new process that begins in their folder."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "models"}
    for name in before:
        del sys.modules[name]
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_another_package_of_the_zoos_name_is_named(theirs, found_first):
    path, name = theirs
    assert "Linear(in_features=4, out_features=3" in str(zoo.build(name, 10, seed=0))
    with pytest.raises(InputError) as caught:
        zoo.build("lenet", 10, seed=0)
    out = str(caught.value)
    assert f"another of this name at {path}" in out
    assert f"ntkgen's own package 'models' at {zoo.ZOO}" in out
    assert "rename the other package, or name your own network as package.module:factory." in out


@pytest.mark.slow
def test_its_networks_are_built_nevertheless(theirs, tmp_path):
    _, name = theirs
    code, out, err = python(tmp_path, ASK[0], f"print(zoo.build({name!r}, 10, seed=0))", *ASK[1:])
    assert code == 0, err
    assert out.startswith("Linear(in_features=4, out_features=3")
    assert "The zoo cannot be imported" in out


def test_a_network_that_the_zoo_hides_is_explained(theirs, tmp_path, monkeypatch):
    _, name = theirs
    zoo.build("logistic", 10, seed=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises((InputError, UnknownNameError)) as caught:
        zoo.build(name, 10, seed=0)
    out = str(caught.value)
    if name == "models:net":  # which is a name that the zoo lacks
        assert f"Unknown factory in {zoo.ZOO / '__init__.py'} 'net'" in out
    else:
        assert f"ntkgen's own zoo at {zoo.ZOO} has the name 'models' too: rename your package." in out


def test_a_package_without_init_does_not_hide_the_zoo(tmp_path, found_first):
    (tmp_path / "models").mkdir()
    assert str(zoo.build("lenet", 10, seed=0)).startswith("Sequential(")


def test_what_is_imported_already_is_named_by_its_folder(monkeypatch, tmp_path):
    other = types.ModuleType("models")
    other.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "models", other)
    with pytest.raises(InputError, match=f"another of this name at {re.escape(str(tmp_path))}"):
        zoo.listing()
