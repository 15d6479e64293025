"""Public names that load their modules when they are first used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ntkgen
from ntkgen import analysis, jacobian
from ntkgen.lazy import lazy_names
from ntkgen.store.opening import open_kernel

PACKAGES = [ntkgen, jacobian, analysis]


@pytest.fixture(params=PACKAGES, ids=[package.__name__ for package in PACKAGES])
def package(request):
    return request.param


def test_every_public_name_is_listed_and_loads_what_type_checkers_see(package):
    """The imports under TYPE_CHECKING say what each name is."""
    lines = ast.walk(ast.parse(Path(package.__file__).read_text(encoding="utf-8")))
    seen = {
        alias.asname: getattr(importlib.import_module(line.module), alias.name)
        for line in lines if isinstance(line, ast.ImportFrom) for alias in line.names if alias.asname
    }  # fmt: skip
    assert set(seen) == set(package.__all__) <= set(dir(package))
    assert {name: getattr(package, name) for name in package.__all__} == seen


def test_an_unknown_name_is_an_attribute_error_of_the_package(package):
    with pytest.raises(AttributeError, match=f"^module '{package.__name__}' has no attribute 'kernle'$"):
        package.kernle  # noqa: B018


def test_a_name_may_have_another_one_in_its_module():
    load, names = lazy_names("ntkgen", {"open": "ntkgen.store.opening:open_kernel"})
    assert load("open") is open_kernel
    assert {"open", "__version__"} <= set(names())


def test_importing_the_packages_loads_no_library():
    code = (
        "import sys, ntkgen, ntkgen.jacobian, ntkgen.analysis;"
        "print(sorted({'torch', 'numpy', 'zarr', 'dask', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_processes_of_tests_do_not_compile_the_libraries_again(pytestconfig):
    """Python keeps bytecode in all processes, if only in the cache of pytest: see `keep_bytecode` in conftest.py."""
    if not pytestconfig.pluginmanager.has_plugin("cacheprovider"):
        pytest.skip("pytest has no cache")
    code = "import sys; print(sys.dont_write_bytecode)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (sys.dont_write_bytecode, done.stdout) == (False, "False\n")
