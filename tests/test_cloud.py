"""Kernels in an object store: a real S3 server on this machine, started by the tests."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from cases import small_network

import ntkgen
from ntkgen.errors import InputError, StoreError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.place import folder_of

obstore = pytest.importorskip("obstore", reason="the optional part ntkgen[cloud] is not installed")
if importlib.util.find_spec("moto") is None:
    pytest.skip("moto, the S3 server of these tests, is not installed", allow_module_level=True)

COMMAND = [
    "compute", "--models", "logistic", "--dataset", "digits", "--epochs", "1", "--allow-unconverged",
    "--subsample", "60", "--tile", "100", "--memory", "1GB", "--dtype", "float32", "--quiet",
]  # fmt: skip
STORE = "logistic-digits-seed0-n60.zarr"


@pytest.fixture(scope="module")
def server():
    """Start the server on a free port of this machine."""
    from moto import server as moto  # takes more than a second

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    found = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    found.start()
    host, port = found.get_host_and_port()
    yield f"http://{host}:{port}"
    found.stop()


@pytest.fixture
def bucket(server, monkeypatch, request):
    """Make an empty bucket, and set the environment as a user does."""
    names = {
        "AWS_ENDPOINT_URL": server, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
    }  # fmt: skip
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    name = f"b-{abs(hash(request.node.name))}"
    with urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")):
        pass
    return f"s3://{name}"


def objects(url):
    folder = folder_of(url)
    return {key: folder.read(key) for key in folder.sizes()}


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


LOCAL = {}


@pytest.fixture
def local(run):
    """The bytes of the same command in a folder, for which it is run once."""
    if not LOCAL:
        assert run(*COMMAND)[0] == 0
        LOCAL.update(files("runs"))
    for name, data in LOCAL.items():
        LocalFolder(Path("runs"), fsync=False).write(name, data)
    return dict(LOCAL)


@pytest.mark.slow
def test_a_kernel_and_its_network_go_to_the_bucket_as_to_a_folder(run, bucket, local, tmp_path):
    code, out, err = run(*COMMAND, "--out", f"{bucket}/some/runs", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["store"] == f"{bucket}/some/runs/{STORE}"
    assert objects(f"{bucket}/some/runs") == local
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # nothing beside the run in a folder

    code, out, _ = run("info", f"{bucket}/some/runs/{STORE}", "--json")
    assert code == 0
    assert json.loads(out)["status"] == "complete"
    assert run("verify", f"{bucket}/some/runs/{STORE}")[0] == 0


def test_a_stored_kernel_is_read_from_the_bucket(run, bucket, local):
    run(*COMMAND, "--out", bucket)
    kernel, here = ntkgen.open(f"{bucket}/{STORE}"), ntkgen.open(f"runs/{STORE}")
    assert np.array_equal(kernel.array[:], here.array[:])
    assert np.array_equal(kernel.dask[3:7].compute(), here.array[3:7])
    assert np.array_equal(kernel.array @ np.ones(600), here.array @ np.ones(600))
    store = folder_of(f"{bucket}/{STORE}").zarr_store(read_only=True)
    with xr.open_zarr(store) as found:
        assert np.array_equal(found["ntk_float32"].values, here.array[:])


@pytest.mark.slow
def test_a_killed_writer_is_followed_by_one_that_goes_on(run, bucket, local):
    out = f"{bucket}/runs"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ntkgen", *COMMAND, "--out", out]
    folder = folder_of(f"{out}/{STORE}")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env) as process:
        while process.poll() is None and len(folder.sizes("ntk_float32/c")) < 5:
            time.sleep(0.001)
        process.kill()
    there = folder.sizes("ntk_float32/c")
    assert 5 <= len(there) < 36
    assert run(*COMMAND, "--out", out)[0] == 0
    assert objects(out) == local


@pytest.mark.slow
def test_damage_in_the_bucket_is_found_repaired_and_made_anew(run, bucket, local):
    run(*COMMAND, "--out", bucket)
    folder = folder_of(f"{bucket}/{STORE}")
    data = bytearray(folder.read("ntk_float32/c/1/2"))
    data[100] ^= 1
    folder.write("ntk_float32/c/1/2", bytes(data))
    folder.write("ntk_float32/c/0/0", b"short")
    code, _, err = run("verify", f"{bucket}/{STORE}")
    assert code == 1
    assert "ntk_float32/c/1/2" in err
    with pytest.raises(StoreError, match=rf"\(1, 2\).*ntkgen verify --repair {bucket}/{STORE}`"):
        _ = ntkgen.open(f"{bucket}/{STORE}").array[100:110, 200:210]
    assert run("verify", "--repair", f"{bucket}/{STORE}")[0] == 0
    assert run(*COMMAND, "--out", bucket)[0] == 0
    assert objects(bucket) == local


@pytest.mark.slow
def test_parts_share_a_bucket_once_the_network_is_there(run, bucket, local):
    code, _, err = run(*COMMAND, "--out", bucket, "--part", "1/2")
    assert code == 2
    assert "ntkgen train" in err
    assert err.count("\n") == 1
    train = ["train", "--models", "logistic", "--dataset", "digits", "--epochs", "1", "--allow-unconverged"]
    assert run(*train, "--out", bucket, "--quiet")[0] == 0
    for number in (2, 1):
        assert run(*COMMAND, "--out", bucket, "--part", f"{number}/2")[0] == 0
    assert objects(bucket) == local


@pytest.mark.slow  # each worker imports torch
def test_workers_write_to_a_bucket(run, bucket, local, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run(*COMMAND, "--out", bucket, "--workers", "2", "--memory", "2GB")[0] == 0
    assert objects(bucket) == local


@pytest.mark.slow
def test_a_url_and_any_zarr_store_are_taken_from_python(bucket):
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    stored = ntkgen.compute(small_network(), x, store=f"{bucket}/k.zarr", tile_side=6)
    from zarr.storage import MemoryStore

    store = MemoryStore()
    ntkgen.compute(small_network(), x, store=store, tile_side=6)
    assert np.array_equal(ntkgen.open(store).array[:], stored.array[:])
    assert sorted(folder_of(store).sizes()) == sorted(objects(f"{bucket}/k.zarr"))
    again = ntkgen.compute(small_network(), x, store=store, tile_side=6)
    assert again.is_complete
    with pytest.raises(InputError, match="has no path"):
        _ = again.path


@pytest.mark.parametrize(
    ("change", "message"),
    [({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "credentials"), ({}, "credentials")],
    ids=["no server", "no bucket"],
)
def test_a_bucket_that_cannot_be_written_is_refused_before_anything_runs(run, bucket, change, message, monkeypatch):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(*COMMAND, "--out", "s3://not-there/runs")
    assert code == 2
    assert err.startswith("Error: Nothing can be written to s3://not-there/runs")
    assert message in err
    assert err.count("\n") == 1


def test_a_store_that_is_not_there_is_one_line(run, bucket):
    for command in ("info", "verify"):
        code, _, err = run(command, f"{bucket}/nothing.zarr")
        assert code == 2
        assert "There is no kernel store at" in err
        assert err.count("\n") == 1


def test_without_the_optional_part_it_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    code, _, err = run(*COMMAND, "--out", "s3://bucket/runs")
    assert code == 2
    assert "pip install 'ntkgen[cloud]'" in err
