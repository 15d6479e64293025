"""kill -9 at any moment of training or of the tiles, then the same command again: the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A short one is in test_store.py, and a long one is scripts/torture/torture.py.
pytestmark = pytest.mark.slow

# 100 samples in tiles of 20: a grid of 5 × 5, and two epochs of training before it
COMMAND = [
    "compute", "--models", "logistic", "--dataset", "digits", "--epochs", "2", "--allow-unconverged",
    "--subsample", "100", "--tile", "200", "--dtype", "float16", "float32", "float64", "--layout", "full", "--quiet",
    "--per-layer",
]  # fmt: skip
STEM = "logistic-digits-seed0"


def start(out: Path) -> subprocess.Popen:
    # without byte code on disk every start compiles three thousand modules
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "ntkgen", *COMMAND, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)


def contents(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def num_chunks(out: Path, array: str) -> int:
    return sum(1 for file in out.glob(f"*.zarr/{array}/c/**/*") if file.is_file())


# when to kill, told by what is on disk: machines differ in speed
MOMENTS = {
    "first epoch": lambda out: (out / f"{STEM}.pt").exists(),
    "a later epoch": lambda out: (out / f"{STEM}.pt").exists() and (out / f"{STEM}.pt.partial").exists(),
    "store being created": lambda out: any(out.glob("*.zarr")),
    "diagonal": lambda out: num_chunks(out, "diagonal") >= 2,
    "first tile": lambda out: num_chunks(out, "ntk_float16") >= 1,
    "layers without the kernel": lambda out: num_chunks(out, "ntk_by_layer_float64") > num_chunks(out, "ntk_float64"),
    "mirror missing": lambda out: num_chunks(out, "ntk_float32") >= 2,
    "late tile": lambda out: num_chunks(out, "ntk_float64") >= 17,
}


def kill_at(moment, out: Path) -> bool:
    """Start the command, kill it at a moment, and say whether it was in time."""
    process = start(out)
    while process.poll() is None and not moment(out):
        time.sleep(0.001)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert start(out).wait() == 0
    return contents(out)


def test_killed_again_and_again_it_ends_with_the_bytes_of_an_undisturbed_run(undisturbed, tmp_path):
    kills = sum(kill_at(moment, tmp_path) for moment in MOMENTS.values())
    assert kills >= 5  # a moment may be missed on a slow machine, not all of them
    assert start(tmp_path).wait() == 0
    found = contents(tmp_path)
    assert sorted(found) == sorted(undisturbed)
    assert [name for name in found if found[name] != undisturbed[name] and not name.endswith(".pt")] == []


def test_two_runs_are_equal_and_nothing_is_left_over(undisturbed):
    names = {Path(name).parts[0] for name in undisturbed}
    assert names == {f"{STEM}.pt", f"{STEM}-n100-layers.zarr"}
    assert sum("ntk_" in name and "/c/" in name for name in undisturbed) == 4 * 25
