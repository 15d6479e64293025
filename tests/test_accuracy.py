"""A kernel that is wrong is an error in every command, and one that is right is in none."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cases import chosen, in_turn, make_job
from torch import nn

import ntkgen
from ntkgen.analysis.report import sections as page_sections
from ntkgen.checks import certify as certification
from ntkgen.checks import pairs
from ntkgen.checks.rows import ExactRows
from ntkgen.checks.sampling import Sampling, usual_sampling
from ntkgen.engine import compute as computation
from ntkgen.engine import run as running
from ntkgen.errors import InaccurateKernelError, InaccurateKernelWarning
from ntkgen.jacobian.precision import POLICIES
from ntkgen.store.certificate import POLICY_ERRORS, POLICY_ROUNDOFF, Certificate
from ntkgen.store.describe import describe, inaccuracy
from ntkgen.store.opening import open_store
from ntkgen.store.store import KernelStore

DTYPES = ("float16", "float32", "float64")
FAST = ["compute", "--models", "logistic", "--dataset", "digits", "--epochs", "0", "--subsample", "6", "-q"]
FAST += ["--tile", "20", "--no-fsync"]


def computed(path, job, others=None, **settings):
    options = {"store": path / "k.zarr", "tile_side": 9, "fsync": False, **settings}
    return ntkgen.compute(job.module, job.x, others, **options)


@pytest.fixture
def others():
    return torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2))


# planted faults -------------------------------------------------------------------------------------------------------


def plant_rule(monkeypatch):
    """Multiply as if one rule gave rows that are 0.5 % too long, in all batches alike."""
    fill = running.fill_kernel
    monkeypatch.setattr(running, "fill_kernel", lambda *args: fill(*args) * 1.01)


def plant_batch(monkeypatch):
    """Make the factors of the second block of samples 20 % too large, wherever it is used."""
    tile = running.compute_tile

    def wrong(plan, place, factors):
        return tile(plan, place, factors) * 1.2 ** ((place.row == 1) + (place.col == 1 and plan.grid.is_symmetric))

    monkeypatch.setattr(running, "compute_tile", wrong)


def plant_tile(monkeypatch):
    """Commit one wrong tile, with the checksum that it then has."""
    commit = KernelStore.commit
    monkeypatch.setattr(
        KernelStore,
        "commit",
        lambda self, tile, values: commit(self, tile, values * (1.3 if (tile.row, tile.col) == (0, 1) else 1)),
    )


FAULTS = {"rule": plant_rule, "batch": plant_batch, "tile": plant_tile}


@in_turn("fault is_rectangular output is_whole", FAULTS, [False, True], ["full", "trace"], [False, True])
def test_a_planted_fault_is_an_error_of_the_library(
    fault, is_rectangular, output, is_whole, job, others, tmp_path, monkeypatch
):
    monkeypatch.setattr(certification, "compares_whole", lambda *_: is_whole)
    settings = {"output": output, "tile_side": 9 if output == "full" else 3}
    given = others if is_rectangular else None
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(InaccurateKernelError, match="differs from the exact one by more than rounding explains"):
            computed(tmp_path, job, given, **settings)
    with pytest.raises(InaccurateKernelError):  # and again, with nothing to compute
        computed(tmp_path, job, given, **settings)
    with pytest.warns(InaccurateKernelWarning, match="differs from the exact one"):
        store = ntkgen.open(tmp_path / "k.zarr")
    assert (store.is_complete, store.missing_tiles()) == (True, [])
    for error in store.manifest.certificate.errors:
        blocks = {"rule": (), "batch": {1}, "tile": {0} if is_rectangular else {0, 1}}[fault]
        assert not error.is_good
        assert (error.relative_error > error.allowed) or fault != "rule"
        assert set(blocks) <= set(error.wrong_blocks)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_an_error_of_every_command(fault, run, monkeypatch):
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        code, out, err = run(*FAST)
    assert (code, err.count("\n")) == (1, 1)
    assert "WRONG" in out
    said = err.removeprefix("Error: ").strip()
    assert "in float32" in said
    assert "allowed" in said
    store = next(Path("runs").glob("*.zarr"))
    assert run(*FAST)[0] == 1
    assert run(*FAST, "--part", "1/1")[0] == 1
    for command in (["info", store], ["verify", store, "--recompute", "0"]):
        code, out, err = run(*command)
        assert (code, err.strip()) == (1, f"Error: {said}")
        assert said in out
        assert json.loads(run(*command, "--json")[1])["inaccuracy"] == said


def test_analysis_goes_on_and_says_it_on_stderr(run, monkeypatch):
    with monkeypatch.context() as patch:
        plant_rule(patch)
        run(*FAST)
    store = next(Path("runs").glob("*.zarr"))
    code, out, err = run("analyze", "spectrum", store, "-q", "--json")
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("Warning: The kernel at runs/")
    assert json.loads(out)["eigenvalues"]
    section = page_sections._certificate(describe(open_store(store)))
    assert "differs from the exact one by more than rounding explains" in section.body[0].text


def test_other_kernels_are_made_after_a_wrong_one(run, monkeypatch):
    plant_tile(monkeypatch)
    code, _, err = run(*FAST, "--repeats", "2")
    assert (code, err.count("\n")) == (1, 2)
    assert len(list(Path("runs").glob("*.zarr"))) == 2


def test_a_part_that_finishes_a_wrong_kernel_fails(run, monkeypatch):
    plant_tile(monkeypatch)
    assert [run(*FAST, "--part", part)[0] for part in ("1/2", "2/2")] == [0, 1]


def test_an_error_in_all_blocks_alike_is_seen_by_the_bound_alone(job, tmp_path, monkeypatch):
    plant_rule(monkeypatch)
    with pytest.raises(InaccurateKernelError, match=r"in float32 0\.01 of ‖K‖_F, with 0\.001 allowed[^,]"):
        computed(tmp_path, job, dtypes=("float32",))
    (error,) = open_store(tmp_path / "k.zarr").manifest.certificate.errors
    assert not error.wrong_blocks


# good kernels ---------------------------------------------------------------------------------------------------------


def test_every_policy_says_what_it_allows():
    assert set(POLICY_ERRORS) == set(POLICY_ROUNDOFF) == set(POLICIES)
    assert all(POLICY_ERRORS[name] > 2 * POLICY_ROUNDOFF[name] for name in POLICIES)


def require_good(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = ntkgen.open(store.path)
    found = store.manifest.certificate
    assert found.is_good
    assert not any(error.wrong_blocks for error in found.errors)
    assert inaccuracy(store) is describe(store).inaccuracy is None
    return found


@pytest.mark.parametrize("precision", chosen([name for name in POLICIES if name != "tf32"], ["float32", "bfloat16"]))
def test_a_good_kernel_of_each_policy_is_good(precision, job, others, tmp_path):
    require_good(computed(tmp_path, job, precision=precision, dtypes=DTYPES))
    found = computed(tmp_path / "rectangular", job, others, precision=precision, dtypes=DTYPES, output="trace")
    require_good(found)


def linear(num_outputs=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, num_outputs, bias=False))


@pytest.mark.parametrize("small", [1e-4, 1e-9])
def test_samples_with_a_far_smaller_kernel_are_good(small, tmp_path):
    job = make_job(module=linear())
    flat = job.x.flatten(1).double()
    flat[3:6] -= flat[3:6] @ torch.linalg.pinv(flat[6:]) @ flat[6:]  # orthogonal to most, so that rounding is large
    flat[3:6] *= small
    x = flat.float().reshape(job.x.shape)
    store = ntkgen.compute(job.module, x, store=tmp_path / "k.zarr", dtypes=DTYPES, tile_side=9, fsync=False)
    require_good(store)


def test_a_kernel_of_zeros_is_good_if_it_is_one(tmp_path, monkeypatch):
    job = make_job(module=linear(), scale=0)
    require_good(computed(tmp_path, job, dtypes=DTYPES))
    fill = running.fill_kernel
    monkeypatch.setattr(running, "fill_kernel", lambda *args: fill(*args) + 1e-6)
    with pytest.raises(InaccurateKernelError):
        computed(tmp_path / "wrong", job, dtypes=("float32",))


def test_a_product_far_smaller_than_its_factors_is_good(tmp_path):
    module, generator = linear(1), torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 1, 16, generator=generator, dtype=torch.float64)
    other -= x * (x @ other.T) / x.square().sum()  # orthogonal but for what float32 makes of it
    store = ntkgen.compute(module, x.float(), other.float(), store=tmp_path / "k.zarr", dtypes=DTYPES, fsync=False)
    require_good(store)


def test_one_flipped_unit_of_one_sample_is_no_fault(job, tmp_path):
    store = computed(tmp_path, job, certify=False, dtypes=("float32",), layout="full")
    array = zarr.open_group(store.path, mode="r+")["ntk_float32"]
    array[9:12] *= 1.002  # the outputs of one sample
    array[:, 9:12] *= 1.002
    certification.add_certificate(store, job.module, computation.Inputs(job.x, job.samples))
    assert open_store(store.path).manifest.certificate.errors[0].suspicious == ()
    require_good(store)


# certificates of other versions ---------------------------------------------------------------------------------------


def test_a_certificate_of_an_earlier_version_is_judged(job, tmp_path):
    store = computed(tmp_path, job, dtypes=("float32",))
    values = store.manifest.certificate.to_json()
    new = ("allowed", "exceeding", "exact_dtype", "num_pair_outputs")
    old = {name: value for name, value in values.items() if name not in new}
    old["errors"] = [{name: value for name, value in each.items() if name not in new} for each in old["errors"]]
    assert Certificate.from_json(old).is_good
    assert not Certificate.from_json({**old, "errors": [{**old["errors"][0], "relative_error": 2e-3}]}).is_good
    assert not Certificate.from_json({**old, "errors": [{**old["errors"][0], "suspicious": [1]}]}).is_good
    assert Certificate.from_json({**values, "of_the_future": 1}) == Certificate.from_json(values)
    larger = {**old, "errors": [{**old["errors"][0], "relative_error": 1e-6}]}
    assert Certificate.from_json(larger).is_good
    assert not Certificate.from_json(larger, "float64").is_good


# networks that float64 cannot run -------------------------------------------------------------------------------------


class InFloat32(nn.Module):
    """A network that insists on float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 3)

    def forward(self, x):
        if self.inner.weight.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float")
        return self.inner(x.flatten(1)).tanh()


