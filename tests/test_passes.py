"""Analysis with the workers of a dask cluster against the same in one process."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import chosen
from distributed import Client, LocalCluster
from filled import MEMORY, drawn, filled, rectangle
from zarr.storage import MemoryStore

from ntkgen import cli
from ntkgen.analysis import eigenvalue_density as densities
from ntkgen.analysis import eigenvalues as spectra
from ntkgen.analysis import passes
from ntkgen.analysis.alignment import align
from ntkgen.analysis.comparison import CompareSettings, compare
from ntkgen.analysis.eigenvalue_density import DensitySettings, density
from ntkgen.analysis.eigenvalues import SpectrumSettings, spectrum
from ntkgen.analysis.gradient_flow import FlowSettings, flow
from ntkgen.analysis.matrix import open_matrix
from ntkgen.analysis.passes import fold
from ntkgen.analysis.regression import RegressSettings, regress
from ntkgen.errors import InputError, StoreError, WorkerError
from ntkgen.files.place import folder_of
from ntkgen.store.opening import open_store


@pytest.fixture(scope="module")
def client():
    """A worker with two threads, in another folder than these tests."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, memory_limit=0, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(os.chdir, "/")
        yield client


@pytest.fixture
def out_of_core(monkeypatch):
    """Have nothing computed by LAPACK on the whole matrix."""
    monkeypatch.setattr(spectra, "FEW_ROWS", 0)
    monkeypatch.setattr(densities, "is_dense", lambda *_: False)
    monkeypatch.setattr("ntkgen.analysis.gradient_flow._method", lambda *_: "krylov")


SHIFTS = (0.5, 5.0)


def ask_spectrum(matrix, _folder):
    return spectrum(matrix, SpectrumSettings(top=5)).to_json()


def ask_density(matrix, _folder):
    return density(matrix, DensitySettings(passes=4)).to_json()


def ask_align(matrix, _folder):
    return align(matrix).to_json()


def ask_regress(matrix, folder):
    return regress(
        matrix, RegressSettings(SHIFTS, test=open_store(folder / "test.zarr"), method="cg", memory_bytes=MEMORY)
    ).to_json()


def ask_flow(matrix, folder):
    return flow(
        matrix, FlowSettings(times=(0.1, 1.0), test=open_store(folder / "test.zarr"), memory_bytes=MEMORY)
    ).to_json()


def ask_compare(matrix, folder):
    other = open_matrix(open_store(folder / "other.zarr"), client=matrix.client)
    return compare(matrix, other, CompareSettings(3, memory_bytes=MEMORY)).to_json()


def numbers(value):
    """All numbers of a result, in a row."""
    if isinstance(value, dict):
        left_out = {"seconds", "peak_bytes"}
        return [number for name, each in value.items() if name not in left_out for number in numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [float(value)] if isinstance(value, int | float) else []


def fill(folder: Path, layout: str):
    content = drawn(20, 3, layout=layout)
    filled(folder / "k.zarr", content)
    filled(folder / "test.zarr", rectangle(content, num_test=8))
    other = drawn(20, 3, seed=1, tile_samples=4, parameters="b7")
    filled(folder / "other.zarr", dataclasses.replace(other, labels=content.labels))
    return folder


@pytest.mark.usefixtures("out_of_core")
@pytest.mark.parametrize(
    ("ask", "layout"),
    [
        (ask_spectrum, "upper"),
        pytest.param(ask_spectrum, "full", marks=pytest.mark.slow),
        pytest.param(ask_density, "upper", marks=pytest.mark.slow),
        (ask_align, "full"),
        (ask_regress, "upper"),
        pytest.param(ask_flow, "full", marks=pytest.mark.slow),
        (ask_compare, "upper"),
    ],
)
def test_workers_find_the_same(client, ask, layout, tmp_path, monkeypatch):
    folder = fill(tmp_path, layout)
    monkeypatch.chdir(folder)  # the workers know no relative path
    alone = ask(open_matrix(open_store("k.zarr")), folder)
    for results in folder.glob("*.analysis"):
        shutil.rmtree(results)
    matrix = open_matrix(open_store("k.zarr"), client=client)
    together = ask(matrix, folder)
    assert not together["remembered"]
    assert matrix.tiles_read >= matrix.num_tiles
    assert together.keys() == alone.keys()
    assert len(numbers(together)) > 4
    np.testing.assert_allclose(numbers(together), numbers(alone), rtol=1e-7, atol=1e-9)


def test_a_product_is_divided_and_each_tile_read_once(client, tmp_path, monkeypatch):
    store = filled(tmp_path / "k.zarr", content := drawn(20, 3))
    matrix, steps, sizes = open_matrix(store, client=client), [], []
    submit = client.submit

    def counted(make, part, *args, **options):
        sizes.append(len(part))
        return submit(make, part, *args, **options)

    monkeypatch.setattr(client, "submit", counted)
    V = np.random.default_rng(0).normal(size=(60, 2))
    np.testing.assert_allclose(matrix.matmat(V, step=lambda: steps.append(1)), content.kernel @ V, rtol=1e-12)
    assert len(steps) == matrix.tiles_read == matrix.num_tiles == sum(sizes) == 28
    assert len(sizes) >= 2 * passes.PARTS_PER_THREAD - 1


def test_what_a_worker_finds_wrong_is_said_here(client, tmp_path):
    store = filled(tmp_path / "k.zarr", drawn(20, 3))
    matrix = open_matrix(store, client=client)
    (tmp_path / "k.zarr/ntk_float64/c/1/2").write_bytes(b"short")
    with pytest.raises(StoreError, match=r"Tile \(1, 2\) of ntk_float64 in .*k\.zarr is damaged"):
        matrix.matmat(np.ones((60, 1)))


def test_a_kernel_in_memory_has_no_workers(client):
    store = filled(folder_of(MemoryStore()), drawn())
    with pytest.raises(InputError, match="is in the memory of this process"):
        open_matrix(store, client=client).matmat(np.ones((21, 1)))


def die(_places, _nothing):
    os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [0, 3])
def test_a_part_that_kills_its_workers_is_one_error(allowed):
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=60) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", allowed))
        with pytest.raises(WorkerError, match="lost with every worker"):
            fold(client, die, [(0, 0)], [0])


def test_commands_take_a_scheduler(client, tmp_path, monkeypatch, capsys):
    fill(tmp_path, "upper")
    monkeypatch.chdir(tmp_path)
    address = client.scheduler.address
    assert cli.run(["analyze", "align", "k.zarr", "--scheduler", address, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["alignment"] == pytest.approx(
        align(open_matrix(open_store("test.zarr".replace("test", "k")))).alignment
    )


@pytest.mark.slow
@pytest.mark.parametrize("place", chosen(["tcp://127.0.0.1:9", "no/file.json", "."], ["tcp://127.0.0.1:9"]))
def test_no_scheduler_there_is_one_line(tmp_path, monkeypatch, capsys, place):
    fill(tmp_path, "upper")
    monkeypatch.setattr("ntkgen.engine.cluster.CONNECT_SECONDS", 1)
    assert cli.run(["analyze", "align", str(tmp_path / "k.zarr"), "--scheduler", place]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No cluster answers" in error
