"""A path means what its user meant: home, current folder, links, long names; and it is shown as it was written."""

import json
import os
import pwd
from pathlib import Path

import numpy as np
import pytest
import torch
from filled import PROVENANCE, fill_store, gram
from zarr.storage import LocalStore

import ntkgen
from ntkgen.cli.plot import unique_names
from ntkgen.data import official
from ntkgen.engine import cluster
from ntkgen.engine.cluster import connected
from ntkgen.errors import InputError
from ntkgen.files.folder import LocalFolder, file_of
from ntkgen.files.lock import tile_lock, write_lock
from ntkgen.files.paths import absolute, beside, expanded
from ntkgen.files.place import folder_of
from ntkgen.origin import _locate
from ntkgen.store.store import KernelStore

X = torch.arange(12.0).reshape(4, 3).sin()
LABELS = np.array([0, 1, 0, 1])


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture
def no_home(monkeypatch):
    """A user whom no list knows, as in a container that is run under a number."""

    def unknown(*_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def kernel_of(place, **options) -> KernelStore:
    return ntkgen.compute(torch.nn.Linear(3, 2), X, store=place, fsync=False, certify=False, **options)


# the home -------------------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home(home):
    store = kernel_of("~/k.zarr")
    assert (home / "k.zarr/zarr.json").exists()
    assert ntkgen.open("~/k.zarr").array.shape == (8, 8)
    assert store.name == "~/k.zarr"  # as it was written
    assert str(store.folder.parent / "x") == "~/x"
    assert str(folder_of("~").parent) == "~/.."
    assert file_of("~/net.pt").folder.path == home
    assert list(Path().iterdir()) == []


def test_a_tilde_is_the_home_in_every_command(home, run, monkeypatch):
    monkeypatch.chdir(home.parent / "work")
    fill_store(home / "k.zarr", labels=LABELS, num_outputs=2)
    assert run("info", "~/k.zarr")[0] == 0
    code, out, _ = run("analyze", "spectrum", "~/k.zarr", "--json")
    assert (code, json.loads(out)["store"]) == (0, "~/k.zarr")
    assert (home / "k.zarr.analysis").is_dir()
    assert run("verify", "~/k.zarr", "--recompute", "0")[0] == 0
    raw = gram(8).astype(np.float32)
    raw.tofile(home / "ntk_float32.bin")
    assert run("import", "~/ntk_float32.bin", "--samples", "4", "--outputs", "2")[0] == 0
    assert (home / "ntk_float32.imported.zarr/zarr.json").exists()
    assert (
        run("compute", "--models", "logistic", "--epochs", "0", "--subsample", "2", "--out", "~/runs", "--no-certify")[
            0
        ]
        == 0
    )
    assert len(list((home / "runs").glob("*.zarr"))) == 1
    assert not (home.parent / "~").exists()


def test_data_sets_are_looked_for_in_the_home(home):
    assert official.data_directory(Path("~/data")) == home / "data"
    (home / "mine.npz").touch()
    assert _locate("mine.npz", [Path("~")]) == str(home / "mine.npz")


def test_the_file_of_a_scheduler_is_looked_for_in_the_home(home, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0)
    with pytest.raises(InputError, match=f"No cluster answers at {home}/scheduler.json"), connected("~/scheduler.json"):
        pass


def test_without_a_home_a_kernel_is_computed_and_a_tilde_is_refused(no_home, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kernel_of(tmp_path / "k.zarr").is_complete
    for way in (expanded, absolute, folder_of, ntkgen.open):
        with pytest.raises(InputError, match="home directory that is not known"):
            way("~/k.zarr")


# the current folder ---------------------------------------------------------------------------------------------------


def test_a_store_is_read_after_its_process_has_gone_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = kernel_of("runs/k.zarr")
    opened = ntkgen.open("runs/k.zarr")
    there = opened.array[:]
    monkeypatch.chdir("/")
    for store in (made, opened):
        assert np.array_equal(store.array[:], there)
        assert store.missing_tiles() == []
        assert store.name == "runs/k.zarr"
        assert store.path == tmp_path / "runs/k.zarr"
        assert np.array_equal(store.xarray.values, there)


def test_a_folder_is_shown_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    shown = {
        "k": ("k", "."),
        "a/k/": ("a/k", "a"),
        ".": (".", ".."),
        "..": ("..", "../.."),
        "a/..": ("a/..", "a/../.."),
    }
    for written, (name, above) in shown.items():
        folder = LocalFolder(Path(written))
        assert (str(folder), str(folder.parent)) == (name, above)
        assert folder.path == Path(os.path.normpath(tmp_path / written))
        assert folder.parent.path == folder.path.parent


def test_two_dots_lead_above_what_a_link_points_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there/below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("there/below")
    assert absolute("link/../k.zarr") == tmp_path / "there/k.zarr"
    assert absolute("link/k.zarr") == tmp_path / "link/k.zarr"


def test_a_current_folder_that_has_gone_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError, match="cannot be resolved"):
        folder_of("k.zarr")
    assert folder_of(tmp_path / "k.zarr").path == tmp_path / "k.zarr"


@pytest.mark.parametrize("written", [".", "..", "../k.zarr/", "sub/.."])
def test_a_kernel_lies_in_the_current_folder_or_around_it(written, tmp_path, run, monkeypatch):
    place = tmp_path / "k.zarr"
    fill_store(place, labels=LABELS, num_outputs=2, provenance=PROVENANCE)
    (place / "sub").mkdir()
    monkeypatch.chdir(place / "sub" if written == ".." else place)
    assert run("info", written)[0] == 0
    assert run("analyze", "spectrum", written)[0] == 0
    assert (tmp_path / "k.zarr.analysis").is_dir()
    assert unique_names([written]) == ["k"]  # of its pictures


def test_a_kernel_is_computed_into_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "k.zarr").mkdir()
    monkeypatch.chdir(tmp_path / "k.zarr")
    assert kernel_of(".").is_complete
    assert [file.name for file in tmp_path.iterdir()] == ["k.zarr"]


