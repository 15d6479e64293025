"""The stress script: a few of its rounds, and that it finds what it looks for."""

import doctest
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "torture"))

import disk
import processes
import siege
import torture


def play(rounds, folder):
    return torture.total(list(torture.torture(rounds, folder, seed=0)))


# rounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path):
    options = siege.Options(60, "full", epochs=1)
    found = play([siege.Round(number, options, ("run",)) for number in range(2)], tmp_path)
    assert found["failures"] == []
    assert found["kills"] >= 1
    assert (found["rounds"], found["tiles_lost"], found["files_differing"], found["bytes_differing"]) == (2, 0, 0, 0)
    assert [folder.name for folder in tmp_path.iterdir()] == ["uninterrupted-0"]


@pytest.mark.slow
def test_a_cluster_survives_its_worker_and_its_coordinator(tmp_path, monkeypatch):
    monkeypatch.setattr(siege, "DRAWN", ("tiles",))
    found = play([siege.Round(0, siege.Options(100, "upper"), ("worker", "run"), workers=2)], tmp_path)
    assert found["failures"] == []
    assert found["kills_by_target"]["worker"] == 1
    assert (found["tiles_lost"], found["files_differing"], found["bytes_differing"]) == (0, 0, 0)


# what it would find ---------------------------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def two(tmp_path):
    """Make two equal folders."""
    files = {"n.pt": b"network", "k.zarr/zarr.json": b"{}", "k.zarr/ntk_float32/c/0/1": b"tile"}
    return write(tmp_path / "expected", files), write(tmp_path / "found", files)


def test_equal_folders_do_not_differ(two):
    assert disk.compare(*two) == disk.Differences()


def test_a_byte_that_differs_is_found(two):
    (two[1] / "n.pt").write_bytes(b"netwOrk and more")
    found = disk.compare(*two)
    assert (found.differing, found.num_bytes) == (("n.pt",), 1 + len(" and more"))


def test_a_file_that_is_absent_is_found(two):
    (two[1] / "k.zarr/ntk_float32/c/0/1").unlink()
    found = disk.compare(*two)
    assert (found.absent, found.num_bytes) == (("k.zarr/ntk_float32/c/0/1",), 4)


@pytest.mark.parametrize("name", ["k.zarr.lock", "k.zarr/ntk_float32/c/0/1.0f.partial", "k.zarr/ntk_float32/c/1/1"])
def test_a_file_that_was_left_over_is_found_even_if_it_is_empty(two, name):
    write(two[1], {name: b""})
    found = disk.compare(*two)
    assert (found.extra, found.names, found.num_bytes) == ((name,), (name,), 0)
    assert not siege.Outcome((), (), found).is_good


TILES = {f"k.zarr/ntk_float32/c/{row}/{col}": b"tile" for row in range(2) for col in range(2)}


@pytest.mark.parametrize(
    ("happens", "fate"),
    [
        (lambda folder: None, (0, 0, 0)),
        (lambda folder: (folder / "k.zarr/ntk_float32/c/1/0").unlink(), (0, 0, 1)),
        (lambda folder: write(folder, {"k.zarr/ntk_float32/c/1/1": b"Tile"}), (1, 1, 1)),
        (lambda folder: rewrite(folder / "k.zarr/ntk_float32/c/0/0"), (1, 1, 0)),
        (lambda folder: shutil.rmtree(folder / "k.zarr"), (0, 0, 3)),
    ],
)
def test_tiles_that_go_or_change_or_are_made_anew_are_counted(tmp_path, happens, fate):
    before = disk.take_snapshot(write(tmp_path, TILES))
    happens(tmp_path)
    found = disk.follow(before, before, disk.take_snapshot(tmp_path))
    assert (found.recomputed, found.whole_recomputed, found.lost) == fate


def rewrite(file: Path) -> None:
    draft = file.with_suffix(".partial")
    draft.write_bytes(file.read_bytes())
    draft.replace(file)


