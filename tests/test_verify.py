"""Every file of a store is read, and what is wrong with it is named with what mends it."""

import json

import pytest
import zarr
from cases import files_of

import ntkgen
from ntkgen.kernel.store import open_store
from ntkgen.kernel.verify import Damage, explain_damage, files_to_remove, find_damage


@pytest.fixture(params=["upper", "full", "rectangular", "diagonal"])
def made(request, job, tmp_path):
    """Make a store in one of its shapes; return how to mend it."""
    others = job.x[:5] if request.param == "rectangular" else None
    output = request.param if request.param == "diagonal" else "full"
    settings = {"layout": request.param if request.param in {"upper", "full"} else "auto", "output": output}

    def make():
        path = tmp_path / "k.zarr"
        return ntkgen.compute(
            job.module, job.x, others, store=path, tile_side=3 if output == "diagonal" else 9, certify=False, **settings
        )

    return make


def chunks_of(store):
    return [name for name in files_of(store.path) if "/c/" in name]


def test_a_whole_store_has_no_damage_and_every_file_is_read(made):
    store, reports = made(), []
    assert find_damage(store, lambda *report: reports.append(report)) == []
    absent = sum(not (store.path / name / "c").exists() for name in ("row_label", "col_label"))  # none were given
    assert reports[-1] == (len(chunks_of(store)) + absent,) * 2


@pytest.mark.parametrize("first", range(3))
def test_each_missing_cut_or_flipped_file_is_found_and_mended(made, first):
    store = made()
    before = files_of(store.path)
    expected = set()
    for number, name in enumerate(chunks_of(store), start=first):
        path, problem = store.path / name, ("missing", "cut short", "damaged")[number % 3]
        content = bytearray(before[name])
        content[1] ^= 4
        path.write_bytes(content[:-1] if problem == "cut short" else content)
        if problem == "missing":
            path.unlink()
        expected.add(Damage(name, problem))
    found = find_damage(store)
    assert set(found) == expected
    for file in files_to_remove(store, found):
        (store.path / file).unlink(missing_ok=True)
    made()
    assert files_of(store.path) == before


def test_damaged_metadata_is_found_and_mended(made):
    store = made()
    before = files_of(store.path)
    (store.path / "row_output/zarr.json").unlink()
    (store.path / "ntk_float16/zarr.json").write_bytes(b"{")
    assert find_damage(store) == [Damage("row_output/zarr.json", "missing"), Damage("ntk_float16/zarr.json", "damaged")]
    made()
    assert files_of(store.path) == before


def test_entries_that_are_not_finite_are_found(made):
    store = made()
    array = zarr.open_group(store.path, mode="r+")["ntk_float32"]
    array[(0,) * (array.ndim - 2) + (0, 1)] = float("nan")
    name = "ntk_float32/c/0/0/0" if array.ndim == 3 else "ntk_float32/c/0/0"
    found = find_damage(store)
    assert found == [Damage(name, "not finite")]
    assert f"remove {name}, then run the same" in explain_damage(store, found)


def test_what_was_interrupted_is_missing(job, tmp_path):
    store = job.create(tmp_path / "k.zarr")
    found = find_damage(open_store(store.path))
    assert Damage("ntk_float16/zarr.json", "missing") in found
    message = explain_damage(store, found)
    assert "To mend it, run the same `ntkgen compute`" in message
    assert "\n" not in message


def test_nothing_is_written(made):
    store = made()
    before = files_of(store.path)
    find_damage(open_store(store.path))
    assert files_of(store.path) == before
    json.dumps([vars(each) for each in find_damage(store)])
