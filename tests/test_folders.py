"""One set of verbs for disks and object stores; what is written is whole, and durable before it is seen."""

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

from ntkgen.errors import DiskSpaceError, InputError
from ntkgen.files.bucket import StoreFolder, first_lines
from ntkgen.files.durable import write_file
from ntkgen.files.folder import File, LocalFolder, file_of
from ntkgen.files.place import folder_of
from ntkgen.files.room import require_room


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path):
    return {
        "disk": LocalFolder(tmp_path / "a" / "b"),
        "store": StoreFolder(MemoryStore(), "memory"),
    }[request.param]


def test_what_is_written_is_read_listed_and_removed(folder):
    assert folder.read("c/0/1") is None
    assert folder.size("c/0/1") is None
    assert folder.sizes("c") == {}
    for key, data in (("c/0/1", b"12345"), ("c/1/10", b""), ("zarr.json", b"{}"), ("cc/0", b"1")):
        folder.write(key, data)
        assert folder.read(key) == data
        assert folder.size(key) == len(data)
    assert folder.sizes("c") == {"c/0/1": 5, "c/1/10": 0}
    assert folder.sizes() == {"c/0/1": 5, "c/1/10": 0, "zarr.json": 2, "cc/0": 1}
    folder.write("c/0/1", b"6")
    folder.remove("zarr.json")
    folder.remove("not there")
    assert folder.sizes() == {"c/0/1": 1, "c/1/10": 0, "cc/0": 1}
    assert not folder.has("c")
    folder.sweep()
    assert folder.sizes() == {"c/0/1": 1, "c/1/10": 0, "cc/0": 1}


def test_a_bucket_and_a_store_in_memory_lie_in_no_other_folder():
    pytest.importorskip("obstore")
    assert folder_of("s3://bucket/k.zarr").parent == folder_of("s3://bucket")
    with pytest.raises(InputError, match=r"s3://bucket has no parent folder: .*found a whole bucket"):
        _ = folder_of("s3://bucket").parent
    with pytest.raises(InputError, match=r"memory has no parent folder: .*found a MemoryStore"):
        _ = StoreFolder(MemoryStore(), "memory").parent


def test_folders_lie_in_each_other(tmp_path):
    folder = LocalFolder(tmp_path)
    (folder / "k.zarr").write("zarr.json", b"{}")
    assert folder.sizes() == {"k.zarr/zarr.json": 2}
    assert (folder / "k.zarr").parent == folder
    assert (folder / "k.zarr").parent.read("k.zarr/zarr.json") == b"{}"
    assert str(folder / "k.zarr") == f"{folder}/k.zarr"
    file = File(folder, "net.pt")
    assert not file.exists
    folder.write("net.pt", b"net")
    assert file.exists
    assert str(file) == f"{folder}/net.pt"


def test_zarr_reads_and_writes_a_folder(folder):
    group = zarr.create_group(folder.zarr_store(read_only=False))
    group.create_array("x", shape=(4,), chunks=(2,), dtype="float32")[:] = 7
    found = zarr.open_group(folder.zarr_store(read_only=True), mode="r")
    assert np.array_equal(found["x"][:], [7, 7, 7, 7])
    assert set(folder.sizes("x/c")) == {"x/c/0", "x/c/1"}
    with pytest.raises(ValueError, match="read-only"):
        found["x"][:] = 1


