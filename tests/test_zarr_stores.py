"""Zarr stores that a caller brings: zip files are read, whether they are open or not; others are written too."""

import numpy as np
import pytest
import zarr
from filled import fill_store
from zarr.storage import LocalStore, MemoryStore, ZipStore

import ntkgen
from ntkgen.analysis.eigenvalues import SpectrumSettings, spectrum
from ntkgen.analysis.matrix import open_matrix
from ntkgen.errors import InputError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.place import folder_of


@pytest.fixture
def place(tmp_path):
    fill_store(tmp_path / "k.zarr", labels=np.array([0, 1, 0]), num_outputs=2)
    return tmp_path / "k.zarr"


def packed(place, path):
    """Pack a store into a zip file."""
    with ZipStore(path, mode="w") as store:
        for key in LocalFolder(place).sizes():
            zarr.core.sync.sync(store.set(key, zarr.core.buffer.cpu.Buffer.from_bytes((place / key).read_bytes())))
    return path


def test_a_kernel_in_a_zip_file_is_read_opened_or_not(place, tmp_path):
    path, there = packed(place, tmp_path / "k.zip"), ntkgen.open(place).array[:]
    with ZipStore(path) as opened:
        assert np.array_equal(ntkgen.open(opened).array[:], there)
    store = ntkgen.open(ZipStore(path))
    assert np.array_equal(store.array[:], there)
    assert store.missing_tiles() == []
    with ZipStore(path, mode="a") as writable, pytest.raises(InputError, match="read_only=True"):
        ntkgen.open(writable)
    assert spectrum(open_matrix(store), SpectrumSettings()).not_kept is not None


def test_a_zip_file_that_is_not_one_is_refused(tmp_path):
    (tmp_path / "k.zip").write_bytes(b"no zip file")
    for name in ("k.zip", "nothing.zip"):
        with pytest.raises(InputError, match="cannot be opened"):
            ntkgen.open(ZipStore(tmp_path / name))


def test_a_kernel_is_not_computed_into_a_zip_file(job, tmp_path):
    with pytest.raises(InputError, match="which only grows"):
        ntkgen.compute(job.module, job.x[:3], store=ZipStore(tmp_path / "k.zip", mode="w"))


def test_other_zarr_stores_are_taken_as_before(job, tmp_path):
    for store in (MemoryStore(), LocalStore(tmp_path / "k.zarr")):
        made = ntkgen.compute(job.module, job.x[:3], store=store, certify=False)
        assert np.array_equal(ntkgen.open(store).array[:], made.array[:])
    assert folder_of(tmp_path / "k.zarr").has("zarr.json")
