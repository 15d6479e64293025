"""Runs of slowly changing regression: what is measured, and that a killed run ends like an undisturbed one."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import xarray
from killing import Killed, was_killed
from test_learner import assert_same

from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.record import write_config
from ntkgen.continual.slow_regression import run
from ntkgen.continual.slow_regression.record import DEAD_SLOPE, MEASURES, read_bins
from ntkgen.continual.slow_regression.run import run_regression
from ntkgen.continual.slow_regression.settings import RegressionSettings
from ntkgen.continual.slow_regression.stack import Stack
from ntkgen.errors import DivergedError, FingerprintError, InputError, StoreError, StoreLockedError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.lock import write_lock
from ntkgen.jacobian.precision import flushed_denormals

# Four blocks of the stream, and bins that end within them.
SETTINGS = RegressionSettings(
    seeds=(4, 7), num_samples=3_600, bin_size=600, period=500, replacement_rate=2e-3, maturity=20
)
ADAM = dataclasses.replace(SETTINGS, optimizer="adam")


def folder_at(place):
    return LocalFolder(place, fsync=False)


def done(place, settings=SETTINGS):
    return run_regression(settings, folder_at(place))


@pytest.fixture
def every_block(monkeypatch):
    """Write a checkpoint after each block."""
    monkeypatch.setattr(run, "COMMIT_SECONDS", -1.0)


def content(place):
    folder = LocalFolder(place)
    files = {key: folder.read(key) for key in folder.sizes() if not key.endswith(".pt")}
    return files, torch.load(place / "checkpoint.pt", weights_only=True)


def require_equal(place, other):
    (files, state), (expected, wanted) = content(place), content(other)
    assert files.keys() == expected.keys()
    assert [key for key in files if files[key] != expected[key]] == []
    assert_same(state, wanted)


# what is measured -----------------------------------------------------------------------------------------------------


def test_bins_are_those_of_the_stack(tmp_path):
    found = done(tmp_path / "run")
    with flushed_denormals():
        stack = Stack(SETTINGS)
        replaced = 0
        for index, start in enumerate(range(0, 3_600, 600)):
            cut = [start, *(block for block in range(1000, 3_600, 1000) if start < block < start + 600), start + 600]
            traces = [stack.learn(first, stop) for first, stop in itertools.pairwise(cut)]
            errors, slopes = (
                np.concatenate([getattr(trace, name) for trace in traces]) for name in ("errors", "slopes")
            )
            bin_ = found.isel(bin=index)
            np.testing.assert_allclose(bin_.error.values.ravel(), (errors.astype(float) ** 2).mean(0), rtol=1e-12)
            dead = (np.abs(slopes) < DEAD_SLOPE).all(0).sum(0)
            assert bin_.dead_units.values.ravel().tolist() == dead.tolist()
            magnitude = np.abs(stack.network.parameters).mean(0, dtype=float)
            np.testing.assert_allclose(bin_.weight_magnitude.values.ravel(), magnitude, rtol=1e-12)
            assert bin_.replaced_units.values[3].tolist() == (stack.replacement.replaced - replaced).tolist()
            replaced = stack.replacement.replaced.copy()
    assert found.dead_units.values.max() > 0
    assert found.replaced_units.sel(algorithm="continual-backprop").values.min() > 0
    assert not found.replaced_units.values[:, :3].any()


def test_a_run_is_an_ordinary_zarr_group_with_its_settings(tmp_path):
    done(tmp_path / "run")
    data = xarray.open_zarr(tmp_path / "run" / "run.zarr")
    assert set(data.data_vars) | set(data.coords) == {*MEASURES, "samples", "seed"}
    assert dict(data.sizes) == {"bin": 6, "algorithm": 4, "seed": 2}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert RegressionSettings.from_json(config["settings"]) == SETTINGS
    found = read_bins(tmp_path / "run")
    assert found.samples.values.tolist() == list(range(600, 3_601, 600))
    assert found.seed.values.tolist() == [4, 7]
    assert tuple(found.algorithm.values) == SETTINGS.algorithms


def test_progress_is_reported(tmp_path):
    reports = []
    run_regression(SETTINGS, folder_at(tmp_path / "run"), lambda *report: reports.append(report))
    assert reports[0] == ("training", 600, 3_600, "bin 1/6")
    assert reports[1] == ("training", 1_000, 3_600, "bin 1/6")
    assert reports[-1] == ("training", 3_600, 3_600, "bin 6/6")


# resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("every_block")
@pytest.mark.parametrize("settings", [SETTINGS, ADAM], ids=["sgd", "adam"])
def test_a_run_killed_at_random_writes_ends_with_the_same_bytes(tmp_path, settings, monkeypatch):
    done(tmp_path / "undisturbed", settings)
    rng, kills = random.Random(0), 0
    while was_killed(lambda: done(tmp_path / "killed", settings), rng.randint(1, 20), monkeypatch):
        kills += 1
    assert kills > 3
    require_equal(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.usefixtures("every_block")
def test_what_is_later_than_the_checkpoint_is_dropped(tmp_path):
    """A bin that was written before a kill, and the checkpoint after it was not."""
    done(tmp_path / "run")
    older = tmp_path / "older"
    with pytest.raises(Killed):
        run_regression(SETTINGS, folder_at(older), stop_at(1_800))
    kept = (older / "checkpoint.pt").read_bytes()
    with pytest.raises(Killed):
        run_regression(SETTINGS, folder_at(older), stop_at(3_000))
    (older / "checkpoint.pt").write_bytes(kept)
    assert read_bins(older).sizes["bin"] == 5
    done(older)
    require_equal(older, tmp_path / "run")


def stop_at(sample):
    def report(stage, now, total, note):
        if now == sample:
            raise Killed

    return report


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    first = done(tmp_path / "run")
    monkeypatch.setattr(run.RegressionRun, "learn_block", None)
    assert done(tmp_path / "run").identical(first)


# what is refused ------------------------------------------------------------------------------------------------------


def test_a_run_with_other_settings_is_refused(tmp_path):
    done(tmp_path / "run")
    with pytest.raises(FingerprintError, match="optimizer sgd, now adam"):
        done(tmp_path / "run", ADAM)


def test_a_run_of_another_kind_is_refused(tmp_path):
    write_config(folder_at(tmp_path / "run"), RunSettings(), {})
    for use in (done, read_bins):
        with pytest.raises(
            StoreError, match="does not learn slowly changing regression: found the setting activation_mean"
        ):
            use(tmp_path / "run")


def test_a_run_that_another_process_writes_is_refused(tmp_path):
    with write_lock(folder_at(tmp_path / "run")), pytest.raises(StoreLockedError):
        done(tmp_path / "run")


def test_a_run_that_diverges_says_where(tmp_path):
    settings = dataclasses.replace(SETTINGS, learning_rate=1e3)
    with pytest.raises(DivergedError, match="learning rate of 1000 too high"):
        done(tmp_path / "run", settings)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    done(tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(StoreError, match="cannot be read"):
        done(tmp_path / "run")


def test_where_there_is_no_run_nothing_is_read(tmp_path):
    with pytest.raises(StoreError, match="found none"):
        read_bins(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Nothing can be written"):
        done(tmp_path / "file" / "run")


# the loss of plasticity -----------------------------------------------------------------------------------------------


def test_continual_backpropagation_keeps_units_alive(tmp_path):
    """ReLU units die within few samples, and are replaced. The errors are reported, as pytest shows with -rP."""
    settings = RegressionSettings(num_samples=40_000, bin_size=10_000, algorithms=("base", "continual-backprop"))
    found = done(tmp_path / "run", settings).mean("seed")
    for algorithm in settings.algorithms:
        each = found.sel(algorithm=algorithm)
        errors, dead = each.error.values.round(3).tolist(), each.dead_units.values.round(1).tolist()
        print(f"{algorithm}: squared error {errors}, dead units of {settings.units} {dead}, mean of 10 seeds")
    dead = found.dead_units.isel(bin=-1)
    assert float(dead.sel(algorithm="base")) >= 1
    assert float(dead.sel(algorithm="continual-backprop")) <= 0.5
    assert np.isfinite(found.error.values).all()


# a real kill ----------------------------------------------------------------------------------------------------------

COMMAND = """
import sys
from pathlib import Path
from ntkgen.continual.slow_regression import run
from ntkgen.continual.slow_regression.settings import RegressionSettings
from ntkgen.files.folder import LocalFolder
run.COMMIT_SECONDS = 0.05
settings = RegressionSettings(seeds=tuple(range(4)), num_samples=40_000, bin_size=2_000, replacement_rate=1e-3)
print("imported", flush=True)
run.run_regression(settings, LocalFolder(Path(sys.argv[1])))
"""


def started(place):
    """Start a run in a process, and wait until it begins."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(place)], env=environment, stdout=subprocess.PIPE)
    with process.stdout:
        process.stdout.readline()
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_process_killed_at_ten_random_moments_ends_with_the_same_bytes(tmp_path):
    process, begun = started(tmp_path / "undisturbed"), time.monotonic()
    assert process.wait() == 0
    work = time.monotonic() - begun
    rng, kills = random.Random(0), 0
    for _ in range(10):
        process = started(tmp_path / "killed")
        time.sleep(rng.uniform(0, 0.3) * work)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills > 3
    assert started(tmp_path / "killed").wait() == 0
    require_equal(tmp_path / "killed", tmp_path / "undisturbed")
