"""The switches under which all tests run, and the fixtures that several files share."""

import gc
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cases import Job

# Plans by the built-in rates, here and in every process that a test starts: what is planned is not what is measured.
os.environ["NTKGEN_RATES"] = "default"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Run a process per processor: each imports torch and collects every test, which takes it several seconds."""
    return min(4, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile of hypothesis in processes that run tests. The distributing process does not need it."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", 0):
        import strategies  # noqa: F401


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, which would traverse the objects of torch repeatedly."""
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