def test_a_tile_without_its_mirror_is_not_whole(tmp_path):
    expected = disk.take_snapshot(write(tmp_path / "expected", TILES))
    half = write(tmp_path / "half", {name: data for name, data in TILES.items() if not name.endswith("1/0")})
    before = disk.take_snapshot(half)
    rewrite(half / "k.zarr/ntk_float32/c/0/1")
    found = disk.follow(expected, before, disk.take_snapshot(half))
    assert (found.recomputed, found.whole_recomputed, found.lost) == (1, 0, 0)


def test_a_run_that_hangs_is_ended_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "RUN_SECONDS", 0.2)
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    with processes.running(sleep, tmp_path / "out") as run, pytest.raises(processes.RoundError, match="did not end"):
        run.finish()
    assert run.process.returncode == -9


def test_a_run_that_fails_makes_a_round_fail(tmp_path, monkeypatch):
    fail = [sys.executable, "-c", "import sys; sys.exit('cosmic rays')"]
    monkeypatch.setattr(siege.Options, "command", lambda *_: fail)
    baseline = siege.Baseline(write(tmp_path / "expected", TILES), {}, 4)
    found = siege.play(siege.Round(3, siege.Options(60, "full"), ()), baseline, tmp_path / "3" / "out", 7)
    assert not found.is_good
    assert found.failures[0].startswith("round local-003, seed 7: ")
    assert "exit code 1: cosmic rays" in found.failures[0]


def test_only_workers_are_taken_for_workers():
    code = (
        "import multiprocessing as m, time\n"
        "if __name__ == '__main__':\n"
        "    m.get_context('spawn').Process(target=time.sleep, args=(100,)).start()\n"
        "    print('started', flush=True)\n"
        "    time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        until = time.monotonic() + 20
        while not (found := processes.workers_of(process.pid)) and time.monotonic() < until:
            time.sleep(0.01)  # between fork and exec it is not told apart yet
        process.kill()
    assert len(found) == 1  # and not what keeps track of semaphores
    assert processes.is_alive(found[0])
    processes.end_all(found)


# which rounds ---------------------------------------------------------------------------------------------------------


def test_every_round_of_a_cluster_kills_a_worker_and_every_other_one_the_coordinator():
    rounds = torture.draw_rounds(60, 40, seed=0)
    local, cluster = rounds[:60], rounds[60:]
    assert {len(played.targets) for played in local} == {1, 2, 3}
    assert all("worker" in played.targets for played in cluster)
    assert sum("run" in played.targets for played in cluster) == 20
    assert rounds == torture.draw_rounds(60, 40, seed=0)


def test_moments_lie_in_every_phase(tmp_path):
    import numpy as np

    files = ["k.zarr/zarr.json", "k.zarr/diagonal/c/0", *TILES]
    baseline = siege.Baseline(tmp_path, disk.take_snapshot(write(tmp_path, dict.fromkeys(files, b""))), 9)
    rng = np.random.default_rng(0)
    assert {baseline.draw_step(rng) for _ in range(300)} == set(range(1, 10))
    phases = [baseline.missing_phase(dict.fromkeys(files[:number])) for number in range(7)]
    assert phases == ["creation", "diagonal", *["tiles"] * 4, "end"]


def test_what_all_rounds_have_shown_is_printed_and_is_the_exit_code(monkeypatch, capsys):
    bad = siege.Outcome((), (disk.Fate(3, 0, 1),), disk.Differences(("k",), num_bytes=2))
    monkeypatch.setattr(torture, "torture", lambda *_, **__: iter([bad]))
    with pytest.raises(SystemExit) as ended:
        torture.main(["--rounds", "1", "--cluster-rounds", "0", "--json"], standalone_mode=False)
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert ended.value.code == 1
    assert (found["tiles_recomputed"], found["tiles_lost"], found["bytes_differing"]) == (3, 1, 2)
    folder = captured.err.split()[-1].rstrip(".")
    assert captured.err.endswith(f"The stores are kept in {folder}.\n")
    shutil.rmtree(folder)


def test_doctests():
    assert doctest.testmod(disk).attempted > 0
    assert doctest.testmod(disk).failed == 0
