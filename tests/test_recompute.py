"""Stored tiles are made again and compared: to the bit where the machine is the store's, else but for rounding."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cases import chosen, files_of
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore

import ntkgen
from ntkgen import origin
from ntkgen.engine.recompute import Resources, draw_tiles, must_be_equal, recompute, tolerance_of
from ntkgen.errors import BudgetError, FingerprintError
from ntkgen.inputs import Inputs
from ntkgen.plan.plan import Budget
from ntkgen.plan.tiles import Tile
from ntkgen.store.opening import open_store
from ntkgen.store.schema import Samples
from ntkgen.training import zoo

CPU = torch.device("cpu")
RESOURCES = Resources(CPU, Budget(1 << 30, 1 << 30))
SHAPES = {
    "upper": {"layout": "upper"},
    "full": {"layout": "full"},
    "rectangular": {},
    "diagonal": {"output": "diagonal", "tile_side": 3},
    "trace": {"output": "trace", "tile_side": 3},
    "centered": {"output": "centered", "tile_side": 6},
    "float64": {"precision": "float64", "dtypes": ("float16", "float32", "float64")},
    "bfloat16": {"precision": "bfloat16"},
}


def inputs_of(job, shape="upper"):
    labels = np.zeros(len(job.x), np.int64)
    against = job.x[:5] if shape == "rectangular" else None
    return Inputs(job.x, Samples(np.arange(len(job.x)), labels), against)


def made(job, place, shape="upper"):
    settings = {"tile_side": 9, "certify": False, **SHAPES[shape]}
    return ntkgen.compute(job.module, job.x, inputs_of(job, shape).against, store=place, **settings)


@pytest.fixture
def store(job, tmp_path):
    return made(job, tmp_path / "k.zarr")


def again(store, job, tiles, shape="upper"):
    return recompute(store, job.module, inputs_of(job, shape), tiles, RESOURCES)


def changed(store, **changes):
    """Change what a store says of the machine, or of how often it was planned."""
    plan = dataclasses.replace(store.manifest.plan, environment=changes.pop("environment", store_environment(store)))
    store = open_store(store.folder, mode="r+")
    store.set_manifest(dataclasses.replace(store.manifest, plan=plan, **changes))
    return store


def store_environment(store):
    return store.manifest.plan.environment


def other_machine(store):
    return changed(store, environment=dataclasses.replace(store_environment(store), device_name="another processor"))


def spoil(store, dtype, change, rows=slice(0, 9), cols=slice(9, 18)):
    """Write other numbers with their right checksum."""
    array = zarr.open_group(store.folder.zarr_store(read_only=False), mode="r+")[f"ntk_{dtype}"]
    array[..., rows, cols] = change(array[..., rows, cols])


# to the bit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", chosen(SHAPES, [*SHAPES][::3]))
def test_every_tile_is_the_same_again(job, shape):
    store = made(job, MemoryStore(), shape)
    before = {key: store.folder.read(key) for key in store.folder.sizes()}
    tiles, reports = list(store.grid.tiles()), []
    found = recompute(
        store, job.module, inputs_of(job, shape), tiles[::3], RESOURCES, lambda *report: reports.append(report)
    )
    assert {(each.tile, each.dtype) for each in found} == {
        (tile, dtype) for tile in tiles[::3] for dtype in store.manifest.dtypes
    }
    assert all(each.equal and not each.different and each.max_error == each.tolerance == 0 for each in found)
    assert reports[-1] == ("recomputed", len(tiles[::3]), len(tiles[::3]))
    assert {key: store.folder.read(key) for key in store.folder.sizes()} == before


def test_one_bit_in_one_dtype_is_named(store, job):
    spoil(store, "float32", lambda values: np.nextafter(values, np.float32(np.inf)))
    half, single = again(store, job, [Tile(0, 1)])
    assert (half.dtype, half.equal, half.different) == ("float16", True, ())
    assert (single.dtype, single.equal, single.different) == ("float32", False, ("ntk_float32/c/0/1",))
    assert 0 < single.max_error < 1e-7
    assert all(each.equal for each in again(store, job, [Tile(0, 0), Tile(1, 1)]))


def test_a_wrong_mirror_and_wrong_counts_are_named(job, tmp_path):
    store = made(job, tmp_path / "k.zarr", "full")
    spoil(
        store, "float64" if "float64" in store.manifest.dtypes else "float32", lambda v: 2 * v, slice(9, 18), slice(9)
    )
    group = zarr.open_group(store.path, mode="r+")
    group["underflow_float16"][0, 1] += 1
    half, single = again(store, job, [Tile(0, 1)])
    assert half.different == ("underflow_float16/c/0/1/0",)
    assert single.different == ("ntk_float32/c/1/0",)


def test_another_network_is_refused(store, job):
    with pytest.raises(FingerprintError, match="other parameters"):
        recompute(store, zoo.build("logistic", 3, seed=0), inputs_of(job), [Tile(0, 0)], RESOURCES)


def test_too_little_memory_is_refused(store, job):
    with pytest.raises(BudgetError):
        recompute(store, job.module, inputs_of(job), [Tile(0, 0)], Resources(CPU, Budget(10, 10)))


# but for rounding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", chosen(SHAPES, [*SHAPES][::3]))
@pytest.mark.numeric
def test_on_another_machine_rounding_is_allowed_and_no_more(job, shape):
    store = other_machine(made(job, MemoryStore(), shape))
    assert not must_be_equal(store, CPU)
    found = again(store, job, [Tile(0, 1)], shape)
    assert all(each.equal and not each.different and each.tolerance > 0 for each in found)
    side, dtype = store.grid.side, store.manifest.dtypes[-1]
    tile = (slice(0, side), slice(side, 2 * side))
    tolerance = tolerance_of(dtype, store.manifest.plan.precision)
    spoil(store, dtype, lambda values: values * (1 + tolerance / 4), *tile)
    *_, last = again(store, job, [Tile(0, 1)], shape)
    assert not last.equal
    assert not last.different
    assert 0 < last.max_error < tolerance
    spoil(store, dtype, lambda values: -values, *tile)
    *_, last = again(store, job, [Tile(0, 1)], shape)
    assert last.max_error > tolerance
    assert last.different == tuple(sorted(last.different))
    assert len(last.different) in {1, 2, store.grid.num_planes, 2 * store.grid.num_planes}


def test_what_was_continued_elsewhere_or_by_another_version_need_not_be_equal(store):
    assert must_be_equal(store, CPU)
    assert not must_be_equal(changed(store, replanned=1), CPU)
    text = (store.path / "zarr.json").read_text()
    (store.path / "zarr.json").write_text(text.replace('"replanned": 1', '"replanned": 0'))
    assert must_be_equal(open_store(store.path), CPU)
    (store.path / "zarr.json").write_text(text.replace('"source": "ntkgen ', '"source": "ntkgen 99'))
    assert not must_be_equal(open_store(store.path), CPU)


@pytest.mark.parametrize("precision", ["float64", "float64-accumulate", "float32", "tf32", "bfloat16"])
def test_tolerances_grow_with_what_is_rounded_and_find_what_is_wrong(precision):
    tolerances = [tolerance_of(dtype, precision) for dtype in ("float64", "float32", "float16")]
    assert tolerances == sorted(tolerances)
    assert tolerances[-1] < 0.05


@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**62))
def test_tiles_are_drawn_once_each_in_order_and_by_their_seed(side, count, seed):
    tiles = [Tile(row, col) for row in range(side) for col in range(row, side)]
    drawn = draw_tiles(tiles, count, seed)
    assert len(drawn) == min(count, len(tiles))
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(tiles)
    assert drawn == draw_tiles(tiles, count, seed)
    assert draw_tiles([], count, seed) == []


# the command ----------------------------------------------------------------------------------------------------------

DIGITS = ["compute", "--models", "logistic", "--epochs", "0", "--subsample", "40", "--tile", "100", "--no-fsync"]


@pytest.fixture
def digits(run_once):
    """Compute a small kernel with the command line."""
    run_once(*DIGITS, "--no-certify")
    return next(Path("runs").glob("*.zarr"))


def test_a_tile_is_made_again_without_being_asked_for(run, digits):
    before = files_of(digits)
    code, out, err = run("verify", digits)
    assert (code, err) == (0, "")
    assert "float16 has equal bits, float32 has equal bits" in out
    result = json.loads(run("verify", digits, "--json", "--recompute", "3")[1])
    assert len({tuple(each["tile"]) for each in result["recomputed"]}) == 3
    assert all(each["equal"] and each["max_error"] == 0 for each in result["recomputed"])
    others = json.loads(run("verify", digits, "--json", "--recompute", "3", "--seed", "1")[1])
    assert others["recomputed"] != result["recomputed"]
    assert json.loads(run("verify", digits, "--json", "--recompute", "0")[1])["recomputed"] == []
    assert files_of(digits) == before


def test_a_tile_that_differs_is_named_removed_and_made_anew(run, digits):
    before = files_of(digits)
    array = zarr.open_group(digits, mode="r+")["ntk_float32"]
    array[100:200, 200:300] = 0  # a right checksum, and wrong numbers
    code, out, err = run("verify", digits, "--recompute", "10")
    assert (code, err.count("\n")) == (1, 1)
    assert "different   ntk_float32/c/1/2" in out
    assert "tile (1, 2)" in out
    assert "float32 has an error of " in out
    code, out, err = run("verify", digits, "--recompute", "10", "--repair", "--json")
    result = json.loads(out)
    assert (code, err, result["removed"]) == (0, "", ["ntk_float32/c/1/2"])
    assert result["damage"] == [{"file": "ntk_float32/c/1/2", "problem": "different", "tile": [1, 2]}]
    bad = [each for each in result["recomputed"] if not each["equal"]]
    assert [(each["tile"], each["dtype"], each["is_different"]) for each in bad] == [([1, 2], "float32", True)]
    assert run(*DIGITS, "--no-certify")[0] == 0
    assert files_of(digits) == before


def test_on_another_machine_the_command_allows_for_rounding(run, digits):
    other_machine(open_store(digits))
    code, out, _ = run("verify", digits, "--json")
    assert code == 0
    assert all(each["tolerance"] > 0 for each in json.loads(out)["recomputed"])
    array = zarr.open_group(digits, mode="r+")["ntk_float32"]
    array[:, :] = array[:, :] * np.float32(1 + 1e-6)
    code, out, _ = run("verify", digits)
    assert code == 0
    assert "float32 has an error of " in out
    assert "7.7e-06 allowed" in out


def test_what_cannot_be_found_again_is_worth_a_line_or_wrong_if_it_was_asked_for(run, digits):
    next(Path("runs").glob("*.pt")).unlink()
    code, out, err = run("verify", digits)
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith(f"No tile of {digits} was computed again. The network of")
    assert "every file of" in out
    code, out, err = run("verify", digits, "--recompute", "1", "--json")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("Error: The network of")
    assert "The network of" in json.loads(out)["not_recomputed"]
    assert run("verify", digits, "--recompute", "0")[2] == ""


def test_of_a_store_made_in_python_no_tile_is_made_again(run, job, tmp_path):
    made(job, tmp_path / "k.zarr")
    code, _, err = run("verify", "k.zarr")
    assert (code, err.count("\n")) == (0, 1)
    assert "Was it made in Python" in err
    assert run("verify", "k.zarr", "--recompute", "1")[0] == 2


@pytest.mark.slow
def test_what_takes_long_or_fetches_data_is_done_on_request_alone(run, digits, monkeypatch):
    loaded = []
    load = origin.datasets.load
    monkeypatch.setattr(origin.datasets, "load", lambda *args, **kwargs: loaded.append(kwargs) or load(*args, **kwargs))
    assert run("verify", digits)[0] == 0
    assert run("verify", digits, "--recompute", "1")[0] == 0
    assert [kwargs.get("download", True) for kwargs in loaded] == [False, True]
    monkeypatch.setattr(origin, "QUICK_FLOPS", 1)
    code, _, err = run("verify", digits)
    assert code == 0
    assert "Request the tile with --recompute 1" in err
    assert run("verify", digits, "--recompute", "1")[2] == ""
    assert run("verify", digits, "--recompute", "1", "--memory", "1kB")[0] == 2


def test_tiles_are_not_compared_while_it_is_not_known_of_what_they_are(run, digits):
    (digits / "sample_index/c/0").unlink()
    code, out, _ = run("verify", digits, "--recompute", "1", "--json")
    assert code == 2  # asked for, and impossible
    assert "sample_index/c/0" in json.loads(out)["not_recomputed"]
    assert run("verify", digits)[0] == 1
    assert run("verify", digits, "--repair")[0] == 0


def test_of_an_unfinished_store_the_tiles_that_are_there_are_made_again(run, digits):
    (digits / "ntk_float32/c/0/0").unlink()
    assert run("verify", digits, "--repair", "--recompute", "0")[0] == 0
    code, out, _ = run("verify", digits, "--recompute", "99", "--json")
    assert code == 1
    assert len(json.loads(out)["recomputed"]) == 2 * 9
