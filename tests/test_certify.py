"""The certificate: its bound holds, a wrong tile is located, what cannot be certified is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cases import Job, chosen, files_of, in_turn, make_job, relative_error, write_files
from hypothesis import given
from hypothesis import strategies as st

import ntkgen
from ntkgen.checks.certify import add_certificate, certify, draw_probes, forget_certificate, stored_product
from ntkgen.checks.judgement import suspicious_blocks
from ntkgen.checks.pairs import draw_pairs, kernels_of, mapped_kernel
from ntkgen.checks.sampling import Sampling
from ntkgen.engine import compute as computation
from ntkgen.errors import FingerprintError, InputError, ShapeError, StoreError
from ntkgen.fingerprints import parameter_fingerprint
from ntkgen.inputs import Inputs
from ntkgen.jacobian.outputs import output_map
from ntkgen.jacobian.reference import reference_ntk
from ntkgen.plan.tiles import Tile
from ntkgen.store.certificate import (
    Certificate,
    StoredError,
    bad_fraction,
    rounded,
    rounded_up,
    tiles_to_check,
    upper_bound,
)
from ntkgen.store.manifest import Manifest
from ntkgen.store.opening import create_store, open_store
from ntkgen.store.provenance import Provenance
from ntkgen.store.store import KernelStore
from ntkgen.store.view import SymmetricArray

ALL = ("float16", "float32", "float64")
LAYOUTS = pytest.mark.parametrize("layout", ["upper", "full"])


COMPUTED: dict[tuple[int, tuple[str, ...], str], tuple[Job, dict[str, bytes]]] = {}


def finished(job: Job, path: Path, dtypes: tuple[str, ...] = ALL, layout: str = "upper") -> KernelStore:
    """Return a finished store. That of a job is computed once, and copied for each test."""
    place, kind = path / f"{layout}.zarr", (id(job), dtypes, layout)
    if kind not in COMPUTED:
        job.run(job.create(place, dtypes, layout))
        COMPUTED[kind] = job, files_of(place)
    else:
        write_files(place, COMPUTED[kind][1])
    return open_store(place, mode="r+")


def certified(store: KernelStore, job: Job, **sampling: int) -> Certificate:
    return certify(store, job.module, inputs_of(job), Sampling(**{"num_pairs": 0, **sampling}))


def inputs_of(job: Job) -> Inputs:
    return Inputs(job.x, job.samples)


def suspects(store: KernelStore, error: StoredError) -> list[Tile]:
    return tiles_to_check(store.grid, error.suspicious)


def spoil(store: KernelStore, tile: Tile, factor: float = 1.1) -> None:
    """Commit a tile with wrong values."""
    rows, cols = (store.grid.block(index).rows(store.grid.num_outputs) for index in (tile.row, tile.col))
    store.commit(tile, store.array[rows, cols] * factor)


def true_error(store: KernelStore, job: Job, dtype: str) -> float:
    return float(np.linalg.norm(np.asarray(store.kernel(dtype), np.float64) - job.reference))


# the product ----------------------------------------------------------------------------------------------------------


@in_turn("dtype layout", ALL, ["upper", "full"])
def test_the_stored_product_is_that_of_the_stored_matrix(layout, dtype, tmp_path):
    job = make_job(scale=30)  # so that float16 has a scale
    store = finished(job, tmp_path, layout=layout)
    assert store.scale_factor("ntk_float16") != 1
    assert store.scale_factor("ntk_float32") == 1
    V = draw_probes(store.grid.num_cols, Sampling(num_probes=3))
    expected = np.asarray(store.kernel(dtype), np.float64) @ V
    assert relative_error(stored_product(store, dtype, V), expected[None]) < 1e-14


@LAYOUTS
def test_each_stored_tile_is_read_once(layout, job, tmp_path, monkeypatch):
    store, read = finished(job, tmp_path, ("float32",), layout), []
    read_stored = SymmetricArray._read_stored

    def spied(self, tile, region, **options):
        read.append((tile, region))
        return read_stored(self, tile, region, **options)

    monkeypatch.setattr(SymmetricArray, "_read_stored", spied)
    steps = []
    stored_product(store, "float32", np.ones((33, 1)), lambda: steps.append(1))
    upper = [(i, j) for i in range(4) for j in range(i, 4)]
    places = upper if layout == "upper" else [(i, j) for i in range(4) for j in range(4)]
    whole = [slice(at, min(at + 9, 33)) for at in range(0, 33, 9)]
    assert sorted(tile for tile, _ in read) == places  # two threads read
    assert all(region == (whole[i], whole[j]) for (i, j), region in read)
    assert len(steps) == len(read)


# an honest store ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", chosen(["upper", "full"], ["upper"]))
def test_the_bound_holds_for_nearly_all_seeds(layout, job, tmp_path):
    store = finished(job, tmp_path, layout=layout)
    truth = {dtype: true_error(store, job, dtype) for dtype in ALL}
    found = [certified(store, job, seed=seed).errors for seed in range(20)]
    for position, dtype in enumerate(ALL):
        errors = [of_seed[position] for of_seed in found]
        assert {error.dtype for error in errors} == {dtype}
        assert np.mean([error.bound >= truth[dtype] for error in errors]) >= 0.9
        assert abs(np.mean([error.error**2 for error in errors]) / truth[dtype] ** 2 - 1) < 0.2
        assert not any(error.suspicious or suspects(store, error) for error in errors)


@pytest.mark.parametrize("layout", chosen(["upper", "full"], ["full"]))
def test_what_the_numbers_mean(layout, job, tmp_path):
    store = finished(job, tmp_path, layout=layout)
    found, K = certified(store, job, num_probes=400), job.reference
    assert found.kernel_norm == pytest.approx(np.linalg.norm(K), rel=0.2)
    for error in found.errors:
        stored = np.asarray(store.kernel(error.dtype), np.float64)
        blocks = [np.linalg.norm((stored - K)[rows]) for rows in np.split(np.arange(33), range(9, 33, 9))]
        np.testing.assert_allclose(error.block_errors, blocks, rtol=0.25)
        assert np.linalg.norm(error.block_errors) == pytest.approx(error.error, rel=1e-12)
        assert error.relative_error == error.error / found.kernel_norm
        assert error.relative_bound == error.bound / found.kernel_norm
        assert error.bound == upper_bound(error.error, 400)
        shift = np.abs(np.linalg.eigvalsh(stored) - np.linalg.eigvalsh(K)).max()
        assert shift <= error.bound


def test_errors_are_of_the_size_of_the_dtypes(tmp_path):
    job = make_job(precision="float64")
    half, single, double = certified(finished(job, tmp_path), job).errors
    assert 5e-5 < half.relative_error < 5e-4
    assert 5e-9 < single.relative_error < 5e-8
    assert double.relative_error < 1e-14
    assert not half.suspicious + single.suspicious + double.suspicious


def test_any_number_of_samples_can_be_certified(tmp_path):
    for num_samples in (1, 2, 4):
        job = make_job(num_samples)
        found = certified(finished(job, tmp_path / str(num_samples)), job, num_pairs=3)
        assert all(0 < error.bound < 1e-3 * found.kernel_norm and not error.suspicious for error in found.errors)


def test_a_kernel_of_zeros_has_no_error(tmp_path):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3, bias=False))
    job = make_job(module=module, scale=0, num_samples=6)
    found = certified(finished(job, tmp_path), job, num_pairs=4)
    assert found.kernel_norm == 0
    for error in found.errors:
        assert (error.error, error.bound, error.relative_bound, error.max_pair_error) == (0, 0, 0, 0)
        assert not error.suspicious


def test_samples_with_a_far_smaller_kernel_are_not_suspicious_in_float16(tmp_path):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3, bias=False))
    job = make_job(module=module)
    job.x[3:] *= 1e-4  # entries of 1e-8 beside entries of 1: below the smallest float16
    found = certified(finished(job, tmp_path), job)
    assert [error.suspicious for error in found.errors] == [(), (), ()]


# output maps and rectangular kernels ----------------------------------------------------------------------------------

OUTPUTS = ["full", "sum", "centered", "index:1", "trace", "diagonal"]


def mapped(job: Job, path: Path, output: str, num_others: int | None) -> tuple[KernelStore, Inputs]:
    """Compute a kernel of an output map, perhaps against other samples, without a certificate."""
    others = (
        None if num_others is None else torch.randn(num_others, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    )
    side = 3 * {"full": 3, "centered": 2}.get(output, 1)
    options = {"dtypes": ALL, "tile_side": side, "layout": "auto" if num_others else "upper", "certify": False}
    store = ntkgen.compute(job.module, job.x, others, store=path / "k.zarr", output=output, **options)
    return store, Inputs(job.x, job.samples, others)


@in_turn("output num_others", chosen(OUTPUTS, ["diagonal"]), [None, 5])
def test_every_kernel_is_certified_as_what_it_is(output, num_others, job, tmp_path):
    store, inputs = mapped(job, tmp_path, output, num_others)
    found = certify(store, job.module, inputs, Sampling(num_probes=200, num_pairs=30))
    logits = reference_ntk(job.module, job.x, inputs.against).numpy()
    exact = mapped_kernel(logits, output_map(output, 3), 3)
    assert found.kernel_norm == pytest.approx(np.linalg.norm(exact), rel=0.3)
    assert found.num_pairs == 30
    for error in found.errors:
        stored = np.stack([kernel[:] for kernel in kernels_of(store, error.dtype)]).astype(np.float64)
        assert error.error == pytest.approx(np.linalg.norm(stored - exact), rel=0.3)
        assert error.max_pair_error < {"float16": 1e-3, "float32": 3e-6, "float64": 3e-6}[error.dtype]
        assert not error.suspicious
        assert np.linalg.norm(error.block_errors) == pytest.approx(error.error, rel=1e-12)


@pytest.mark.parametrize("output", chosen(["full", "centered", "trace", "diagonal"], ["diagonal"]))
def test_a_wrong_tile_of_any_kernel_is_located(output, job, tmp_path):
    for num_others in (None, 5):
        store, inputs = mapped(job, tmp_path / str(num_others), output, num_others)
        tile = Tile(1, 2) if num_others is None else Tile(3, 1)
        array = zarr.open_group(store.path, mode="r+")["ntk_float32"]
        side, plane = store.grid.side, (2,) if output == "diagonal" else ()
        region = (*plane, *(slice(at * side, (at + 1) * side) for at in (tile.row, tile.col)))
        array[region] = array[region] * 1.5
        half, single, double = certify(store, job.module, inputs, Sampling(num_pairs=0)).errors
        assert (half.suspicious, double.suspicious) == ((), ())
        assert single.suspicious == ((1, 2) if num_others is None else (3,))
        assert tile in suspects(store, single)[:3]


def test_the_pairs_of_a_rectangular_kernel_are_of_rows_and_columns(job, tmp_path):
    store, inputs = mapped(job, tmp_path, "full", 5)
    found = certify(store, job.module, inputs, Sampling(num_pairs=1000)).errors[1]
    K = reference_ntk(job.module, job.x, inputs.against).numpy()
    sides = [np.sqrt(np.diag(reference_ntk(job.module, x).numpy())) for x in (job.x, inputs.against)]
    errors = np.abs(np.asarray(store.kernel("float32"), np.float64) - K) / np.outer(*sides)
    assert found.max_pair_error == pytest.approx(errors.max(), rel=1e-6)


def test_another_map_is_another_kernel(job, tmp_path):
    store, inputs = mapped(job, tmp_path, "index:1", None)
    other = {**store.manifest.identity, "output": "index:2"}
    object.__setattr__(store.manifest, "identity", other)
    found = certify(store, job.module, inputs, Sampling(num_pairs=4)).errors[-1]
    assert found.relative_error > 0.01
    assert found.max_pair_error > 1e-3


# a wrong tile ---------------------------------------------------------------------------------------------------------


@in_turn(
    "tile layout",
    chosen([Tile(1, 3), Tile(3, 3), Tile(2, 2), Tile(0, 3), Tile(0, 1)], [Tile(1, 3), Tile(3, 3)]),
    ["upper", "full"],
)
def test_a_wrong_tile_is_located(layout, tile, job, tmp_path):
    store = finished(job, tmp_path, layout=layout)
    spoil(store, tile)
    for error in certified(store, job).errors:
        blocks = {tile.row, tile.col}
        assert set(error.suspicious) == blocks
        expected = [Tile(i, j) for i in range(4) for j in range(i, 4) if {i, j} & blocks]
        assert sorted(suspects(store, error)) == expected
        assert tile in suspects(store, error)[: len(blocks) * (len(blocks) + 1) // 2]


def test_a_tile_wrong_in_one_dtype_is_located_there(job, tmp_path):
    store = finished(job, tmp_path, layout="full")
    array = zarr.open_group(store.path, mode="r+")["ntk_float32"]
    array[9:18, 27:36] *= 1.1  # and its mirror not
    half, single, double = certified(store, job).errors
    assert (half.suspicious, single.suspicious, double.suspicious) == ((), (1,), ())
    assert Tile(1, 3) in suspects(store, single)


def test_one_wrong_entry_is_located(tmp_path):
    job = make_job(precision="float64")  # in float32 it might be one unit of one sample that has flipped
    store = finished(job, tmp_path)
    array = zarr.open_group(store.path, mode="r+")["ntk_float64"]
    array[10, 30] = 0.0
    found = certified(store, job).errors[-1]
    assert found.suspicious == (1, 3)


@pytest.mark.slow
def test_the_bound_covers_what_is_wrong(job, tmp_path):
    store = finished(job, tmp_path)
    spoil(store, Tile(1, 2), 3.0)
    truth = true_error(store, job, "float32")
    assert np.mean([certified(store, job, seed=seed).errors[1].bound >= truth for seed in range(20)]) >= 0.9


def test_several_wrong_tiles_do_not_hide_each_other(job, tmp_path):
    store = finished(job, tmp_path)
    for tile in (Tile(0, 1), Tile(1, 1), Tile(1, 3)):
        spoil(store, tile)
    assert certified(store, job).errors[1].suspicious == (0, 1, 3)


def test_an_error_everywhere_alike_is_not_suspicious_but_large():
    assert suspicious_blocks(np.full(8, 1e3), np.ones(8)) == ()
    assert suspicious_blocks(np.array([0.0, 0.0, 0.0, 9.9, 10.1]), np.ones(5)) == (4,)
    assert suspicious_blocks(np.array([0.0, 0.0, 1e9]), np.zeros(3)) == (2,)


# pairs of samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", chosen(["upper", "full"], ["upper"]))
def test_pairs_are_compared_with_the_reference(layout, job, tmp_path):
    store = finished(job, tmp_path, layout=layout)
    found = certified(store, job, num_pairs=1000)
    diagonal = np.sqrt(np.diag(job.reference))
    assert (found.num_pairs, found.bad_pairs_below) == (121, bad_fraction(121))
    for error in found.errors:
        errors = np.abs(np.asarray(store.kernel(error.dtype), np.float64) - job.reference)
        assert error.max_pair_error == pytest.approx((errors / np.outer(diagonal, diagonal)).max(), rel=1e-6)


def test_pairs_are_drawn_once_each_and_anew_for_another_seed():
    drawn = draw_pairs((20, 5), Sampling(num_pairs=50))
    assert len(set(drawn)) == 50
    assert all(0 <= i < 20 and 0 <= j < 5 for i, j in drawn)
    assert drawn == draw_pairs((20, 5), Sampling(num_pairs=50)) != draw_pairs((20, 5), Sampling(num_pairs=50, seed=1))
    assert set(draw_pairs((3, 2), Sampling(num_pairs=9))) == {(i, j) for i in range(3) for j in range(2)}


@pytest.mark.slow
def test_a_wrong_pair_is_found_once_it_is_drawn(job, tmp_path):
    store = finished(job, tmp_path)
    spoil(store, Tile(0, 0), 1.5)
    assert certified(store, job, num_pairs=121).errors[1].max_pair_error == pytest.approx(0.5, rel=1e-3)


# statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_probes", [1, 2, 10])
def test_the_confidence_is_exact_for_rank_one_and_conservative_otherwise(num_probes):
    generator = np.random.default_rng(0)
    chi = generator.chisquare(num_probes, size=(50_000, 3)) / num_probes
    for weights in ([1, 0, 0], [0.99, 0.01, 0], [0.7, 0.2, 0.1], [0.5, 0.5, 0], [1 / 3] * 3):
        estimates = np.sqrt(chi @ np.array(weights))
        covered = np.mean(upper_bound(1.0, num_probes) * estimates >= 1)
        assert covered > 0.947
        if weights[0] == 1:
            assert covered < 0.953


# what is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_equal_runs_give_equal_certificates_whatever_they_took(job, tmp_path):
    store = finished(job, tmp_path)
    first, second, other = (certified(store, job, num_pairs=4, seed=seed) for seed in (3, 3, 4))
    assert first == second != other
    assert first.seconds > 0
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())
    assert "seconds" not in first.to_json()


def test_a_certificate_survives_json_with_three_digits(job, tmp_path):
    found = certified(finished(job, tmp_path), job, num_pairs=4)
    values = found.to_json()
    text = json.dumps(values, allow_nan=False)
    kept = Certificate.from_json(json.loads(text))
    hash(kept)
    assert kept.to_json() == values
    for before, after in zip(found.errors, kept.errors, strict=True):
        assert after.error == pytest.approx(before.error, rel=5e-3)
        assert before.bound <= after.bound <= before.bound * 1.01
        assert before.relative_bound <= after.relative_bound
        assert (after.dtype, after.suspicious) == (before.dtype, before.suspicious)
    assert all(len(f"{number:g}".split("e")[0].replace(".", "").strip("0")) <= 3 for number in numbers_in(values))


def numbers_in(values):
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, dict | list):
            yield from numbers_in(value)
        elif isinstance(value, float):
            yield value


@given(st.floats(1e-300, 1e300))
def test_a_bound_is_never_rounded_down(value):
    assert value <= rounded_up(value) <= value * 1.01
    assert rounded_up(rounded_up(value)) == rounded_up(value)
    assert rounded(rounded(value)) == rounded(value)


def test_a_certificate_is_written_into_a_store_that_stays_whole(job, tmp_path):
    written, opened = (finished(job, tmp_path / name) for name in ("a", "b"))
    before = json.loads((written.path / "zarr.json").read_text())
    found = add_certificate(written, job.module, inputs_of(job))
    add_certificate(open_store(opened.path, mode="r+"), job.module, inputs_of(job))
    assert (written.path / "zarr.json").read_bytes() == (opened.path / "zarr.json").read_bytes()
    assert open_store(written.path).manifest.certificate.to_json() == found.to_json()
    after = json.loads((written.path / "zarr.json").read_text())
    assert after["consolidated_metadata"] == before["consolidated_metadata"]
    forget_certificate(written)
    assert open_store(written.path).manifest.certificate is None


def test_the_library_certifies_by_itself_and_can_be_asked_not_to(job, tmp_path):
    plain = ntkgen.compute(job.module, job.x, store=tmp_path / "k.zarr", certify=False)
    assert plain.manifest.certificate is None
    stages = []
    again = ntkgen.compute(
        job.module, job.x, store=tmp_path / "k.zarr", report=lambda *report: stages.append(report[0])
    )
    assert set(stages) == {"stored product", "exact rows"}
    assert [error.dtype for error in again.manifest.certificate.errors] == ["float16", "float32"]


def test_tiles_made_anew_are_certified_anew(job, tmp_path, monkeypatch):
    settings = {"store": tmp_path / "k.zarr", "tile_side": 9}
    before = ntkgen.compute(job.module, job.x, **settings).manifest.certificate
    (tmp_path / "k.zarr/ntk_float32/c/0/1").unlink()

    def seen(*args, **kwargs):
        assert open_store(tmp_path / "k.zarr").manifest.certificate is None
        return run(*args, **kwargs)

    run = computation.run
    monkeypatch.setattr(computation, "run", seen)
    assert ntkgen.compute(job.module, job.x, **settings).manifest.certificate == before


def test_stages_are_reported(job, tmp_path):
    store, reports = finished(job, tmp_path, ("float16", "float32")), []
    certify(store, job.module, inputs_of(job), Sampling(num_pairs=2), report=lambda *report: reports.append(report))
    assert [report for report in reports if report[1] == report[2]] == [
        ("stored product", 20, 20),
        ("exact product", 2, 2),
        ("pairs", 2, 2),
    ]


def test_a_store_is_only_read(job, tmp_path):
    store = finished(job, tmp_path)
    before = {file: file.read_bytes() for file in store.path.rglob("*") if file.is_file()}
    certified(open_store(store.path), job, num_pairs=2)
    assert before == {file: file.read_bytes() for file in store.path.rglob("*") if file.is_file()}


# refusals -------------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_missing_tiles_are_refused(layout, job, tmp_path):
    store = finished(job, tmp_path, layout=layout)
    (store.path / "ntk_float32/c/1/3").unlink()
    with pytest.raises(StoreError, match=r"expected all of its 10 tiles, and 1 are missing \(\(1, 3\)\)"):
        certified(store, job)


def test_an_unfinished_store_is_refused(job, tmp_path):
    store = job.create(tmp_path / "k.zarr")
    with pytest.raises(StoreError, match=r"10 are missing .*, …"):
        certified(store, job)


@in_turn("value layout", [np.nan, np.inf], ["upper", "full"])
def test_entries_that_are_not_finite_are_refused(layout, value, job, tmp_path):
    store = finished(job, tmp_path, layout=layout)
    zarr.open_group(store.path, mode="r+")["ntk_float32"][11, 30] = value
    with pytest.raises(StoreError, match=r"Tile \(1, 3\) of ntk_float32 .* 1 of 54 entries"):
        certified(store, job)


def test_a_damaged_tile_is_refused(job, tmp_path):
    store = finished(job, tmp_path)
    chunk = store.path / "ntk_float32/c/0/2"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match=r"Tile \(0, 2\)"):
        certified(store, job)


def test_other_samples_and_other_networks_are_refused(job, tmp_path):
    store = finished(job, tmp_path)
    with pytest.raises(ShapeError, match="11 samples × 3 outputs, found 10 samples × 3 outputs"):
        certify(store, job.module, Inputs(job.x[:10], job.samples))
    with pytest.raises(ShapeError, match="found 11 against 2 samples × 3 outputs"):
        certify(store, job.module, Inputs(job.x, job.samples, job.x[:2]))
    wider = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    with pytest.raises(ShapeError, match="11 samples × 4 outputs"):
        certify(store, wider, inputs_of(job))


def test_other_parameters_are_refused_where_the_store_says_which(job, tmp_path):
    identity = {"parameters": parameter_fingerprint(job.module)}
    manifest = Manifest(
        identity, Provenance.of({"model": "small", "dataset": "noise"}), job.plan, ("float32",), "upper"
    )
    store = job.run(create_store(tmp_path / "k.zarr", manifest, job.samples))
    certify(store, job.module, inputs_of(job))
    other = make_job().module
    with torch.no_grad():
        other[0].weight[0] += 1
    with pytest.raises(FingerprintError, match="other parameters"):
        certify(store, other, inputs_of(job))


@pytest.mark.parametrize("wrong", [{"num_probes": 0}, {"num_pairs": -1}, {"seed": -1}])
def test_numbers_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(InputError, match="at least one probe"):
        Sampling(**wrong)
