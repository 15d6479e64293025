"""A run of continual learning whose process is killed with SIGKILL at random moments ends like an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from test_learner import require_equal

KILLS = 10
COMMAND = [
    sys.executable, "-m", "ntkgen", "cl-run", "--dataset", "digits", "--split", "5/5", "--model", "mlp", "--width",
    "64", "--method", "icarl", "--buffer", "100", "--epochs", "3", "--kernels", "5it", "--quiet",
]  # fmt: skip


def started(place):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, "--out", str(place)], env=environment, stdout=subprocess.DEVNULL)


def wait_for_work(place):
    """Wait until a run has begun, and return the time."""
    while not (place / "seed0/config.json").exists():
        time.sleep(0.01)
    return time.monotonic()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_process_killed_at_ten_random_moments_ends_with_the_same_bytes(tmp_path):
    process = started(tmp_path / "undisturbed")
    begun = wait_for_work(tmp_path / "undisturbed")
    assert process.wait() == 0
    work = time.monotonic() - begun

    rng = random.Random(0)
    for kill in range(KILLS):
        process = started(tmp_path / "killed")
        if not kill:
            wait_for_work(tmp_path / "killed")
        else:
            time.sleep(rng.uniform(0, 2) * work)  # the start takes longer than the work
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    assert started(tmp_path / "killed").wait() == 0
    require_equal(tmp_path / "killed/seed0", tmp_path / "undisturbed/seed0")
