"""The switches under which all tests run, and the fixtures that several files share."""

import os

import pytest
import strategies  # noqa: F401 - which loads the profile of hypothesis
import torch
from cases import Job, make_job

from ntkgen import cli

# Plans by the built-in rates, here and in every process that a test starts: what is planned is not what is measured.
os.environ["NTKGEN_RATES"] = "default"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Run a process per processor: each imports torch and collects every test, which takes it several seconds."""
    return min(4, os.cpu_count() or 1)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread: the networks are so small that handing work to a second takes most of the time.

    NTKGEN_TEST_THREADS says otherwise, for a run that looks for what depends on their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("NTKGEN_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def denormal_numbers():
    """Keep them for the next test in this process: commands, run within it, flush them to zero."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def job() -> Job:
    """A kernel of 14 samples and 3 outputs in 5 × 5 tiles, computed in float32."""
    return make_job()


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(*args):
        code = cli.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command