# what is refused ------------------------------------------------------------------------------------------------------


def test_a_dangling_link_is_refused(tmp_path, run):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("link", "link/k.zarr", "loop"):
        with pytest.raises(InputError, match="a symbolic link to"):
            kernel_of(tmp_path / place)
        code, out, err = run("compute", "--models", "logistic", "--epochs", "0", "--subsample", "2", "--out", place)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "a symbolic link to" in err
        code, _, err = run("info", place)
        assert (code, err.count("\n")) == (2, 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "loop"]


def test_the_root_of_the_file_system_is_refused():
    with pytest.raises(InputError, match="the root of a file system"), write_lock(Path("/")):
        pass


def test_a_page_cannot_be_a_folder(tmp_path, run):
    code, _, err = run("report", "k.zarr", "-o", ".")
    assert (code, err.count("\n")) == (2, 1)
    assert "found a folder" in err


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda folder: folder / "file" / "k.zarr", "Nothing can be written at"),
        (lambda _: "/proc/k.zarr", "Nothing can be written at"),
        (lambda folder: f"{folder}/a\0b", "null characters"),
        (lambda _: None, "found NoneType"),
        (lambda folder: os.fsencode(folder / "k.zarr"), "found bytes"),
        (lambda folder: LocalStore(folder / "k.zarr", read_only=True), "read-only"),
    ],
)
def test_a_place_for_no_store_is_refused(place, message, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        ntkgen.compute(torch.nn.Linear(2, 1), torch.ones(3, 2), store=place(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_kernel_imported_from_a_path_without_a_name_needs_one(run):
    code, _, err = run("import", ".", "--samples", "4", "--outputs", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "--out" in err


# long names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k" * 245, "k" * 255, "‖" * 85])
def test_a_name_may_be_as_long_as_the_file_system_allows(name, tmp_path, run):
    store = kernel_of(tmp_path / name)
    assert store.is_complete
    assert [file.name for file in tmp_path.iterdir()] == [name]
    with write_lock(store.folder), tile_lock(store.folder):
        locks = {file.name for file in tmp_path.iterdir()} - {name}
        assert len(locks) == 2
        assert all(len(os.fsencode(lock)) <= 255 for lock in locks)
    assert run("analyze", "spectrum", tmp_path / name)[0] == 0
    file_of(tmp_path / name / name).folder.write(name, b"page")
    assert (tmp_path / name / name).read_bytes() == b"page"


def test_names_that_are_shortened_stay_apart():
    one, two = (beside(Path("runs") / ("k" * 250 + end), ".lock") for end in "ab")
    assert one != two
    assert len(one.name) == len(two.name) == 255
    assert one == beside(Path("runs") / ("k" * 250 + "a"), ".lock")


def test_a_longer_name_is_refused(tmp_path, run):
    with pytest.raises(InputError, match="at most 255 bytes, found 256"):
        kernel_of(tmp_path / ("k" * 256))
    code, _, err = run("info", "‖" * 86)
    assert (code, err.count("\n")) == (2, 1)
    assert "at most 255 bytes, found 258" in err


def test_an_empty_path_is_not_the_current_directory():
    with pytest.raises(InputError, match="an empty path"):
        folder_of("")