@pytest.mark.parametrize("output", ["full", "trace"])
def test_a_network_without_float64_is_compared_in_its_own_dtype(output, job, tmp_path, monkeypatch):
    module, settings = InFloat32(), {"store": tmp_path / "k.zarr", "output": output, "fsync": False}
    found = require_good(ntkgen.compute(module, job.x, **settings))
    assert found.exact_dtype == "float32"
    assert 0 < found.errors[0].max_pair_error < 1e-3
    plant_rule(monkeypatch)
    with pytest.raises(InaccurateKernelError):
        ntkgen.compute(module, job.x, **settings | {"store": tmp_path / "wrong.zarr"})


def test_info_says_in_which_dtype_it_was_compared(run, tmp_path, job):
    ntkgen.compute(InFloat32(), job.x, store=tmp_path / "k.zarr", fsync=False)
    assert "is in float32, because the network cannot run in float64" in run("info", tmp_path / "k.zarr")[1]


def test_what_no_dtype_can_run_is_found_before_the_work(job, tmp_path):
    class InNeither(InFloat32):
        def forward(self, x):
            raise RuntimeError("not implemented for any dtype")

    with pytest.raises(ntkgen.errors.ModelError, match="not implemented for any dtype"):
        ntkgen.compute(InNeither(), job.x, store=tmp_path / "k.zarr", fsync=False)
    assert not (tmp_path / "k.zarr").exists()