# a disk ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def forced(monkeypatch):
    """Note what is forced to the disk, and what is renamed, in order."""
    done, fsync, replace = [], os.fsync, os.replace

    def watched(handle):
        done.append(("forced", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def renamed(source, target):
        done.append(("renamed", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", renamed)
    return done


def test_a_file_is_forced_to_the_disk_before_it_is_seen_and_its_folders_after(forced, tmp_path):
    LocalFolder(tmp_path / "new" / "k.zarr").write("c/0", b"1")
    assert forced[0][0] == "forced"
    assert forced[0][1].startswith("0.")
    assert forced[0][1].endswith(".partial")
    assert forced[1] == ("renamed", "0")
    assert {name for kind, name in forced[2:]} == {"c", "k.zarr", "new", tmp_path.name}
    forced.clear()
    LocalFolder(tmp_path / "new" / "k.zarr").write("c/1", b"1")
    assert [name for _, name in forced[1:]] == ["1", "c"]


def test_zarr_writes_chunks_and_metadata_durably_unless_told_not_to(forced, tmp_path):
    for fsync in (True, False):
        forced.clear()
        group = zarr.create_group(LocalFolder(tmp_path / str(fsync), fsync=fsync).zarr_store(read_only=False))
        array = group.create_array("x", shape=(4,), chunks=(2,), dtype="float32")
        array[:] = 7
        group.attrs.update({"a": 1})
        files = [name for kind, name in forced if kind == "renamed"]
        assert sorted(set(files)) == ["0", "1", "zarr.json"]
        drafts = [name for kind, name in forced if kind == "forced" and name.endswith(".partial")]
        assert len(drafts) >= len(files) if fsync else drafts == []  # one more, of a file that must not be there yet


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_file(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_a_file_that_must_not_be_there_is_not_replaced(tmp_path):
    write_file(tmp_path / "f", b"old", exclusive=True)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "f", b"new", exclusive=True)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_what_is_being_written_is_not_listed_and_is_swept(tmp_path):
    folder = LocalFolder(tmp_path)
    folder.write("c/0", b"1")
    (tmp_path / "c" / "1.abc.partial").write_bytes(b"half")
    assert folder.sizes() == {"c/0": 1}
    folder.sweep()
    assert [file.name for file in (tmp_path / "c").iterdir()] == ["0"]


def test_a_file_system_that_cannot_force_a_folder_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def picky(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", picky)
    write_file(tmp_path / "f", b"1")
    assert (tmp_path / "f").read_bytes() == b"1"


def test_free_room_is_known_of_a_folder_that_is_yet_to_be(tmp_path):
    assert LocalFolder(tmp_path / "a" / "b").free_bytes > 0
    assert StoreFolder(MemoryStore(), "memory").free_bytes is None


def test_a_disk_without_room_is_refused_with_both_numbers(tmp_path, monkeypatch):
    folder = LocalFolder(tmp_path)
    monkeypatch.setattr(LocalFolder, "free_bytes", 2000)
    require_room(folder, 2000, "the kernel", "Free some.")
    with pytest.raises(DiskSpaceError) as raised:
        require_room(folder, 3000, "the kernel", "Is it large? Free some.")
    assert str(raised.value) == (
        f"The disk at {tmp_path} has no room for the kernel: 3.0 kB are needed and 2.0 kB are free. Is it large? Free "
        "some."
    )
    require_room(StoreFolder(MemoryStore(), "memory"), 10**18, "the kernel", "Free some.")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="found a file"):
        LocalFolder(tmp_path / "file" / "below").require_writable()
    LocalFolder(tmp_path / "new" / "folder").require_writable()
    assert not (tmp_path / "new").exists()


# names ----------------------------------------------------------------------------------------------------------------


def test_places_are_told_apart(tmp_path):
    assert folder_of("runs") == LocalFolder(Path("runs"))
    assert folder_of(f"file://{tmp_path}") == LocalFolder(tmp_path)
    assert folder_of(tmp_path, fsync=False) == LocalFolder(tmp_path, fsync=False)
    assert folder_of(LocalStore(tmp_path)) == LocalFolder(tmp_path)
    store = MemoryStore()
    assert folder_of(store).store is store
    assert folder_of(folder_of("runs")) == folder_of("runs")
    assert file_of("runs/net.pt") == File(LocalFolder(Path("runs")), "net.pt")
    with pytest.raises(InputError, match=r"begins with s3://, gs:// or az://, found ftp://"):
        folder_of("ftp://host/x")


def test_folders_travel_to_other_processes(tmp_path):
    folder = LocalFolder(tmp_path, fsync=False)
    assert pickle.loads(pickle.dumps(folder)) == folder
    store = pickle.loads(pickle.dumps(folder.zarr_store(read_only=False)))
    assert (store.root, store.fsync) == (tmp_path, False)


def test_long_messages_are_cut_to_their_first_paragraph():
    assert first_lines(ValueError("one\ntwo\n\nDebug source: …")) == "one two"
    assert first_lines(ValueError()) == "ValueError"
