"""Stores of very many tiles: what is there is listed by scanning folders, in a time that grows with their number."""

import dataclasses
import time

import numpy as np
import pytest

from ntkgen.plan.tiles import Tile, TileGrid
from ntkgen.store.manifest import Manifest
from ntkgen.store.opening import create_store
from ntkgen.store.provenance import Provenance
from ntkgen.store.schema import Samples

CHUNK_BYTES = 3 * 3 * 4 + 4


def many_tiles(job, side, path):
    """Make a store of side × side tiles of 3 rows whose files have the right size."""
    plan = dataclasses.replace(job.plan, grid=TileGrid(side, 3, 1))
    manifest = Manifest({"network": "3f2a"}, Provenance(), plan, ("float32",), "full")
    store = create_store(path, manifest, Samples(np.arange(side), np.zeros(side, dtype=np.int64)))
    for index in range(side):
        store.commit_block(index, np.ones(3), np.ones((1, 3)))
    store.create_kernels()
    for row in range(side):
        folder = path / "ntk_float32" / "c" / str(row)
        folder.mkdir(parents=True)
        for col in range(side):
            (folder / str(col)).write_bytes(bytes(CHUNK_BYTES))
    return store


def seconds(function):
    """Time a function: the best of three, since others use this machine too."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.slow
def test_the_time_to_list_what_is_missing_grows_with_the_number_of_tiles(job, tmp_path):
    few, many = many_tiles(job, 30, tmp_path / "few.zarr"), many_tiles(job, 90, tmp_path / "many.zarr")
    assert few.missing_tiles() == many.missing_tiles() == []
    assert seconds(many.missing_tiles) < 9 * 5 * seconds(few.missing_tiles)  # by its square it would be 81 times
    (many.path / "ntk_float32/c/7/80").unlink()
    (many.path / "ntk_float32/c/80/9").write_bytes(b"short")
    assert many.missing_tiles() == [Tile(7, 80), Tile(9, 80)]


@pytest.mark.slow
def test_a_hundred_thousand_files_are_listed_in_under_a_second(job, tmp_path):
    store = many_tiles(job, 317, tmp_path / "k.zarr")
    assert len(list((tmp_path / "k.zarr/ntk_float32/c").glob("*/*"))) == 317 * 317
    assert seconds(store.missing_tiles) < 1.0
