"""What others' tools make of a store: xarray with its coordinates, plain Zarr, SciPy; and the worked example."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse.linalg
import xarray as xr
from filled import fill_store

import ntkgen

SCRIPT = Path(__file__).parents[1] / "scripts" / "analyse_with_xarray.py"
LABELS = np.array([2, 0, 1, 0, 2, 1, 1])
M = 3


@pytest.fixture(scope="module", params=["upper", "full"])
def stored(request, tmp_path_factory):
    """A store of 7 samples and 3 outputs in ragged tiles, and its matrix."""
    path = tmp_path_factory.mktemp("stores") / f"{request.param}.zarr"
    return fill_store(path, labels=LABELS, num_outputs=M, tile_samples=3, layout=request.param)


def test_rows_are_selected_by_what_they_are(stored):
    store, K = stored
    label, output, sample = np.repeat(LABELS, M), np.tile(np.arange(M), 7), np.repeat(np.arange(7), M)
    xarray = store.xarray
    assert xarray.dims == ("row", "col")
    np.testing.assert_array_equal(xarray.sel(row_label=1), K[label == 1])
    np.testing.assert_array_equal(xarray.sel(row_label=1, col_label=2), K[label == 1][:, label == 2])
    np.testing.assert_array_equal(xarray.sel(row_output=0, col_sample=4), K[output == 0][:, sample == 4])
    chosen = (label == 1) & (output == 2)
    np.testing.assert_array_equal(xarray.sel(row_label=1).sel(row_output=2), K[chosen])
    np.testing.assert_array_equal(xarray.sel(row_sample=slice(2, 3)), K[(sample == 2) | (sample == 3)])
    np.testing.assert_array_equal(xarray[xarray.row_label.isin([0, 2])], K[label != 1])


def test_what_is_selected_keeps_its_coordinates(stored):
    part = stored[0].xarray.sel(row_label=1, col_output=2)
    assert set(part.row_label.values) == {1}
    assert list(part.col_label.values) == list(LABELS)
    assert list(part.row_sample.values) == [2, 2, 2, 5, 5, 5, 6, 6, 6]


def test_a_label_that_is_not_there_is_an_error(stored):
    with pytest.raises(KeyError):
        stored[0].xarray.sel(row_label=77)


def test_two_kernels_of_the_same_rows_are_aligned(stored):
    store, K = stored
    np.testing.assert_array_equal(store.xarray - 2 * store.xarray, -K)


def test_averages_over_classes(stored):
    store, K = stored
    means = store.xarray.groupby("row_label").mean().groupby("col_label").mean()
    of_class = np.eye(3)[np.repeat(LABELS, M)]
    of_class /= of_class.sum(0)
    np.testing.assert_allclose(means, of_class.T @ K @ of_class, rtol=1e-12)


def test_scipy_finds_eigenvalues(stored):
    store, K = stored
    found = scipy.sparse.linalg.eigsh(store.array.to_scipy(), k=3, v0=np.ones(len(K)), return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), np.linalg.eigvalsh(K)[-3:], rtol=1e-10)


# the worked example ---------------------------------------------------------------------------------------------------


def example():
    """Import the script."""
    spec = importlib.util.spec_from_file_location("analyse_with_xarray", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def full(tmp_path):
    return fill_store(tmp_path / "k.zarr", labels=LABELS, num_outputs=M, tile_samples=3, layout="full")


def test_the_example_agrees_with_numpy(full):
    store, K = full
    script = example()
    data, kernel = script.read(store.name)
    assert isinstance(data, xr.Dataset)
    np.testing.assert_array_equal(kernel, K)
    np.testing.assert_allclose(script.power_iteration(kernel, 60), np.linalg.eigvalsh(K)[-1], rtol=1e-8)
    y = np.eye(M)[LABELS].ravel()
    expected = y @ K @ y / (np.linalg.norm(K) * (y @ y))
    np.testing.assert_allclose(script.alignment(kernel), expected, rtol=1e-12)
    np.testing.assert_array_equal(script.one_output(kernel, 1), K[1::M, 1::M])
    of_class = np.eye(3)[LABELS] / np.bincount(LABELS)
    means = script.class_means(script.one_output(kernel, 1))
    np.testing.assert_allclose(means, of_class.T @ K[1::M, 1::M] @ of_class, rtol=1e-12)


def test_the_example_imports_nothing_of_this_package():
    source = SCRIPT.read_text()
    assert not [line for line in source.splitlines() if line.startswith(("import ntkgen", "from ntkgen"))]
    assert "xarray.open_zarr" in source


@pytest.mark.slow
def test_the_example_runs(full):
    done = subprocess.run([sys.executable, SCRIPT, full[0].name], capture_output=True, text=True, check=True)
    assert f"trace {np.trace(full[1])}"[:12] in done.stdout
    assert "alignment with the labels" in done.stdout


def test_the_example_refuses_one_triangle(tmp_path):
    store, _ = fill_store(tmp_path / "k.zarr", labels=LABELS, num_outputs=M, tile_samples=3, layout="upper")
    with pytest.raises(SystemExit, match="ntkgen mirror"):
        example().read(store.name)
    assert ntkgen.open(store.name).xarray.shape == (21, 21)


@pytest.mark.slow
def test_the_peak_of_memory_is_that_of_the_process_alone():
    """Of a child of a large process too, in which `getrusage` counts what the parent held."""
    held = np.ones(30_000_000)
    code = "from ntkgen.analysis.results import peak_bytes; import numpy; print(peak_bytes())"
    first = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert first < held.nbytes + 10**7
    code = code.replace("print", "x = numpy.ones(10_000_000); print")
    second = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert second - first == pytest.approx(8e7, rel=0.2)
