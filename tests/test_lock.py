"""Locks: one process writes everything, or several processes write tiles, and no process sweeps meanwhile."""

import errno
import fcntl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from zarr.storage import MemoryStore

from ntkgen.errors import StoreLockedError
from ntkgen.files import lock
from ntkgen.files.bucket import StoreFolder
from ntkgen.files.folder import LocalFolder
from ntkgen.files.lock import require_no_tile_writers, tile_lock, without_tile_writers, write_lock

HOLDER = """
import sys, time
from pathlib import Path
from ntkgen.files import lock
with getattr(lock, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def place(tmp_path):
    return LocalFolder(tmp_path / "k.zarr")


@contextmanager
def holder(kind, place):
    """Hold a lock in another process, which is killed in the end."""
    command = [sys.executable, "-c", HOLDER, kind, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_place_has_one_writer_and_no_lock_file_afterwards(place, tmp_path):
    with write_lock(place):
        with pytest.raises(StoreLockedError, match=r"Another process is writing .*k\.zarr"), write_lock(place):
            pass
        with write_lock(LocalFolder(tmp_path / "other.zarr")):
            pass
    with write_lock(place):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["write_lock", "tile_lock"])
def test_the_locks_of_a_killed_process_are_free(place, kind):
    with (
        holder(kind, place),
        pytest.raises(StoreLockedError),
        {"write_lock": write_lock, "tile_lock": alone}[kind](place),
    ):
        pass
    with write_lock(place), alone(place):
        pass


@contextmanager
def alone(place):
    """Sweep at once or not at all."""
    with without_tile_writers(place) as is_alone:
        if not is_alone:
            raise StoreLockedError
        yield


def test_many_write_tiles_and_none_sweeps_beside_them(place, tmp_path):
    with tile_lock(place):
        with tile_lock(place), without_tile_writers(place) as is_alone:
            assert not is_alone
        with without_tile_writers(place) as is_alone:  # the first of them is still there
            assert not is_alone
    with without_tile_writers(place) as is_alone:
        assert is_alone
    assert list(tmp_path.iterdir()) == []


def test_who_writes_tiles_waits_for_who_sweeps(place):
    order = []

    def write():
        with tile_lock(place):
            order.append("writes")

    with without_tile_writers(place):
        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(3 * lock.POLL_SECONDS)
        order.append("swept")
    writer.join()
    assert order == ["swept", "writes"]


def test_workers_of_a_dead_coordinator_are_waited_for(place, monkeypatch):
    with holder("tile_lock", place) as process:
        timer = threading.Timer(0.5, process.kill)
        timer.start()
        require_no_tile_writers(place)
        timer.join()
    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 0.3)
    with tile_lock(place), pytest.raises(StoreLockedError, match="writing tiles"):
        require_no_tile_writers(place)


def test_a_short_hold_is_waited_for_and_a_long_one_is_not(place):
    turns = []
    with (
        write_lock(place),
        pytest.raises(StoreLockedError),
        write_lock(place, is_short=True, waiting=lambda: turns.append("waits")),
    ):
        pass
    assert turns == []

    def hold():
        with write_lock(place, is_short=True):
            turns.append("held")
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    while "held" not in turns:
        time.sleep(0.01)
    with write_lock(place, is_short=True, waiting=lambda: turns.append("waits")):
        turns.append("got it")
    other.join()
    assert turns[0] == "held"
    assert turns[-1] == "got it"
    assert "waits" in turns


def test_a_killed_long_holder_does_not_keep_a_short_one_from_waiting(place):
    with holder("write_lock", place):
        pass
    assert (place.parent.path / "k.zarr.lock").read_text() == lock.WHOLE
    with write_lock(place, is_short=True, waiting=lambda: None):
        assert (place.parent.path / "k.zarr.lock").read_text() == lock.SHORT


def test_record_locks_as_those_of_nfs_do_too(place, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)  # its shared locks need a readable file
    with tile_lock(place):
        assert (place.parent.path / "k.zarr.tiles.lock").exists()
    with write_lock(place):
        pass


def test_a_file_system_without_locks_is_warned_of(place, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(RuntimeWarning, match="has no locks"), write_lock(place):
        pass


def test_an_object_store_has_no_locks():
    place = StoreFolder(MemoryStore(), "memory")
    with write_lock(place), write_lock(place), tile_lock(place), without_tile_writers(place) as is_alone:
        assert is_alone
