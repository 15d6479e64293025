"""Scripts without a main guard, and scripts that are no file, start workers or are told why they cannot."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ntkgen.engine.coordinator import open_pool
from ntkgen.engine.spawning import SIGN, require_main_guard, without_missing_script
from ntkgen.errors import InputError

SCRIPT = """
import torch, ntkgen
torch.manual_seed(0)
class Net(torch.nn.Linear):  # which only the script knows
    pass
store = ntkgen.compute(Net(3, 2), torch.randn(6, 3), store="k.zarr", workers=1, certify=False)
print(store.is_complete)
"""


@pytest.fixture
def importing(monkeypatch):
    """A process that is still importing the script that started it."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)


def test_a_process_that_comes_to_the_call_again_ends_without_a_word(importing, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(SIGN, str(tmp_path / "again"))
    with pytest.raises(SystemExit), open_pool(2, None, "cpu"):
        pass
    assert (tmp_path / "again").exists()
    assert capfd.readouterr() == ("", "")


def test_in_a_process_of_somebody_elses_it_is_an_error(importing):
    with pytest.raises(InputError, match=r'under a line `if __name__ == "__main__":`'):
        require_main_guard()


def test_who_started_such_processes_is_told_once(monkeypatch):
    def refuse(*_, **__):
        Path(os.environ[SIGN]).touch()  # as a worker does
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr("distributed.LocalCluster", refuse)
    with pytest.raises(InputError, match="began to run it from its first line") as raised, open_pool(2, None, "cpu"):
        pass
    assert raised.value.__suppress_context__
    assert SIGN not in os.environ


def test_a_script_that_is_no_file_is_not_looked_for(monkeypatch, tmp_path):
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", str(tmp_path / "<stdin>"), raising=False)
    with without_missing_script():
        assert not hasattr(main, "__file__")
    assert main.__file__ == str(tmp_path / "<stdin>")
    (tmp_path / "<stdin>").touch()
    with without_missing_script():
        assert main.__file__ == str(tmp_path / "<stdin>")


def ran(tmp_path, *args, **options):
    return subprocess.run(
        [sys.executable, *args], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, **options
    )


@pytest.mark.slow  # a worker imports torch
def test_a_script_without_a_guard_gets_one_error(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = ran(tmp_path, "script.py")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "Nanny" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ntkgen.errors.InputError: The workers of ")
    assert done.stdout == ""
    guarded = SCRIPT.replace("store =", "if __name__ == '__main__':\n  store =").replace("\nprint", "\n  print")
    (tmp_path / "script.py").write_text(guarded)
    done = ran(tmp_path, "script.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.slow  # a worker imports torch
def test_a_script_from_stdin_starts_workers(tmp_path):
    done = ran(tmp_path, "-", input=SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
