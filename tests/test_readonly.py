"""A store that is only read is asked all the same: the answer is printed, and kept where it can be."""

import errno
import json
import os

import numpy as np
import pytest
from filled import fill_store
from zarr.storage import MemoryStore

from ntkgen.analysis.determinant import LogdetSettings, logdet
from ntkgen.analysis.eigenvalues import SpectrumSettings, spectrum
from ntkgen.analysis.matrix import open_matrix
from ntkgen.errors import InputError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.place import folder_of
from ntkgen.store.opening import open_store

LABELS = np.array([0, 1, 0])


@pytest.fixture
def place(tmp_path):
    """A store in a folder of its own."""
    (tmp_path / "theirs").mkdir()
    fill_store(tmp_path / "theirs/k.zarr", labels=LABELS, num_outputs=2)
    return tmp_path / "theirs/k.zarr"


@pytest.fixture
def closed(place, monkeypatch):
    """Refuse to write beside that store, as its permissions would to others than root."""
    write, access = LocalFolder.write, os.access

    def refuse(folder, key, data):
        if place.parent in folder.path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder.path / key))
        write(folder, key, data)

    monkeypatch.setattr(LocalFolder, "write", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: path != place.parent and access(path, mode))
    return place


def test_an_answer_that_cannot_be_kept_is_printed(closed, run):
    for options in ([], ["--json"]):
        code, out, err = run("analyze", "spectrum", closed, *options)
        assert code == 0
        assert "Permission denied" in err
        assert err.startswith("Warning: The result could not be saved beside")
        assert err.count("\n") == 1
    found = json.loads(out)
    assert len(found["eigenvalues"]) == 6
    assert found["remembered"] is False


def test_a_full_disk_loses_no_answer_and_other_faults_are_not_hidden(place, monkeypatch):
    def fail(error):
        def write(*_):
            raise error

        monkeypatch.setattr(LocalFolder, "write", write)
        return spectrum(open_matrix(open_store(place)), SpectrumSettings())

    assert "No space left" in fail(OSError(errno.ENOSPC, "No space left on device")).not_kept
    with pytest.raises(TypeError):
        fail(TypeError("a fault of ours"))


def test_a_factor_that_cannot_be_written_is_refused_before_the_work(closed, run, monkeypatch):
    monkeypatch.setattr("ntkgen.analysis.linalg.cholesky.load", None)  # a factorisation that begins fails
    code, out, err = run("analyze", "logdet", closed)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"ln -s {closed}" in err


def test_what_is_advised_works(closed, run, tmp_path):
    (tmp_path / "k.zarr").symlink_to(closed)
    code, _, err = run("analyze", "logdet", "k.zarr")
    assert (code, err) == (0, "")
    assert len(list((tmp_path / "k.zarr.analysis").iterdir())) == 1
    assert [file.name for file in closed.parent.iterdir()] == ["k.zarr"]


def test_a_kernel_in_memory_is_asked_and_nothing_is_written(place, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    memory = MemoryStore()
    for key, size in (folder := LocalFolder(place)).sizes().items():
        folder_of(memory).write(key, folder.read(key))
        assert size == folder_of(memory).size(key)
    matrix = open_matrix(open_store(memory))
    expected = spectrum(open_matrix(open_store(place)), SpectrumSettings())
    found = spectrum(matrix, SpectrumSettings())
    assert found.eigenvalues == expected.eigenvalues
    assert "MemoryStore" in found.not_kept or "beside" in found.not_kept
    with pytest.raises(InputError, match="needs a file beside the store"):
        logdet(matrix, LogdetSettings())
    assert list((tmp_path / "here").iterdir()) == []
