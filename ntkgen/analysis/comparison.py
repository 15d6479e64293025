"""Two kernels of the same samples: how far they are from each other, and what the less precise one costs."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from ntkgen.analysis.alignment import centered_product, ratio
from ntkgen.analysis.eigenvalues import Products, SpectrumSettings, plan_sizes, reading_bytes
from ntkgen.analysis.linalg.dense import eigenvalues
from ntkgen.analysis.linalg.krylov import EPSILON, Goal, Krylov, run
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left, require_memory
from ntkgen.analysis.passes import Arrays, fold
from ntkgen.analysis.results import remembered
from ntkgen.errors import FingerprintError, InputError
from ntkgen.progress import Report, Step, counter, ignore_report, ignore_step
from ntkgen.store.rounding import STORE_DTYPES
from ntkgen.store.view import Place, read_ahead

# The precisions that a kernel may be computed in, the least first.
PRECISIONS = ("bfloat16", "tf32", "float32", "float64-accumulate", "float64")
# Eigenvectors whose space is compared, where no number is given.
USUAL_TOP = 10
# Rows that are subtracted at a time.
SLAB_ROWS = 256
# Of the eigenvalues whose eigenvectors span what is compared, out of core; errors of the vectors are of its root.
TOLERANCE, MAX_PASSES = 1e-12, 100
# A stage reads two tiles in float64 while it works on two others, and holds what they were stored as.
TILES_HELD = 8


def compare(
    first: Matrix, second: Matrix, top: int | None, memory_bytes: int | None = None, report: Report = ignore_report
) -> dict[str, Any]:
    """Compare the kernel K of one store with the kernel L of another, row by row, in one pass over both.

    The distance is 1 − ⟨K, L⟩ / (‖K‖ ‖L‖), of the Frobenius inner product: 0 where L is a multiple of K. The centred
    alignment is ⟨H K H, H L H⟩ / (‖H K H‖ ‖H L H‖) with H = I − 1 1ᵀ / N, 1 where L is a multiple of K but for a
    constant: linear CKA, of rows in place of samples. The principal angles are those between the spaces of the
    eigenvectors with the ``top`` largest eigenvalues, the largest first, in radians, with a bound of their error where
    the vectors are not those of LAPACK; they say little where the gap below these eigenvalues, λ_k − λ_k₊₁, is small.
    The eigenvalue ratios are those of L over those of K. Two kernels of one network in two precisions are also told
    apart by their errors (`_cost`). Where tiles have different sides, those of the smaller one are read more than once.

    References:
        Fort et al. (2020), arXiv:2010.15110 (kernel distance).
        Kornblith, Norouzi, Lee, Hinton (2019), arXiv:1905.00414 (CKA).
        Cortes, Mohri, Rostamizadeh (2012), arXiv:1203.0550.
        Björck, Golub (1973), Numerical methods for computing angles between linear subspaces.

    Raises:
        FingerprintError: If their rows are not of the same samples and outputs.
        InputError: If there are not as many eigenvalues.
        BudgetError: If the memory is too small for two tiles of each.
    """
    _require_same_samples(first, second)
    rows = min(first.num_rows, second.num_rows)
    first, second = _leading(first, rows), _leading(second, rows)
    top = min(USUAL_TOP, rows) if top is None else top
    if not 1 <= top <= rows:
        raise InputError(
            f"The kernels have no {top:,} eigenvalues: expected from 1 to their {rows:,} rows, found --top {top:,}. "
            "Is another kernel meant? Lower --top."
        )
    is_dense = _dense_bytes(first, second, top) <= memory_left(memory_bytes)
    identity = [first.store.manifest.fingerprint, first.store.manifest.replanned, first.dtype, first.output]
    settings = {"top": top, "reference": identity, "is_dense": is_dense}

    def compute() -> dict[str, Any]:
        return _compared(first, second, Pairing(top, memory_bytes, is_dense), report)

    result = remembered(second, "compare", settings, compute)
    return {**result, "reference": first.name, "reference_dtype": first.dtype}


@dataclass(frozen=True)
class Pairing:
    """How two kernels are compared."""

    top: int
    memory_bytes: int | None
    is_dense: bool  # whether each of them fits in memory


def _dense_bytes(first: Matrix, second: Matrix, top: int) -> int:
    """Count what all eigenvalues and the top eigenvectors of one after the other take."""
    rows = first.num_rows
    return 8 * rows * (rows + 2 * top + 128) + max(reading_bytes(first), reading_bytes(second))


def _compared(first: Matrix, second: Matrix, pairing: Pairing, report: Report) -> dict[str, Any]:
    moments = _moments(first, second, pairing.memory_bytes, report)
    spaces = [_top_space(matrix, pairing, report) for matrix in (first, second)]
    known = [space.values for space in spaces]
    cost = None
    if _is_one_network(first, second):
        values = [_all_eigenvalues(matrix, report) for matrix in (first, second)] if pairing.is_dense else known
        logdets = [_logdet(value) if pairing.is_dense else None for value in values]
        cost = _cost((first, second), moments, values, logdets)
    return {
        "distance": moments.distance,
        "centered_alignment": moments.centered_alignment,
        "principal_angles": _angles(spaces[0].vectors, spaces[1].vectors),
        "angle_error": sum(space.error for space in spaces),
        "eigenvalues": known[1].tolist(),
        "reference_eigenvalues": known[0].tolist(),
        "eigenvalue_ratios": [float(b / a) if a > 0 else None for a, b in zip(*known, strict=True)],
        "gaps": [space.gap for space in spaces],
        "cost": cost,
        "samples": first.num_samples,
        "samples_are_known": all("samples" in matrix.store.manifest.identity for matrix in (first, second)),
        "passes": [round(matrix.passes, 3) for matrix in (first, second)],
    }


# which samples --------------------------------------------------------------------------------------------------------


def _require_same_samples(first: Matrix, second: Matrix) -> None:
    """Refuse kernels whose rows are not the same.

    Raises:
        FingerprintError: If they are not.
    """
    if differing := _differences(first, second):
        name, mine, other = differing[0]
        raise FingerprintError(
            f"The kernels at {first.name} and {second.name} are of different rows: expected the same {name}, found "
            f"{str(mine)[:16]} and {str(other)[:16]}. Are they of other subsamples, orders, data or outputs? Compute "
            "both with the same data set, --subsample, --shuffle-seed and --output."
        )


def _differences(first: Matrix, second: Matrix) -> list[tuple[str, Any, Any]]:
    """Name what the rows of two kernels do not share, with both values; of imported ones less is known."""
    stores = first.store, second.store
    grids, manifests = [store.grid for store in stores], [store.manifest for store in stores]
    pairs: list[tuple[str, list[Any]]] = [
        ("number of samples", [grid.num_samples for grid in grids]),
        ("number of rows per sample", [grid.num_outputs for grid in grids]),
        ("data set", [manifest.provenance.get("dataset") for manifest in manifests]),
        ("samples, by their fingerprint", [manifest.identity.get("samples") for manifest in manifests]),
    ]
    if grids[0].num_outputs > 1:
        pairs.append(("output map", [manifest.identity.get("output") for manifest in manifests]))
    found = [(name, a, b) for name, (a, b) in pairs if a != b and a is not None and b is not None]
    if not found:
        arrays = [(name, [store.read(name) for store in stores]) for name in ("sample_index", "row_label")]
        is_labelled = all((labels >= 0).all() for labels in arrays[1][1])
        found += [(name, "some", "others") for name, (a, b) in arrays[: 1 + is_labelled] if not np.array_equal(a, b)]
    return found


def _leading(matrix: Matrix, num_rows: int) -> Matrix:
    """View the first rows alone."""
    if num_rows == matrix.num_rows:
        return matrix
    return dataclasses.replace(matrix, num_rows=num_rows, view=matrix.view.leading(num_rows))


# one pass over both ---------------------------------------------------------------------------------------------------


@dataclass
class PairMoments:
    """Sums over the entries of two kernels K and L."""

    row_sums: FloatArray  # (2, rows)
    squares: FloatArray  # (2,), ‖K‖², ‖L‖²
    inner: float = 0.0  # ⟨K, L⟩
    difference: float = 0.0  # ‖K − L‖²
    change: float = 0.0  # ⟨K − L, K + L⟩

    @classmethod
    def of(
        cls, places: Sequence[Place], first: Matrix, second: Matrix, side: int, step: Step = ignore_step
    ) -> "PairMoments":
        """Sum over parts of both, of ``side`` rows and columns, each of which is read once."""
        moments = cls(np.zeros((2, first.num_rows)), np.zeros(2))
        for rows, cols, pair in _pairs(places, first, second, side):
            moments.add(rows, cols, *pair)
            step()
        return moments

    def add(self, rows: slice, cols: slice, K: FloatArray, L: FloatArray) -> None:
        """Add what two parts above the diagonal, or one on it, say of both triangles."""
        count = 1 if rows == cols else 2
        self.inner += count * float(np.vdot(K, L))
        self.squares += [count * float(np.vdot(M, M)) for M in (K, L)]
        for start in range(0, len(K), SLAB_ROWS):
            slab = slice(start, start + SLAB_ROWS)
            minus = K[slab] - L[slab]
            self.difference += count * float(np.vdot(minus, minus))
            self.change += count * float(np.vdot(minus, K[slab] + L[slab]))
        for sums, M in zip(self.row_sums, (K, L), strict=True):
            sums[rows] += M.sum(1)
            if rows != cols:
                sums[cols] += M.sum(0)

    @property
    def distance(self) -> float | None:
        """1 − ⟨K, L⟩ / (‖K‖ ‖L‖), with as many digits as the numbers have where K and L are close.

        With g = ‖K‖ − ‖L‖ = ⟨K − L, K + L⟩ / (‖K‖ + ‖L‖) it is (‖K − L‖² − g²) / (2 ‖K‖ ‖L‖).
        """
        norms = [math.sqrt(square) for square in self.squares]
        if not all(norms):
            return None
        if self.difference > self.squares[0] / 4:  # far apart, or of other sizes
            return 1 - self.inner / norms[0] / norms[1]
        gap = self.change / sum(norms)
        return max(0.0, self.difference - gap**2) / (2 * norms[0] * norms[1])

    @property
    def centered_alignment(self) -> float | None:
        """⟨H K H, H L H⟩ / (‖H K H‖ ‖H L H‖); None where one of them is rounding alone."""
        rows, means = self.row_sums.shape[1], self.row_sums / self.row_sums.shape[1]
        squares = [centered_product(square, r, r) for square, r in zip(self.squares, means, strict=True)]
        limits = [4 * rows * EPSILON * square for square in self.squares]
        kept = [0.0 if square <= limit else square for square, limit in zip(squares, limits, strict=True)]
        return ratio(centered_product(self.inner, *means), *kept)


def _moments(first: Matrix, second: Matrix, memory_bytes: int | None, report: Report) -> PairMoments:
    side = max(first.side, second.side)
    require_memory("two tiles of each kernel", 8 * TILES_HELD * min(side, first.num_rows) ** 2, memory_bytes)
    blocks = -(-first.num_rows // side)
    places = [(row, col) for row in range(blocks) for col in range(row, blocks)]
    step = counter(report, "compared", 0, len(places))
    if first.client is None:
        return PairMoments.of(places, first, second, side, step)
    for row, col in places:
        _count(first, second, (_span(first, side, row), _span(first, side, col)))
    sums = fold(first.client, _measured, places, (first.carried, second.carried, side), step)
    return PairMoments(sums[0], sums[1], *(float(value) for value in sums[2]))


def _measured(places: Sequence[Place], first: Matrix, second: Matrix, side: int) -> Arrays:
    """Measure some parts of both, on a worker."""
    found = PairMoments.of(places, first, second, side)
    return found.row_sums, found.squares, np.array([found.inner, found.difference, found.change])


def _pairs(
    places: Sequence[Place], first: Matrix, second: Matrix, side: int
) -> Iterator[tuple[slice, slice, FloatArray]]:
    """Read the same parts of both, those of the larger tiles; the next of them in a thread meanwhile."""

    def read(place: Place) -> FloatArray:  # (2, rows, cols)
        rows, cols = (_span(first, side, block) for block in place)
        pair = np.empty((2, rows.stop - rows.start, cols.stop - cols.start))
        for values, matrix in zip(pair, (first, second), strict=True):
            values[...] = matrix.view[rows, cols]
        return pair

    for (row, col), pair in read_ahead(read, places, 1):
        spans = _span(first, side, row), _span(first, side, col)
        _count(first, second, spans)
        yield *spans, pair


def _span(matrix: Matrix, side: int, block: int) -> slice:
    return slice(block * side, min((block + 1) * side, matrix.num_rows))


def _count(first: Matrix, second: Matrix, spans: tuple[slice, slice]) -> None:
    """Count the stored tiles that a part of both is read from."""
    for matrix in (first, second):
        matrix.tiles_read += _spanned(spans[0], matrix.side) * _spanned(spans[1], matrix.side)


def _spanned(span: slice, side: int) -> int:
    return -(-int(span.stop) // side) - int(span.start) // side


# eigenspaces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """The eigenvectors with the largest eigenvalues."""

    values: FloatArray  # (top,), descending
    vectors: FloatArray  # (rows, top)
    gap: float | None  # relative to the last, what lies between it and the next; None where there is no next
    error: float = 0.0  # of an angle with the true space


def _top_space(matrix: Matrix, pairing: Pairing, report: Report) -> Space:
    if not pairing.is_dense:
        return _krylov_space(matrix, pairing, report)
    K = matrix.dense(step=counter(report, "matrix", 0, matrix.num_tiles))
    wanted = [max(0, len(K) - pairing.top - 1), len(K) - 1]
    values, vectors = scipy.linalg.eigh(K, overwrite_a=True, check_finite=False, subset_by_index=wanted)
    return _space(values[::-1], vectors[:, ::-1], pairing.top, 0.0)


def _krylov_space(matrix: Matrix, pairing: Pairing, report: Report) -> Space:
    """Find the space on products with the stored tiles; an angle is off by ‖residuals‖ / gap (Davis, Kahan 1970)."""
    count = min(pairing.top + 1, matrix.num_rows)
    settings = SpectrumSettings(count, TOLERANCE, MAX_PASSES, memory_bytes=pairing.memory_bytes)
    krylov = Krylov(Products(matrix, report), plan_sizes(matrix, settings))
    run(krylov, Goal(count, TOLERANCE, MAX_PASSES))
    values, S = krylov.ritz(count)
    residual = float(np.linalg.norm(krylov.residuals(S[:, : pairing.top])))
    return _space(values, krylov.vectors(S), pairing.top, residual)


def _space(values: FloatArray, vectors: FloatArray, top: int, residual: float) -> Space:
    """Cut the first eigenvectors off one more, which says how far they are from the others."""
    if len(values) <= top:
        return Space(values, vectors, None)
    gap = float(values[top - 1] - values[top])
    error = 0.0 if residual == 0 else math.asin(min(1.0, residual / gap if gap > 0 else math.inf))
    return Space(values[:top], vectors[:, :top], gap / abs(float(values[top - 1]) or 1.0), error)


def _angles(first: FloatArray, second: FloatArray) -> list[float]:
    angles: list[float] = scipy.linalg.subspace_angles(first, second).tolist()
    return angles


# what a lower precision costs -----------------------------------------------------------------------------------------


def _is_one_network(first: Matrix, second: Matrix) -> bool:
    """Say whether both are of one network's parameters and outputs, in two precisions."""
    mine, other = (matrix.store.manifest.identity for matrix in (first, second))
    is_same = all(mine.get(name) == other.get(name) for name in ("parameters", "output"))
    return (
        is_same and "parameters" in mine and first.output == second.output and _precision(first) != _precision(second)
    )


