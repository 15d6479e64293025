"""Every file of a store is read. Damaged files are named, removed, and written again with the same bytes."""

import errno
import itertools
import json
import shutil
import sys
from functools import partial
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
from ntkgen.checks import verify
from ntkgen.checks.verify import (
    Damage,
    explain_damage,
    explain_unfinished,
    files_to_remove,
    find_damage,
    repair,
    unfinished_tiles,
    whole_tiles,
)
from ntkgen.files.durable import PARTIAL
from ntkgen.files.folder import LocalFolder
from ntkgen.files.lock import write_lock
from ntkgen.plan.tiles import Tile
from ntkgen.store.opening import open_store

HARMS = {
    "missing": lambda content: None,
    "cut short": lambda content: content[:-1],
    "emptied": lambda content: b"",
    "too long": lambda content: content + b"\0",
    "zero-filled": lambda content: bytes(len(content)),
    "first bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "last bit": lambda content: content[:-1] + bytes([content[-1] ^ 128]),
}
PROBLEMS = {"emptied": "cut short", "zero-filled": "damaged", "first bit": "damaged", "last bit": "damaged"}


def settings_of(shape):
    side = 3 if shape == "diagonal" else 9
    output, layout = (
        ("diagonal", "auto") if shape == "diagonal" else ("full", "auto" if shape == "rectangular" else shape)
    )
    return {"layout": layout, "output": output, "tile_side": side, "certify": False, "fsync": False}


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """Compute a store of each shape once; return the function that computes or mends one, and where they are."""

    def make(path, shape):
        others = job.x[:5] if shape == "rectangular" else None
        labels = None if others is not None else torch.arange(len(job.x)) % 5
        x = job.x * 1e4  # so that float16 has a scale
        return ntkgen.compute(job.module, x, others, store=path, labels=labels, **settings_of(shape))

    return make, tmp_path_factory.mktemp("finished")


@pytest.fixture
def copied(finished, tmp_path):
    """Return a function that copies a finished store of some shape, and mends it when it is called again."""
    make, folder = finished

    def copy(shape):
        if (tmp_path / "k.zarr").exists():
            return make(tmp_path / "k.zarr", shape)
        if not (folder / shape).exists():
            make(folder / shape, shape)
        shutil.copytree(folder / shape, tmp_path / "k.zarr")
        return open_store(tmp_path / "k.zarr")

    return copy


@pytest.fixture(params=chosen(["upper", "full", "rectangular", "diagonal"], ["full", "diagonal"]))
def made(request, copied):
    """Make a store in one of its shapes; return how to mend it."""
    return partial(copied, request.param)


@pytest.fixture
def upper(copied):
    """Make a store of one triangle; return how to mend it."""
    return partial(copied, "upper")


def chunks_of(store):
    return [name for name in files_of(store.path) if "/c/" in name]


def tile_of(store, name):
    array, _, key = name.partition("/c/")
    if not array.startswith(("ntk_", "underflow")):
        return None
    numbers = [int(number) for number in key.split("/")]
    row, col = numbers[:2] if array.startswith("underflow") else numbers[-2:]
    return Tile(min(row, col), max(row, col)) if store.grid.is_symmetric else Tile(row, col)


