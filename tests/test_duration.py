"""How long a run is projected to take: what is measured is multiplied by what the plan counts."""

import json

import pytest
import torch
from cases import make_job
from torch import nn
from zarr.storage import MemoryStore

from ntkgen.checks.sampling import Sampling
from ntkgen.engine import duration
from ntkgen.engine.duration import Duration, certificate_seconds, kernel_duration, storage_rates, whole_seconds
from ntkgen.files.folder import LocalFolder
from ntkgen.files.place import folder_of
from ntkgen.inputs import Inputs
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.outputs import output_map
from ntkgen.plan.explain import WorkCount
from ntkgen.units import human_seconds

FAST = ["compute", "--models", "logistic", "--subsample", "6", "--tile", "20", "--json"]


def test_the_total_is_the_sum_with_a_range():
    found = Duration(training=100, factors=20, products=30, storing=40, certificate=5)
    assert found.total == 195
    assert found.range == (195 / 1.5, 195 * 1.5)
    assert found.to_json() == {
        "training": 100, "factors": 20, "products": 30, "storing": 40, "certificate": 5, "total": 195,
        "range": [195 / 1.5, 195 * 1.5],
    }  # fmt: skip


def test_factors_are_projected_from_one_batch_and_products_from_two_blocks(monkeypatch):
    job = make_job()
    monkeypatch.setattr(duration, "_timed", lambda run, _: (2.0, run()))
    work, factors, batches = WorkCount(factor_samples=30, built_samples=0, pairs=500), duration.compute_factors, []
    monkeypatch.setattr(duration, "compute_factors", lambda *args: batches.append(args[2]) or factors(*args))
    found = kernel_duration(job.plan, work, job.network, job.x)
    assert len(batches) == 1  # its factors are those of the products
    assert found.factors == 30 * 2.0 / job.plan.jacobian.batch_size
    twice = kernel_duration(job.plan, WorkCount(30, 0, 1000), job.network, job.x, num_workers=2)
    assert twice.factors == found.factors / 2
    assert twice.products == pytest.approx(found.products)
    assert found.products == 500 * 2.0 / job.plan.block_samples**2


def test_a_repeated_block_has_the_samples_again_and_again():
    job = make_job()
    block = compute_factors(job.network, job.plan.jacobian, job.x[:3])
    found = block.repeated(7)
    again = compute_factors(job.network, job.plan.jacobian, job.x[[0, 1, 2, 0, 1, 2, 0]])
    torch.testing.assert_close(found.rows, again.rows)
    torch.testing.assert_close(found.logits, again.logits)
    for pair, other in zip(found.pairs, again.pairs, strict=True):
        torch.testing.assert_close(pair.inputs, other.inputs)
        torch.testing.assert_close(pair.cotangents, other.cotangents)


@pytest.mark.parametrize(("output", "columns"), [("full", 5), ("trace", 15)])
def test_a_certificate_takes_a_product_per_probe_and_tries_each_batch_once(output, columns, monkeypatch):
    model, x = nn.Linear(4, 3), torch.ones(20, 4)
    times = iter([1.1, 0.1])
    monkeypatch.setattr(duration, "_timed", lambda run, _, **__: (next(times), run()))
    found = certificate_seconds(model, x, 1000, output_map(output, 3), Sampling(num_probes=5, num_pairs=0))
    assert found == pytest.approx(1000 * (columns * 0.1 + 1.0) / duration.CERTIFIED_SAMPLES)


def test_a_whole_comparison_takes_its_counted_passes(job, monkeypatch):
    monkeypatch.setattr(duration, "_timed", lambda run, _: (0.6, run()))
    found = whole_seconds(job.module, Inputs(job.x, job.samples), output_map("full", 3), 50.0)
    assert found == pytest.approx(50 * 0.6 / 3)  # one sample's rows of three outputs were timed


def test_a_second_pass_counts_unless_the_first_takes_long(monkeypatch):
    results, device = iter("abc"), torch.device("cpu")
    clock = iter([0.0, 1.0, 5.0, 5.5, 10.0, 13.0])
    monkeypatch.setattr(duration.time, "perf_counter", lambda: next(clock))
    assert duration._timed(lambda: next(results), device) == (0.5, "b")
    assert duration._timed(lambda: next(results), device) == (3.0, "c")


def test_storing_is_measured_where_the_store_will_be_and_nothing_stays(tmp_path):
    rates = storage_rates(LocalFolder(tmp_path / "not" / "there" / "k.zarr"), ("float16", "float32"))
    assert 0 < rates.read < rates.write < 1e-5
    assert list(tmp_path.iterdir()) == []
    assert 0 < storage_rates(folder_of(MemoryStore()), ("float32",)).write < 1e-5


def test_a_dry_run_says_how_long_it_would_take(run):
    seconds = json.loads(run(*FAST, "--epochs", "2", "--dry-run")[1])["seconds"]
    assert all(seconds[name] > 0 for name in ("training", "factors", "products", "storing", "certificate"))
    assert seconds["total"] >= seconds["training"] + seconds["certificate"]
    page = run(*FAST[:-1], "--epochs", "0", "--no-certify", "--dry-run")[1]
    (line,) = (line for line in page.splitlines() if line.startswith("  time"))
    assert " on this machine (factors " in line
    assert "training" not in line
    assert "certificate" not in line


def test_what_is_finished_takes_no_time(run):
    command = [*FAST, "--epochs", "0"]
    assert json.loads(run(*command)[1])["projected_seconds"] is None  # too short to be worth a projection
    assert json.loads(run(*command, "--dry-run")[1])["seconds"]["total"] == 0
    assert "time" in run(*command[:-3], "--epochs", "0", "--dry-run")[1]
    assert "nothing is missing" in run(*FAST[:-1], "--epochs", "0", "--dry-run")[1]


@pytest.mark.slow
def test_a_run_of_minutes_says_what_was_projected(run, monkeypatch):
    monkeypatch.setattr("ntkgen.projection.MEASURED_FROM_SECONDS", 0.0)
    code, out, _ = run(*FAST[:-1], "--epochs", "0")
    assert code == 0
    assert "(projected: " in out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (119, "119 s"), (120, "2.0 min"), (3599, "60.0 min"), (86400, "24.0 h")]
)
def test_durations_are_written_for_people(seconds, text):
    assert human_seconds(seconds) == text
