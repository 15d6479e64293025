"""The log-determinant out of core, against NumPy on the dense matrix, for any cut of the factor and any layout."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from cases import chosen
from filled import certificate_of, fill_store
from hypothesis import event, example, given
from hypothesis import strategies as st
from strategies import few

from ntkgen import cli
from ntkgen.analysis.determinant import Inertia, LogdetSettings, logdet
from ntkgen.analysis.linalg import blas, cholesky
from ntkgen.analysis.linalg.cholesky import factored
from ntkgen.analysis.linalg.factor import FactorPlan, place_of_factor, plan_factor
from ntkgen.analysis.matrix import open_matrix
from ntkgen.errors import BudgetError, DiskSpaceError, InputError, NotPositiveError, StoreError, StoreLockedError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.lock import write_lock
from ntkgen.plan.tiles import Tile

MEMORY = 1 << 40
SETTINGS = LogdetSettings(memory_bytes=MEMORY)


@contextmanager
def cut(side, panel_tiles):
    """Cut every factor into tiles and panels of these sizes."""

    def plan(matrix, free_bytes):
        return FactorPlan(matrix.num_rows, min(side, matrix.num_rows), panel_tiles)

    with mock.patch.object(cholesky, "plan_factor", plan):
        yield


def symmetric(num_rows, lowest=0.1, seed=0):
    """A symmetric matrix with eigenvalues from 10 down to a lowest one."""
    rng = np.random.default_rng([seed, num_rows])
    Q = np.linalg.qr(rng.normal(size=(num_rows, num_rows)))[0]
    K = (Q * np.linspace(10, lowest, num_rows)) @ Q.T
    return (K + K.T) / 2


@contextmanager
def kernel(num_samples, num_outputs=2, K=None, **options):
    """A matrix in a store, opened for analysis, and the numbers that the store holds."""
    with tempfile.TemporaryDirectory() as folder:
        K = symmetric(num_samples * num_outputs) if K is None else K
        labels = np.zeros(num_samples, np.int64)
        store, _ = fill_store(
            LocalFolder(Path(folder) / "k.zarr", fsync=False), K, labels=labels, num_outputs=num_outputs, **options
        )
        matrix = open_matrix(store)
        yield matrix, matrix.block(slice(None), slice(None))


def files(matrix):
    return sorted(Path(matrix.name).parent.glob("*.analysis/factor*"))


CUTS = {
    "num_samples": st.integers(1, 14),
    "num_outputs": st.integers(1, 3),
    "tile_samples": st.integers(1, 5),
    "layout": st.sampled_from(["upper", "full"]),
    "dtypes": st.sampled_from([("float64",), ("float32",), ("float16", "float32")]),
    "side": st.integers(1, 12),
    "panel_tiles": st.integers(1, 4),
}


@few
@given(st.fixed_dictionaries(CUTS), st.sampled_from([0.0, 0.7]))
def test_it_is_that_of_the_dense_matrix(values, shift):
    side, panel_tiles = values.pop("side"), values.pop("panel_tiles")
    with kernel(**values) as (matrix, stored), cut(side, panel_tiles):
        asked, K = dataclasses.replace(SETTINGS, shift=shift, keep=True), stored + shift * np.eye(len(stored))
        found = logdet(matrix, dataclasses.replace(asked, prefixes=True))
        expected = [np.linalg.slogdet(K[:rows, :rows]).logabsdet for rows in range(1, len(K) + 1)]
        assert (found.rows, found.sign, found.shift) == (len(K), 1, shift)
        assert found.logdet == found.prefixes[-1]
        np.testing.assert_allclose(found.prefixes, expected, rtol=0, atol=1e-10 * len(K))
        assert found.prefix_rows == list(range(1, len(K) + 1))
        with factored(matrix, asked) as (factor, work):
            assert work.products == 0
            V = np.random.default_rng(0).normal(size=(len(K), 3))
            np.testing.assert_allclose(factor.solve(V), np.linalg.solve(K, V), atol=1e-12)
            np.testing.assert_allclose(factor.solve(V[:, 0]), np.linalg.solve(K, V[:, 0]), atol=1e-12)
            L = np.zeros_like(K)
            for row, col in factor.tiles_there():
                L[factor.plan.rows(row), factor.plan.rows(col)] = factor.tile(Tile(row, col))
            np.testing.assert_allclose(L, np.linalg.cholesky(K), atol=1e-12)


NEGATIVE = {"num_samples": 9, "num_outputs": 1, "tile_samples": 2, "layout": "upper", "dtypes": ("float64",)}


@few
@given(st.fixed_dictionaries(CUTS), st.floats(-9.0, -0.1))
@example({**NEGATIVE, "side": 3, "panel_tiles": 2}, -9.0)  # determinants of both signs
def test_an_indefinite_kernel_has_ldl(values, lowest):
    side, panel_tiles = values.pop("side"), values.pop("panel_tiles")
    K = symmetric(values["num_samples"] * values["num_outputs"] + 3, lowest, seed=1)[3:, 3:]
    with kernel(**values, K=K) as (matrix, K), cut(side, panel_tiles):
        sign, expected = np.linalg.slogdet(K)
        try:
            found = logdet(matrix, dataclasses.replace(SETTINGS, indefinite=True, prefixes=True))
        except NotPositiveError as refused:  # a small pivot alone in its tile
            event(str(refused).partition("(")[0])
            return
        eigenvalues = np.linalg.eigvalsh(K)
        assert found.inertia == Inertia(int((eigenvalues > 0).sum()), int((eigenvalues < 0).sum()))
        assert found.residual <= 1e-8
        assert found.sign == sign
        tolerance = 1e-10 * len(K) * max(1.0, found.growth)
        np.testing.assert_allclose(found.logdet, expected, rtol=0, atol=tolerance)
        for rows, value, sign in zip(found.prefix_rows, found.prefixes, found.prefix_signs, strict=True):
            expected_sign, expected = np.linalg.slogdet(K[:rows, :rows])
            assert sign == expected_sign
            np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance)


def test_an_indefinite_kernel_solves_and_has_prefixes_at_tile_boundaries():
    indefinite = dataclasses.replace(SETTINGS, indefinite=True)
    with kernel(20, K=symmetric(40, -2.0)) as (matrix, K), cut(9, 2):
        found = logdet(matrix, dataclasses.replace(indefinite, prefixes=True))
        assert found.prefix_rows == [9, 18, 27, 36, 40]
        assert found.inertia.negative == int((np.linalg.eigvalsh(K) < 0).sum()) > 2
        assert "negative eigenvalues" in found.warnings[0]
        with factored(matrix, indefinite) as (factor, _):
            np.testing.assert_allclose(factor.solve(np.eye(40)), np.linalg.inv(K), atol=1e-9)
            product, largest = factor.multiply(np.eye(40))
        np.testing.assert_allclose(product, K, atol=1e-9)
        assert found.max_factor == largest
        assert found.growth == pytest.approx(largest**2 / np.diag(K).max())


@pytest.mark.parametrize("at", [0, 7, 23, 39])
def test_a_pivot_that_is_not_positive_is_named(at):
    K = symmetric(40)
    K[at, at] -= 1 / np.linalg.inv(K[: at + 1, : at + 1])[at, at] + 0.5  # the pivot becomes −0.5
    errors = certificate_of("float64", 0.0123)
    with kernel(20, K=K, certificate=errors) as (matrix, K), cut(8, 2), pytest.raises(NotPositiveError) as caught:
        logdet(matrix, SETTINGS)
    before = np.linalg.slogdet(K[:at, :at]).logabsdet
    message = str(caught.value)
    assert f"found -0.5 in row {at} (sample {at // 2}, output {at % 2})" in message
    assert "Its certificate bounds its error by ‖E‖ ≤ 0.0123" in message
    assert f"The log-determinant of the {at} rows before it is {before:.9g}"[:-1] in message
    assert caught.value.exit_code == 1


def test_a_pivot_that_is_not_positive_without_a_certificate():
    K = symmetric(40)
    K[7, 7] -= 1 / np.linalg.inv(K[:8, :8])[7, 7] + 0.5
    with kernel(20, K=K) as (matrix, _), cut(8, 2), pytest.raises(NotPositiveError, match="it has no certificate"):
        logdet(matrix, SETTINGS)


def test_what_stopped_goes_on_with_ldl():
    K = symmetric(40)
    K[33, 33] -= 5
    with kernel(20, K=K) as (matrix, K), cut(8, 2):
        with pytest.raises(NotPositiveError):
            logdet(matrix, SETTINGS)
        folder = place_of_factor(matrix, 0.0)[0].path
        before = {path: path.stat().st_mtime_ns for path in folder.glob("factor/c/*/*")}
        assert len(before) == 5 + 4 + 3 + 2
        found = logdet(matrix, dataclasses.replace(SETTINGS, indefinite=True, keep=True))
        assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("factor/c/*/*")}.items()
        assert found.logdet == pytest.approx(np.linalg.slogdet(K).logabsdet)


def test_ldl_that_cannot_be_trusted_is_refused():
    K = np.eye(6) + 0.5
    K[0, 0] = K[1, 1] = 1e-13  # without pivoting across tiles
    K[0, 1] = K[1, 0] = 1.0
    with kernel(3, K=K) as (matrix, _), cut(1, 2):
        with pytest.raises(NotPositiveError, match=r"cannot be trusted: expected .* 1e-08 .*max \|L\| = "):
            logdet(matrix, dataclasses.replace(SETTINGS, indefinite=True))
        assert files(matrix) == []


def test_a_singular_tile_is_refused():
    with (
        kernel(3, K=np.zeros((6, 6))) as (matrix, _),
        pytest.raises(NotPositiveError, match=r"singular: .* found 6 that are"),
    ):
        logdet(matrix, dataclasses.replace(SETTINGS, indefinite=True))


# what is read, written and kept ---------------------------------------------------------------------------------------


class StopError(Exception):
    """The end of a run that is interrupted."""


def interrupted(matrix, after):
    """Begin a factorisation, stop it after a given number of written tiles, and count them."""
    write, count = cholesky.Factor.write, 0

    def limited(self, place, values):
        nonlocal count
        if count == after:
            raise StopError
        count += 1
        write(self, place, values)

    with mock.patch.object(cholesky.Factor, "write", limited), pytest.raises(StopError):
        logdet(matrix, SETTINGS)


@pytest.mark.parametrize("after", chosen([0, 1, 6, 9, 10, 14], [1, 9]))
def test_it_goes_on_to_the_same_bits_and_writes_each_tile_once(after):
    with kernel(15, tile_samples=4) as (matrix, _), cut(7, 2):  # 5 × 5 tiles in panels of 2, 2 and 1
        expected = logdet(matrix, dataclasses.replace(SETTINGS, prefixes=True))
        for file in Path(f"{matrix.name}.analysis").glob("logdet*"):
            file.unlink()
        interrupted(matrix, after)
        folder = place_of_factor(matrix, 0.0)[0].path
        there = {path: path.stat().st_mtime_ns for path in folder.glob("factor/c/*/*")}
        assert len(there) == after
        found = logdet(matrix, dataclasses.replace(SETTINGS, keep=True, prefixes=True))
        assert found.prefixes == expected.prefixes
        now = {path: path.stat().st_mtime_ns for path in folder.glob("factor/c/*/*")}
        assert there.items() <= now.items()
        assert len(now) == 15


def test_a_tile_that_was_cut_short_is_made_anew():
    with kernel(15) as (matrix, K), cut(7, 2):
        interrupted(matrix, 12)
        folder = place_of_factor(matrix, 0.0)[0].path
        os.truncate(folder / "factor/c/3/0", 100)
        (folder / "factor/c/1/1.partial").write_bytes(b"left")
        assert logdet(matrix, SETTINGS).logdet == pytest.approx(np.linalg.slogdet(K).logabsdet, abs=1e-9)


def test_a_tile_that_is_damaged_is_named():
    with kernel(15) as (matrix, _), cut(7, 2):
        interrupted(matrix, 12)
        file = place_of_factor(matrix, 0.0)[0].path / "factor/c/3/0"
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)
        with pytest.raises(StoreError, match=r"Tile \(3, 0\) of the factor at .* is damaged.*Remove this folder"):
            logdet(matrix, SETTINGS)


@pytest.mark.parametrize("panel_tiles", [1, 2, 3, 5])
def test_it_reads_what_was_planned(panel_tiles):
    with kernel(15) as (matrix, _), cut(7, panel_tiles), factored(matrix, SETTINGS) as (factor, _):
        assert factor.tiles_read * factor.plan.tile_bytes == factor.plan.bytes_read


def test_with_less_memory_it_goes_on_in_narrower_panels():
    with kernel(15) as (matrix, K):
        with cut(7, 2):
            interrupted(matrix, 12)
        left = cholesky.reading_bytes(matrix) + 8 * 8 * (30 + 7)
        with cut(7, 2), mock.patch.object(cholesky, "memory_left", return_value=left):
            found = logdet(matrix, SETTINGS)
        assert found.panel_rows == 7
        assert found.logdet == pytest.approx(np.linalg.slogdet(K).logabsdet, abs=1e-9)


def test_it_is_not_computed_twice_and_the_factor_is_kept_where_asked_for():
    with kernel(15) as (matrix, _):
        first, second = (logdet(matrix, SETTINGS) for _ in range(2))
        assert (first.remembered, second.remembered) == (False, True)
        assert first.logdet == second.logdet
        assert first.prefixes is None
        assert len(logdet(matrix, dataclasses.replace(SETTINGS, prefixes=True)).prefixes) == 30
        assert files(matrix) == []
        logdet(matrix, dataclasses.replace(SETTINGS, keep=True))
        assert len(files(matrix)) == 1
        with factored(matrix, SETTINGS) as (_, work):
            assert work.products == 0
        assert files(matrix) == []


def test_one_process_at_a_time():
    with kernel(15) as (matrix, _), write_lock(place_of_factor(matrix, 0.0)[0]), pytest.raises(StoreLockedError):
        logdet(matrix, SETTINGS)


def test_a_disk_without_room_is_refused():
    with (
        kernel(15) as (matrix, _),
        mock.patch.object(LocalFolder, "free_bytes", 1000),
        pytest.raises(DiskSpaceError, match=r"no room for the factor: .* are needed and 1\.0 kB are free"),
    ):
        logdet(matrix, SETTINGS)


def test_the_plan_fits_the_memory():
    with kernel(3) as (matrix, _):
        matrix.num_rows = 20_000
        for megabytes in range(200, 5000, 100):
            plan = plan_factor(matrix, megabytes * 10**6)
            assert plan.panel_bytes < megabytes * 10**6
            assert plan.side % matrix.num_outputs == 0
            ideal = 4 * 20_000**3 / (3 * plan.panel_rows)
            if plan.panel_tiles < plan.num_blocks / 4:
                assert 0.7 < plan.bytes_read / ideal < 1.1
        assert plan.bytes_read == 0  # one panel holds all
        with pytest.raises(BudgetError, match=r"20,000 rows takes [\d,]+ MB .*Raise `memory_bytes`"):
            plan_factor(matrix, 90 * 10**6)


# products in place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routines", [(blas._GEMM, blas._TRSM), (None, None)], ids=["by address", "by SciPy"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 4), (1, 5, 2), (4, 4, 1), (7, 3, 5)])
def test_products_in_place(shape, routines):
    rows, cols, depth = shape
    rng = np.random.default_rng(0)
    with mock.patch.multiple(blas, _GEMM=routines[0], _TRSM=routines[1]):
        assert routines[0] is blas._GEMM
        for first in "CF":
            for second in "CF":
                whole = np.asfortranarray(rng.normal(size=(rows, cols + 4)))
                A = np.array(rng.normal(size=(rows, depth + 2)), order=first)[:, :depth]
                B, expected = np.array(rng.normal(size=(cols, depth)), order=second), whole.copy()
                blas.subtract_product(whole[:, 2 : 2 + cols], A, B)
                expected[:, 2 : 2 + cols] -= A @ B.T
                np.testing.assert_allclose(whole, expected, atol=1e-14)
        L = np.asfortranarray(np.tril(rng.normal(size=(depth, depth))) + 3 * np.eye(depth))
        X = np.asfortranarray(rng.normal(size=(rows, depth + 3)))
        expected = X[:, 1 : 1 + depth] @ np.linalg.inv(L).T
        blas.divide_right(X[:, 1 : 1 + depth], L)
        np.testing.assert_allclose(X[:, 1 : 1 + depth], expected, atol=1e-14)


def test_scipy_gives_the_addresses():
    assert blas._GEMM is not None
    assert blas._TRSM is not None


# warnings and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "warned"), [(0.02, False), (0.11, True)])
def test_it_warns_of_an_error_that_exceeds_the_smallest_eigenvalue(bound, warned):
    errors = certificate_of("float64", bound)
    with kernel(15, certificate=errors) as (matrix, K), cut(7, 2):
        found = logdet(matrix, SETTINGS)
        smallest = np.linalg.eigvalsh(K)[0]
        assert found.smallest_pivot > bound  # so that the eigenvalue is looked for
        assert smallest * (1 - 1e-9) <= found.smallest_eigenvalue_bound <= max(bound, 1.2 * smallest)
        assert bool(found.warnings) == warned
        if warned:
            assert f"‖E‖ ≤ {bound:g}" in found.warnings[0]


def test_it_warns_of_float16(capsys):
    errors = certificate_of("float16", 0.001)
    for certificate, said in ((None, "it has no certificate"), (errors, "‖E‖ ≤ 0.001")):
        with kernel(15, dtypes=("float16",), certificate=certificate) as (matrix, _):
            assert cli.run(["analyze", "logdet", matrix.name, "--json"]) == 0
            captured = capsys.readouterr()
            assert captured.err.startswith("Warning: The kernel at")
            assert "float16" in captured.err
            assert said in captured.err
            assert json.loads(captured.out)["sign"] == 1


@pytest.mark.parametrize("shift", [-1.0, float("nan"), float("inf")])
def test_a_shift_must_not_be_negative(shift, capsys):
    with kernel(3) as (matrix, _):
        with pytest.raises(InputError, match=r"A shift of .* expected a number that is not negative"):
            LogdetSettings(memory_bytes=MEMORY, shift=shift)
        assert cli.run(["analyze", "logdet", matrix.name, "--shift", str(shift)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_entry_that_is_not_finite_is_named():
    with kernel(15, tile_samples=5) as (matrix, _):
        matrix.store.group.store_path.store._read_only = False
        array = matrix.store.zarr_array("ntk_float64")
        values = array[20:30, 10:20]
        values[3, 3] = np.inf
        array[20:30, 10:20] = values
        array[10:20, 20:30] = values.T
        with pytest.raises(StoreError, match=r"is not finite in rows 20 to 29"):
            logdet(matrix, SETTINGS)


def test_missing_tiles_are_counted_and_a_leading_part_will_do(capsys):
    with kernel(15, tile_samples=5, layout="upper") as (matrix, K):
        (Path(matrix.name) / "ntk_float64/c/1/2").unlink()
        command = ["analyze", "logdet", matrix.name, "--json"]
        assert cli.run(command) == 2
        assert "expected 6 tiles, 1 are missing" in capsys.readouterr().err
        assert cli.run([*command, "--allow-partial"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["rows"] == 20
        assert found["logdet"] == pytest.approx(np.linalg.slogdet(K[:20, :20]).logabsdet, abs=1e-9)


def test_the_command_says_what_it_found(capsys):
    with kernel(15) as (matrix, K):
        command = [
            "analyze",
            "logdet",
            matrix.name,
            "--shift",
            "0.5",
            "--prefixes",
            "--memory",
            "4GB",
        ]
        assert cli.run([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {"store", "seconds", "peak_bytes", "logdet", "sign", "shift", "rows", "prefixes"} <= found.keys()
        assert found["logdet"] == pytest.approx(np.linalg.slogdet(K + 0.5 * np.eye(30)).logabsdet, abs=1e-9)
        assert (found["panel_rows"], found["bytes_read_planned"]) == (30, 0)
        assert cli.run([*command]) == 0
        page = capsys.readouterr().out
        for part in (
            f"{found['logdet']:.12g} nats",
            "K + 0.5 I",
            "1 of 30 rows; a panel takes ",
            "panels read 0 B",
            "30 rows",
        ):
            assert part in page


@pytest.mark.parametrize("assume", ["sym", "spd"])
def test_it_is_that_of_detkit(assume):
    pytest.importorskip("detkit", reason="detkit is not installed: pip install 'ntkgen[detkit]'")
    from test_detkit import SCRIPT

    with kernel(15, layout="upper") as (matrix, _):
        command = [sys.executable, "-c", SCRIPT, matrix.name, "ntk_float64", assume]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        expected, sign = json.loads(done.stdout.splitlines()[-1])
        found = logdet(matrix, SETTINGS)
        assert found["sign"] == sign
        assert found["logdet"] == pytest.approx(expected, abs=1e-10 * 30)