def harm(path, kind):
    content = HARMS[kind](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    return PROBLEMS.get(kind, kind)


def mended(store):
    """Remove what is damaged, under the lock."""
    with write_lock(store.folder):
        store = open_store(store.folder, mode="r+")
        return repair(store, find_damage(store))


# what is found --------------------------------------------------------------------------------------------------------


def test_a_whole_store_has_no_damage_and_every_file_is_read(made):
    store, reports = made(), []
    assert find_damage(store, lambda *report: reports.append(report)) == []
    absent = sum(not (store.path / name / "c").exists() for name in ("row_label", "col_label"))  # none were given
    number = len(chunks_of(store)) + absent
    assert reports[-1] == ("files", number, number)


@pytest.mark.parametrize("first", chosen([0, 3, 5], [3]))
def test_every_file_that_is_harmed_is_found_removed_and_made_anew(made, first):
    store = made()
    before = files_of(store.path)
    kinds = dict(zip(chunks_of(store), itertools.cycle([*HARMS][first:] + [*HARMS][:first]), strict=False))
    kinds |= {"row_label/c/0": "emptied"}  # without any labels it is unknown whether some were given
    expected = {Damage(name, harm(store.path / name, kinds[name]), tile_of(store, name)) for name in chunks_of(store)}
    found = find_damage(store)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert find_damage(store) == found
    removed = mended(store)
    assert set(removed) == {damage.file for damage in found if damage.problem != "missing"}
    assert not ntkgen.open(store.path).manifest.is_complete
    made()
    assert files_of(store.path) == before


@pytest.mark.slow
def test_one_harmed_file_of_each_array_at_a_time(upper):
    store = upper()
    before = files_of(store.path)
    arrays = {name.partition("/c/")[0]: name for name in chunks_of(store)}  # the last chunk, which is ragged
    for name in arrays.values():
        expected = [Damage(name, harm(store.path / name, "zero-filled"), tile_of(store, name))]
        assert find_damage(store) == expected
        mended(store)
        upper()
        assert files_of(store.path) == before, name


@given(st.data())
def test_any_flipped_bit_is_found(finished, data):
    make, folder = finished
    path = folder / "flipped"
    store = open_store(path) if path.exists() else make(path, "upper")
    name = data.draw(st.sampled_from(chunks_of(store)))
    content = (path / name).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    (path / name).write_bytes(flipped)
    found = find_damage(store)
    (path / name).write_bytes(content)
    assert found == [Damage(name, "damaged", tile_of(store, name))]


def test_a_tile_of_zeros_is_whole(upper):
    store = upper()
    zarr.open_group(store.path, mode="r+")["ntk_float32"].with_config({"write_empty_chunks": True})[0:9, 9:18] = 0
    assert find_damage(store) == []


def test_entries_that_are_not_finite_are_found_and_what_is_beyond_the_array_is_not(made):
    store = made()
    before = files_of(store.path)
    array = zarr.open_group(store.path, mode="r+")["ntk_float32"]
    array[(0,) * (array.ndim - 2) + (-1, -1)] = np.inf
    zarr.open_group(store.path, mode="r+")["diagonal"][..., -1] = np.nan
    last = [name for name in chunks_of(store) if before[name] != (store.path / name).read_bytes()]
    assert find_damage(store) == [
        Damage(name, "not finite", tile_of(store, name)) for name in sorted(last, key=lambda name: "ntk" in name)
    ]
    assert len(last) == 2
    assert set(mended(store)) == set(last)
    made()
    assert files_of(store.path) == before


def test_what_the_disk_has_lost_is_unreadable_and_other_errors_are_not_the_files_fault(upper, monkeypatch):
    store, code = upper(), errno.EIO
    read = LocalFolder.read

    def failing(folder, key):
        if key == "ntk_float32/c/0/1":
            raise OSError(code, "Input/output error")
        return read(folder, key)

    monkeypatch.setattr(LocalFolder, "read", failing)
    assert find_damage(store) == [Damage("ntk_float32/c/0/1", "unreadable", Tile(0, 1))]
    code = errno.EACCES
    with pytest.raises(OSError, match="Input"):
        find_damage(store)


METADATA = {
    "missing": lambda text: None,
    "no JSON": lambda text: "{",
    "empty": lambda text: "",
    "other JSON": lambda text: "[1]",
    "no text": lambda text: b"\xff\xfe",
    "another shape": lambda text: text.replace("33", "34"),
    "another scale": lambda text: text.replace('"scale_factor": ', '"scale_factor": 1'),
    "another checksum": lambda text: text.replace("crc32c", "crc32d"),
    "another node": lambda text: text.replace('"array"', '"group"'),
}


WRITTEN = [
    (name, kind)
    for name, kind in itertools.product(["row_output", "diagonal", "ntk_float16", "underflow_float16"], METADATA)
    if (kind != "another scale" or name == "ntk_float16") and (kind != "another shape" or "underflow" not in name)
]


@pytest.mark.parametrize(("name", "kind"), chosen(WRITTEN, WRITTEN[::7]))
def test_damaged_metadata_is_found_and_made_anew(upper, name, kind):
    store = upper()
    before = files_of(store.path)
    file = store.path / name / "zarr.json"
    content = METADATA[kind](file.read_text())
    assert content != file.read_text()
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert find_damage(open_store(store.path)) == [
        Damage(f"{name}/zarr.json", "missing" if kind == "missing" else "damaged")
    ]
    mended(store)
    upper()
    assert files_of(store.path) == before


def test_chunks_are_read_where_their_metadata_is_damaged(upper):
    store = upper()
    (store.path / "ntk_float32/zarr.json").write_text("{")
    harm(store.path / "ntk_float32/c/1/2", "last bit")
    assert find_damage(store) == [
        Damage("ntk_float32/zarr.json", "damaged"),
        Damage("ntk_float32/c/1/2", "damaged", Tile(1, 2)),
    ]


# unfinished stores ----------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def stop_after(number):
    def report(stage, done, total, note=""):
        if stage == "tiles" and done == number:
            raise StoppedError

    return report


def test_what_is_not_computed_yet_is_no_damage(job, tmp_path):
    store = job.create(tmp_path / "k.zarr")
    assert find_damage(open_store(store.path)) == []
    assert len(unfinished_tiles(store, [])) == store.grid.num_tiles
    with pytest.raises(StoppedError):
        job.run(store, report=stop_after(4))
    store = open_store(store.path)
    assert find_damage(store) == []
    assert len(whole_tiles(store, [])) >= 4
    message = explain_unfinished(store, unfinished_tiles(store, []))
    assert "Run the same `ntkgen compute` again" in message
    assert f"all of its 10 tiles and the mark of completion, found {len(whole_tiles(store, []))} tiles" in message


def test_damage_is_found_in_an_unfinished_store_and_made_anew_with_the_rest(job, tmp_path):
    whole = files_of(job.run(job.create(tmp_path / "whole.zarr")).path)
    store = job.create(tmp_path / "k.zarr")
    with pytest.raises(StoppedError):
        job.run(store, report=stop_after(4))
    store = open_store(store.path)
    harm(store.path / "ntk_float32/c/0/1", "first bit")
    harm(store.path / "ntk_float16/c/0/2", "emptied")
    (store.path / "underflow_float16/c/0/0/0").unlink()  # the tile is there: its counts are lost
    (store.path / "row_output/c/0").unlink()
    found = find_damage(store)
    assert found == [
        Damage("row_output/c/0", "missing"),
        Damage("ntk_float16/c/0/2", "cut short", Tile(0, 2)),
        Damage("ntk_float32/c/0/1", "damaged", Tile(0, 1)),
        Damage("underflow_float16/c/0/0/0", "missing", Tile(0, 0)),
    ]
    assert Tile(0, 2) not in unfinished_tiles(store, found)
    assert not {Tile(0, 0), Tile(0, 1), Tile(0, 2)} & set(whole_tiles(store, found))
    assert "ntk_float16/c/0/0" in mended(store)
    job.resume(store.path)
    assert files_of(store.path) == whole


# repair ---------------------------------------------------------------------------------------------------------------


def test_the_counts_of_a_tile_go_with_its_tile(made):
    store = made()
    name = next(name for name in chunks_of(store) if name.startswith("underflow"))
    harm(store.path / name, "first bit")
    plane = "0/" if store.grid.num_planes > 1 else ""
    assert files_to_remove(store, find_damage(store)) == [name, f"ntk_float16/c/{plane}0/0"]


def test_of_a_tile_on_both_sides_the_damaged_one_goes_alone(copied):
    store = copied("full")
    harm(store.path / "ntk_float32/c/2/1", "first bit")
    assert find_damage(store) == [Damage("ntk_float32/c/2/1", "damaged", Tile(1, 2))]
    assert mended(store) == ["ntk_float32/c/2/1"]
    assert open_store(store.path).missing_tiles() == [Tile(1, 2)]


def test_a_repaired_store_is_not_taken_for_finished_and_has_no_certificate(job, tmp_path):
    path = tmp_path / "k.zarr"
    before = files_of(ntkgen.compute(job.module, job.x, store=path, tile_side=9).path)
    harm(path / "ntk_float32/c/0/1", "missing")  # nothing is left to remove
    assert mended(open_store(path)) == []
    store = open_store(path)
    assert (store.manifest.is_complete, store.manifest.certificate) == (False, None)
    assert "consolidated_metadata" not in json.loads((path / "zarr.json").read_text())
    ntkgen.compute(job.module, job.x, store=path, tile_side=9)
    assert files_of(path) == before


def stamps(path):
    return {str(file): file.stat().st_mtime_ns for file in [path, *path.rglob("*")]}


def test_a_whole_store_is_left_alone(made):
    store = made()
    before = files_of(store.path), stamps(store.path)
    assert mended(store) == []
    assert (files_of(store.path), stamps(store.path)) == before


def test_left_overs_are_swept_by_a_repair_alone(upper):
    store = upper()
    leftover = store.path / f"ntk_float32/c/0/1.3f2a{PARTIAL}"
    leftover.write_bytes(b"half")
    assert find_damage(store) == []
    assert leftover.exists()
    assert mended(store) == []
    assert not leftover.exists()


def test_the_advice_says_to_repair_where_a_file_must_go(upper):
    store = upper()
    harm(store.path / "ntk_float32/c/0/1", "missing")
    message = explain_damage(store, find_damage(store))
    assert "To repair it, run the same `ntkgen compute` again" in message
    harm(store.path / "ntk_float32/c/0/2", "first bit")
    message = explain_damage(store, find_damage(store))
    assert f"To repair it, run `ntkgen verify --repair {store.path}`, then run the same `ntkgen compute`" in message
    assert "\n" not in message


def test_a_store_that_lies_in_no_folder_is_read_and_repaired_too(job):
    memory = MemoryStore()

    def make():
        return ntkgen.compute(job.module, job.x, store=memory, tile_side=9, layout="upper", certify=False)

    def contents():
        return {key: store.folder.read(key) for key in store.folder.sizes()}

    store = make()
    before = contents()
    for number, (kind, change) in enumerate(HARMS.items()):
        name = f"ntk_float32/c/0/{number}" if number < 4 else f"ntk_float16/c/1/{number - 3}"
        store.folder.remove(name) if change(before[name]) is None else store.folder.write(name, change(before[name]))
        assert Damage(name, PROBLEMS.get(kind, kind), tile_of(store, name)) in find_damage(store)
    assert len(find_damage(store)) == len(HARMS)
    assert len(mended(store)) == len(HARMS) - 1
    make()
    assert contents() == before


def test_many_files_are_read_in_batches_and_few_threads(upper, monkeypatch):
    store = upper()
    for index in range(4):
        harm(store.path / f"ntk_float32/c/{index}/3", "last bit")
    found = find_damage(store)
    for limits in ({"BATCH_FILES": 1}, {"BATCH_FILES": 3}, {"HELD_BYTES": 1}):
        with monkeypatch.context() as patch:
            for name, value in limits.items():
                patch.setattr(verify, name, value)
            assert find_damage(store) == found
    assert [damage.tile for damage in found] == [Tile(index, 3) for index in range(4)]


# the command ----------------------------------------------------------------------------------------------------------

DIGITS = ["compute", "--models", "logistic", "--epochs", "0", "--subsample", "40", "--tile", "100", "--no-fsync"]


@pytest.fixture
def digits(run_once):
    """Compute a small kernel with the command line."""
    run_once(*DIGITS)
    return next(Path("runs").glob("*.zarr"))


def test_the_command_repairs_what_the_same_compute_then_makes_anew(run, digits):
    before = files_of(digits)
    harms = dict(zip(["ntk_float32/c/0/1", "ntk_float16/c/3/0", "diagonal/c/2", "row_label/c/0"], HARMS, strict=False))
    for name, kind in harms.items():
        harm(digits / name, kind)
    code, out, err = run("verify", digits, "--recompute", "0")
    assert (code, err.count("\n")) == (1, 1)
    assert f"To repair it, run `ntkgen verify --repair {digits}`" in err
    assert "  cut short   ntk_float16/c/3/0" in out
    assert "tile (0, 3)" in out
    code, out, err = run("verify", digits, "--repair", "--recompute", "0")
    assert (code, err) == (0, "")
    assert "  removed     3 damaged files\n  next        run the same `ntkgen compute` again" in out
    code, out, err = run("verify", digits, "--recompute", "0")
    assert (code, err.count("\n")) == (1, 1)
    assert run(*DIGITS)[0] == 0
    assert files_of(digits) == before
    assert run("verify", digits)[0] == 0


@pytest.mark.slow
def test_json_says_what_was_found_and_what_was_removed(run, digits):
    whole = json.loads(run("verify", digits, "--json", "--recompute", "0")[1])
    assert (whole["is_whole"], whole["damage"], whole["removed"], whole["recomputed"]) == (True, [], [], [])
    assert (whole["rows"], whole["tiles"], whole["tiles_missing"]) == (400, 10, 0)
    harm(digits / "ntk_float32/c/0/1", "first bit")
    code, out, err = run("verify", digits, "--repair", "--json", "--recompute", "0")
    result = json.loads(out)
    assert (code, err, result["is_whole"]) == (0, "", False)
    assert result["damage"] == [{"file": "ntk_float32/c/0/1", "problem": "damaged", "tile": [0, 1]}]
    assert result["removed"] == ["ntk_float32/c/0/1"]
    assert result["next"].startswith("run the same `ntkgen compute` again")
    code, out, _ = run("verify", digits, "--json", "--recompute", "0")
    result = json.loads(out)
    assert (code, result["is_whole"], result["damage"], result["tiles_missing"]) == (1, False, [], 1)


def test_an_unfinished_store_is_not_whole(run, digits):
    harm(digits / "ntk_float32/c/0/1", "missing")
    harm(digits / "ntk_float32/c/2/3", "missing")
    assert run("verify", digits, "--repair", "--recompute", "0")[0] == 0
    code, out, err = run("verify", digits, "--recompute", "0")
    assert code == 1
    assert "unfinished  2 of 10 tiles are not computed yet" in out
    assert "found 8 tiles" in err
    assert run("verify", digits, "--recompute", "0", "--repair")[0] == 0  # nothing bad is in it


def test_a_store_that_another_process_writes_is_not_repaired(run, digits):
    harm(digits / "ntk_float32/c/0/1", "first bit")
    before = files_of(digits)
    with write_lock(digits):
        code, out, err = run("verify", digits, "--repair")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert run("verify", digits, "--recompute", "0")[0] == 1  # to read it needs no lock
    assert files_of(digits) == before


@pytest.mark.slow
def test_stores_after_one_that_cannot_be_opened_are_read(run, digits):
    code, out, err = run("verify", "nothing.zarr", f"{digits}/", "--json")
    results = [json.loads(line) for line in out.splitlines()]
    assert (code, err.count("\n")) == (2, 1)
    assert [result["is_whole"] for result in results] == [None, True]
    assert "There is no kernel store" in results[0]["error"]
    assert not Path("nothing.zarr.lock").exists()
    (digits / "zarr.json").write_text("{")
    assert run("verify", digits)[0] == 2
    assert run("verify", "nowhere/nothing.zarr", "--repair")[0] == 2
    code, out, err = run("verify", "s3://")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not Path("nowhere").exists()


@pytest.mark.slow
def test_a_certificate_is_made_of_a_whole_store_after_a_repair_found_nothing(run, digits):
    before = files_of(digits)
    code, _, err = run("verify", digits, "--repair", "--certify")
    assert (code, err) == (0, "")
    assert files_of(digits) == before


def test_a_certificate_that_cannot_be_made_hides_nothing_else(run, digits):
    next(Path("runs").glob("*.pt")).unlink()
    code, out, err = run("verify", digits, "--certify", "--json", "--recompute", "0")
    assert (code, err.count("\n")) == (2, 1)
    assert json.loads(out)["is_whole"]


def test_people_are_shown_some_of_many_files(run, digits, monkeypatch):
    monkeypatch.setattr(sys.modules["ntkgen.cli.verify"], "SHOWN", 3)
    for index in range(4):
        harm(digits / f"ntk_float32/c/{index}/0", "first bit")
        harm(digits / f"ntk_float16/c/{index}/0", "first bit")
    out = run("verify", digits, "--recompute", "0")[1]
    assert out.count("  damaged ") == 3
    assert "… and 5 more files; --json lists all" in out