# what it costs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """Record the sample and the number of rows of each call of the reference, for a random sample of pairs."""
    formed, fill = [], ExactRows.fill

    def counted(self, rows, sample, outputs, params):
        formed.append((sample.sum().item(), len(outputs)))
        fill(self, rows, sample, outputs, params)

    monkeypatch.setattr(ExactRows, "fill", counted)
    monkeypatch.setattr(certification, "compares_whole", lambda *_: False)
    return formed


@pytest.mark.parametrize("output", ["full", "centered", "diagonal"])
def test_each_sample_of_a_pair_is_computed_once_for_some_of_many_outputs(output, tmp_path, passes):
    job = make_job(4, module=linear(40))
    found = computed(tmp_path, job, output=output, tile_side=None, dtypes=("float32",)).manifest.certificate
    assert (found.num_pairs, found.num_pair_outputs) == (16, 16)
    assert len({sample for sample, _ in passes}) == len(passes) == 4
    assert {rows for _, rows in passes} == {16}
    assert 0 < found.errors[0].max_pair_error < 1e-6


def test_a_trace_of_many_outputs_is_compared_in_few_pairs(tmp_path, passes):
    assert [usual_sampling("trace", m).num_pairs for m in (1, 10, 40, 1000)] == [16, 16, 6, 1]
    job = make_job(4, module=linear(40))
    found = computed(tmp_path, job, output="trace", tile_side=None, dtypes=("float32",)).manifest.certificate
    assert (found.num_pairs, found.num_pair_outputs) == (6, 40)
    assert sum(rows for _, rows in passes) <= 4 * 40
    assert 0 < found.errors[0].max_pair_error < 1e-6


def test_sampled_outputs_are_compared_with_their_own_entries(tmp_path):
    job = make_job(4, module=linear(40))
    store = computed(tmp_path, job, tile_side=None, dtypes=("float64",), certify=False)
    drawn = pairs.Pairs(((0, 1),), 40, 16, 0)
    assert drawn.outputs(0, is_column=False) != drawn.outputs(1, is_column=False)
    r, c = drawn.outputs(0, is_column=False)[3], 40 + drawn.outputs(1, is_column=False)[5]
    array = zarr.open_group(store.path, mode="r+")["ntk_float64"]
    array[min(r, c), max(r, c)] += 7.0
    inputs = computation.Inputs(job.x, job.samples)
    found = certification.certify(store, job.module, inputs, Sampling(num_pairs=16)).errors[0]
    K = job.reference
    assert found.max_pair_error == pytest.approx(7 / np.sqrt(K[r, r] * K[c, c]), rel=1e-3)
