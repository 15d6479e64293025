"""A kernel of 20,000 rows, which does not fit in the gigabyte that each command may take."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts" / "bench"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("analysis")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def values(bench):
    return bench.eigenvalues(20_000)


@pytest.fixture(scope="module")
def store(bench, values, tmp_path_factory):
    return bench.fill(tmp_path_factory.mktemp("large"), values)


@pytest.fixture(autouse=True)
def all_threads(monkeypatch):
    """Let the commands use every processor, as they do for users."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def asked(store, *words):
    """The command in a process of its own, within 1 GB."""
    command = [sys.executable, "-m", "ntkgen", "analyze", *words, store.name, "--memory", "1GB", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answer(process):
    out, _ = process.communicate()
    assert process.returncode == 0
    result = json.loads(out)
    print({name: result[name] for name in ("seconds", "peak_bytes", "passes", "gflops") if name in result})
    assert result["peak_bytes"] < 10**9
    return result


def test_trace_norm_and_fifty_eigenvalues_in_eight_passes(store, values):
    result = answer(asked(store, "spectrum", "--top", "50"))
    assert values[49] / values[result["block"]] >= 1.15
    assert result["passes"] <= 8
    np.testing.assert_allclose(result["eigenvalues"], values[:50], rtol=1e-6)
    assert result["trace"] == pytest.approx(values.sum(), rel=1e-6)
    assert result["frobenius_norm"] == pytest.approx(np.linalg.norm(values), rel=1e-6)
    p = values / values.sum()
    entropy_rank = np.exp(-(p * np.log(p)).sum())
    assert abs(result["effective_rank"] - entropy_rank) <= result["effective_rank_error"] < 0.1 * entropy_rank


def test_a_log_determinant_killed_and_resumed_has_the_same_bits_at_half_the_speed_of_products(bench, store, values):
    """Killed when the second panel is being written."""
    beside = Path(f"{store.name}.analysis")
    process = asked(store, "logdet")
    while process.poll() is None and len(list(beside.glob("*/factor/c/39/*"))) < 10:
        time.sleep(0.01)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    found = answer(asked(store, "logdet"))
    for file in beside.glob("logdet*"):
        file.unlink()
    before = bench.product_gflops()
    undisturbed = answer(asked(store, "logdet"))
    after = bench.product_gflops()
    print({"product_gflops": (before, after), "ratio": undisturbed["gflops"] / max(before, after)})
    assert found["logdet"] == undisturbed["logdet"] == pytest.approx(np.log(values).sum(), rel=1e-6)
    assert undisturbed["gflops"] >= 0.5 * min(before, after)
    assert list(beside.glob("factor*")) == []


def test_the_density_of_a_large_kernel_is_within_its_errors(bench, store, values):
    assert bench.error_of(answer(asked(store, "density")), "density", values) < 0.05