def _precision(matrix: Matrix) -> tuple[int, int]:
    """Rank what a kernel was stored in, and computed in."""
    name = matrix.store.manifest.identity.get("precision", "")
    return STORE_DTYPES.index(matrix.dtype), PRECISIONS.index(name) if name in PRECISIONS else -1


def _cost(
    pair: tuple[Matrix, Matrix], moments: PairMoments, values: list[FloatArray], all_logdets: list[float | None]
) -> dict[str, Any]:
    """Say what the lower of two precisions costs: errors of the matrix, its eigenvalues and its log-determinant.

    With λ the eigenvalues of the more precise kernel K, and E the difference: ‖E‖_F / ‖K‖_F, which times ‖K‖_F bounds
    all differences of eigenvalues (Hoffman, Wielandt 1953), max |Δλ| / λ₁ and max |Δλ| / |λ|; of all eigenvalues where
    they fit in memory, and then the log-determinants too, otherwise of the largest.
    """
    low, high = (0, 1) if _precision(pair[0]) < _precision(pair[1]) else (1, 0)
    logdet, other = all_logdets[high], all_logdets[low]
    errors, sizes = np.abs(values[low] - values[high]), np.abs(values[high])
    return {
        "lower": pair[low].name,
        "lower_dtype": pair[low].dtype,
        "frobenius_error": math.sqrt(moments.difference / (float(moments.squares[high]) or 1.0)),
        "eigenvalue_error": float(errors.max() / (sizes.max() or 1.0)),
        "relative_eigenvalue_error": float((errors / sizes).max()) if sizes.all() else None,
        "eigenvalues_compared": len(errors),
        "not_positive": int((values[low] <= 0).sum()),
        "logdet": logdet,
        "logdet_of_lower": other,
        "logdet_error": None if logdet is None or other is None else other - logdet,
    }


def _all_eigenvalues(matrix: Matrix, report: Report) -> FloatArray:
    K = matrix.dense(step=counter(report, "matrix", 0, matrix.num_tiles))
    return eigenvalues(K, report)


def _logdet(values: FloatArray) -> float | None:
    """Add up logarithms; None where an eigenvalue is not positive, beyond rounding."""
    limit = len(values) * EPSILON * float(np.abs(values).max())
    return float(np.log(values).sum()) if values[-1] > limit else None
