"""The switches under which all tests run, and the fixtures that several files share."""

import gc
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cases import Job

# Plans by the built-in rates, here and in every process that a test starts: what is planned is not what is measured.
os.environ["NTKGEN_RATES"] = "default"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Run a process per processor: each imports torch and collects every test, which takes it several seconds."""
    return min(4, os.cpu_count() or 1)


def keep_bytecode(config: pytest.Config) -> None:
    """Keep bytecode in the cache of pytest where Python is told to keep none beside the sources.

    Otherwise every process that a test starts compiles three thousand modules again.
    """
    cache: pytest.Cache | None = getattr(config, "cache", None)
    if sys.dont_write_bytecode and cache is not None:
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(cache.mkdir("bytecode"))
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell all processes which file the first one writes when it has compiled all modules."""
    cache: pytest.Cache | None = getattr(node.config, "cache", None)
    if cache is not None:
        node.workerinput["compiled"] = str(cache.mkdir("bytecode") / "complete")


def wait_for_bytecode(given: dict[str, Any], seconds: float = 60) -> None:
    """Wait until the first process has imported all modules, which are then compiled once and not once per process."""
    until = time.monotonic() + seconds
    if "compiled" in given and given["workerid"] != "gw0":
        while not Path(given["compiled"]).exists() and time.monotonic() < until:
            time.sleep(0.1)


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile of hypothesis in processes that run tests. The distributing process does not need it."""
    keep_bytecode(config)
    wait_for_bytecode(getattr(config, "workerinput", {}))
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", 0):
        import strategies  # noqa: F401


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude imported objects from garbage collection, which would traverse the objects of torch repeatedly."""
    if "compiled" in (given := getattr(session.config, "workerinput", {})):
        Path(given["compiled"]).touch()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread. The networks are small, and a second thread costs more time than it saves.

    NTKGEN_TEST_THREADS sets another number, for a run that searches for a dependence on the number of threads.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("NTKGEN_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def unsynchronised_files():
    """Leave files to the system, which loses none while it runs. Which calls are made when is tested by replacements.

    Other processes synchronise them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def denormal_numbers():
    """Keep them for the next test in this process: commands, run within it, flush them to zero."""
    import torch

    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def job() -> "Job":
    """A kernel of 11 samples and 3 outputs in 4 × 4 tiles, computed in float32."""
    from cases import make_job

    return make_job()


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder; return exit code, stdout and stderr."""
    from ntkgen import cli

    monkeypatch.chdir(tmp_path)

    def run_command(*args):
        code = cli.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


WRITTEN: dict[tuple[str, ...], dict[str, bytes]] = {}


@pytest.fixture
def run_once(run, tmp_path):
    """Run a command that a test begins with: once in all tests of a process, of which the others get what it wrote."""
    from cases import files_of, write_files

    def write(*args):
        if args in WRITTEN:
            write_files(tmp_path, WRITTEN[args])
        else:
            assert run(*args)[0] == 0
            WRITTEN[args] = files_of(tmp_path)

    return write
