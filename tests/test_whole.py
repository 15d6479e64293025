"""Small kernels are compared entry by entry: the error is exact, and which way is taken follows from counted passes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cases import chosen, in_turn, make_job, relative_error
from torch import nn

import ntkgen
from ntkgen.analysis.report import sections as report_sections
from ntkgen.checks import certify as certification
from ntkgen.checks import pairs, whole
from ntkgen.checks.certify import certify
from ntkgen.checks.choice import KernelSize, compares_whole, sampled_passes, whole_passes
from ntkgen.checks.pairs import KeptRows, kernels_of, mapped_kernel
from ntkgen.checks.rows import ExactRows
from ntkgen.checks.sampling import Sampling, usual_sampling
from ntkgen.errors import ShapeError
from ntkgen.inputs import Inputs
from ntkgen.jacobian.outputs import output_map
from ntkgen.jacobian.reference import reference_ntk
from ntkgen.store.certificate import Certificate
from ntkgen.store.describe import describe
from ntkgen.store.opening import open_store

WHOLE = Sampling(or_whole=True)
ALL = ("float16", "float32", "float64")
FAST = ["compute", "--models", "logistic", "--dataset", "digits", "--epochs", "0", "--subsample", "6", "-q"]
LENET = KernelSize(8, None, 10, 61_706, is_reduced=False)


def computed(path, job, others=None, **settings):
    options = {"store": path / "k.zarr", "tile_side": 9, "fsync": False, "certify": False, **settings}
    return ntkgen.compute(job.module, job.x, others, **options), Inputs(job.x, job.samples, others)


# the error ------------------------------------------------------------------------------------------------------------


@in_turn("output num_others", ["full", "sum", "index:1", "centered", "trace", "diagonal"], [None, 5])
def test_the_error_is_that_of_all_entries(output, num_others, job, tmp_path):
    others = None if num_others is None else torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    side = {"full": 9, "centered": 6}.get(output, 3)
    store, inputs = computed(tmp_path, job, others, output=output, tile_side=side, dtypes=ALL)
    found = certify(store, job.module, inputs, WHOLE)
    exact = mapped_kernel(reference_ntk(job.module, job.x, others).numpy(), output_map(output, 3), 3)
    assert (found.comparison, found.num_probes, found.num_pairs) == ("whole kernel", 0, 11 * (num_others or 11))
    assert found.bad_pairs_below == 0
    assert found.kernel_norm == pytest.approx(np.linalg.norm(exact), rel=1e-10)
    for error in found.errors:
        stored = np.stack([kernel[:] for kernel in kernels_of(store, error.dtype)]).astype(np.float64)
        assert error.error == error.bound == pytest.approx(np.linalg.norm(stored - exact), rel=1e-5)
        assert np.linalg.norm(error.block_errors) == pytest.approx(error.error, rel=1e-12)
        assert error.is_good


@pytest.mark.parametrize("layout", chosen(["upper", "full"], ["upper"]))
def test_a_known_error_is_found_exactly(layout, tmp_path):
    job = make_job(precision="float64")
    store, inputs = computed(tmp_path, job, precision="float64", dtypes=("float64",), layout=layout)
    zarr.open_group(store.path, mode="r+")["ntk_float64"][10, 30] += 0.5
    (error,) = certify(store, job.module, inputs, WHOLE).errors
    K, times = job.reference, {"upper": 2, "full": 1}[layout]  # the entry also stands for its mirror image
    assert error.error == pytest.approx(0.5 * np.sqrt(times), rel=1e-9)
    assert error.relative_error == pytest.approx(error.error / np.linalg.norm(K), rel=1e-9)
    assert error.max_pair_error == pytest.approx(0.5 / np.sqrt(K[10, 10] * K[30, 30]), rel=1e-9)
    assert error.suspicious == {"upper": (1, 3), "full": (1,)}[layout]
    assert np.flatnonzero(np.array(error.block_errors) > 1e-9).tolist() == list(error.suspicious)


def test_a_kernel_of_zeros_has_an_absolute_error(tmp_path):
    module = nn.Linear(3, 2, bias=False)
    store = ntkgen.compute(module, torch.zeros(4, 3), store=tmp_path / "k.zarr", dtypes=("float64",), certify=False)
    zarr.open_group(store.path, mode="r+")["ntk_float64"][0, 1] = 0.25
    (error,) = certify(store, module, Inputs(torch.zeros(4, 3), None), WHOLE).errors
    assert (error.max_pair_error, error.relative_error) == (0.25, 0.25)


@pytest.mark.parametrize("is_rectangular", [False, True])
def test_rows_of_large_networks_are_computed_in_groups_of_parameters(is_rectangular, job, monkeypatch):
    inputs = Inputs(job.x, job.samples, job.x[:5] + 1 if is_rectangular else None)
    filled, fill = [], ExactRows.fill

    def counted(self, rows, sample, outputs, params):
        filled.append((rows.nbytes, len(params)))
        fill(self, rows, sample, outputs, params)

    monkeypatch.setattr(ExactRows, "fill", counted)
    exact = ExactRows.of(job.module, inputs, output_map("full", 3))
    at_once = whole.whole_kernel(exact, "none")
    num_samples = sum(n or 0 for n in inputs.counts)
    assert filled == [(8 * 3 * exact.num_params, 6)] * num_samples
    limit = 8 * 3 * num_samples * 100
    monkeypatch.setattr(whole, "MAX_JACOBIAN_BYTES", limit)
    filled.clear()
    in_groups = whole.whole_kernel(exact, "none")
    assert len(filled) > 2 * num_samples
    assert all(num_bytes * num_samples <= limit for num_bytes, _ in filled)
    expected = reference_ntk(job.module, job.x, inputs.against).numpy()
    for found in (at_once, in_groups):
        assert relative_error(found.values[0], expected) < 1e-13
        assert relative_error(found.row_norms[0], np.sqrt(np.diag(job.reference))) < 1e-13


def test_other_samples_and_other_networks_are_refused(job, tmp_path):
    store, inputs = computed(tmp_path, job)
    with pytest.raises(ShapeError, match="11 samples × 3 outputs, found 10 samples × 3 outputs"):
        certify(store, job.module, Inputs(job.x[:10], job.samples), WHOLE)
    object.__setattr__(store.manifest, "identity", {})
    wider = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    with pytest.raises(ShapeError, match="11 samples × 4 outputs"):
        certify(store, wider, inputs, WHOLE)


# the choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "largest"),
    [
        (LENET, 16),
        (KernelSize(8, None, 1, 769, is_reduced=False), 1000),
        (KernelSize(8, None, 10, 61_706, is_reduced=True), 200),
        (KernelSize(8, None, 10, 5_526_346, is_reduced=False), 8),  # rows in groups of parameters, ViT-tiny
    ],
)
def test_kernels_up_to_a_size_are_compared_whole(size, largest):
    sampling = Sampling(3 if size.is_reduced else 10, or_whole=True)
    ways = [compares_whole(sampling, dataclasses.replace(size, num_rows=n)) for n in range(2, 2000)]
    first = ways.index(False)
    assert not any(ways[first:])
    assert largest / 2 <= first + 1 <= 2 * largest
    assert not compares_whole(dataclasses.replace(sampling, or_whole=False), size)


def test_the_counts_are_those_of_the_passes():
    assert whole_passes(LENET) == 80 + 80 * 80 / 100
    assert whole_passes(dataclasses.replace(LENET, num_cols=4)) == 120 + 80 * 40 / 100
    assert whole_passes(dataclasses.replace(LENET, is_reduced=True)) == 80 + 8 * 80 / 100
    assert whole_passes(dataclasses.replace(LENET, num_params=1 << 23)) == 2 * 80 + 64  # in five groups
    assert sampled_passes(Sampling(10, 16), LENET) == 8 * (10 + 3) + 8 * 10 + 15
    assert sampled_passes(Sampling(10, 2), LENET) == 8 * (10 + 3) + 4 * 10 + 15
    assert sampled_passes(Sampling(3, 16), dataclasses.replace(LENET, is_reduced=True)) == 8 * (30 + 3) + 80 + 15
    # of six rows of each sample only those of two samples can be kept
    assert sampled_passes(Sampling(10, 16), dataclasses.replace(LENET, num_params=11 * 10**6)) == 104 + 32 * 6 + 15


def test_the_library_takes_the_cheaper_way(job, tmp_path, monkeypatch):
    stages = []
    settings = {"report": lambda *report: stages.append(report[0]), "certify": True}
    store, _ = computed(tmp_path / "a", job, **settings)
    assert store.manifest.certificate.is_exact
    assert list(dict.fromkeys(stages))[-2:] == ["stored product", "exact rows"]
    seen = []
    monkeypatch.setattr(certification, "compares_whole", lambda *asked: seen.append(asked))
    store, _ = computed(tmp_path / "b", job, **settings)
    assert not store.manifest.certificate.is_exact
    num_params = sum(param.numel() for param in job.module.parameters())
    assert seen == [(usual_sampling("full", 3), KernelSize(11, None, 3, num_params, is_reduced=False))]


def test_numbers_that_are_given_are_those_of_a_random_sample(job, tmp_path):
    store, inputs = computed(tmp_path, job)
    assert certify(store, job.module, inputs, Sampling(3, 2)).comparison == "random vectors"
    assert certify(store, job.module, inputs).is_exact


def test_a_certificate_says_which_comparison_it_is(run):
    assert json.loads(run(*FAST, "--json")[1])["certificate"]["comparison"] == "whole kernel"
    (store,) = Path("runs").glob("*.zarr")
    error = open_store(store).manifest.certificate.errors[1]
    for page in (run("info", store)[1], run("verify", store, "--recompute", "0")[1]):
        assert "size of the error E = stored − exact kernel, from the comparison of every entry" in page
        assert f"‖E‖_F = {error.bound:.3g}, {error.relative_bound:.2g} of ‖K‖_F" in page
        assert "95 %" not in page
    assert "from the comparison of every entry" in run(*FAST)[1]
    assert "Every entry was compared" in report_sections._certificate(describe(open_store(store))).body[0].text
    result = json.loads(run("verify", store, "--certify", "--probes", "3", "--json", "-q")[1])
    assert result["certificate"]["comparison"] == "random vectors"
    assert "with 95 % confidence" in run("info", store)[1]
    result = json.loads(run("verify", store, "--certify", "--json", "-q")[1])
    assert result["certificate"]["comparison"] == "whole kernel"


def test_certificates_of_both_kinds_are_read_again(job, tmp_path):
    store, inputs = computed(tmp_path, job)
    for sampling in (WHOLE, Sampling()):
        made = certify(store, job.module, inputs, sampling)
        values = json.loads(json.dumps(made.to_json()))
        again = Certificate.from_json(values)
        assert (again.comparison, again.is_exact) == (made.comparison, sampling.or_whole)
        earlier = {name: value for name, value in values.items() if name != "comparison"}
        assert Certificate.from_json(earlier).comparison == "random vectors"


# rows of pairs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("reduction", ["none", "trace", "diagonal"])
def test_memory_of_rows_in_use_is_not_given_away(kept, reduction, job, monkeypatch):
    exact = ExactRows.of(job.module, Inputs(job.x, job.samples), output_map("full", 3))
    places = [(0, 0), (0, 1), (2, 0), (0, 3), (3, 2), (1, 1), (2, 3), (0, 2)]
    outputs = ((0, 1, 2), (0, 1, 2))
    expected = [KeptRows(exact, reduction).entries(place, outputs) for place in places]
    monkeypatch.setattr(pairs, "MAX_KEPT_BYTES", kept * 8 * 3 * exact.num_params)
    rows = KeptRows(exact, reduction)
    for place, (values, scale) in zip(places, expected, strict=True):
        found = rows.entries(place, outputs)
        np.testing.assert_allclose(found[0], values, rtol=1e-14)
        np.testing.assert_allclose(found[1], scale, rtol=1e-14)
