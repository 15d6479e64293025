"""Comparison of two kernels of the same samples: their distance, and the errors of the less precise one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.linalg

from ntkgen.analysis import defaults
from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.eigenvalues import SpectrumSettings, plan_sizes
from ntkgen.analysis.linalg.dense import eigenvalues
from ntkgen.analysis.linalg.krylov import EPSILON, Goal, Krylov, run
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left
from ntkgen.analysis.pairs import PairMoments, measure_pair
from ntkgen.analysis.products import Products, reading_bytes
from ntkgen.analysis.results import recall_or_compute
from ntkgen.errors import FingerprintError, InputError
from ntkgen.progress import Report, counter, ignore_report
from ntkgen.store.rounding import STORE_DTYPES

# Precisions in which a kernel may be computed, from the lowest to the highest.
PRECISIONS = ("bfloat16", "tf32", "float32", "float64-accumulate", "float64")
# Relative tolerance of the eigenvalues, and maximum number of passes, when the eigenvectors are computed out of core.
# The error of an eigenvector is of the order of the square root of this tolerance.
TOLERANCE, MAX_PASSES = 1e-12, 100


@dataclass(frozen=True)
class CompareSettings(Settings):
    """Settings of `compare`.

    Attributes:
        top: Number of the largest eigenvalues that are compared, with the space of their eigenvectors. None means 10.
    """

    top: int | None = None


@dataclass(frozen=True)
class Cost:
    """Errors of the less precise of two kernels of one network; see `_cost`.

    Attributes:
        lower: Path of the store with the less precise kernel.
        lower_dtype: Data type of the less precise kernel.
        frobenius_error: ‖E‖_F / ‖K‖_F, with E the difference of the kernels and K the more precise one.
        eigenvalue_error: Largest error of an eigenvalue, relative to the largest eigenvalue.
        relative_eigenvalue_error: Largest error of an eigenvalue, relative to that eigenvalue; None where one is zero.
        eigenvalues_compared: Number of eigenvalues that were compared.
        not_positive: Number of compared eigenvalues of the less precise kernel that are not positive.
        logdet: Log-determinant of the more precise kernel in nats; None unless all eigenvalues are known and positive.
        logdet_of_lower: Log-determinant of the less precise kernel in nats; None under the same condition.
        logdet_error: Difference of the two log-determinants in nats; None where one of them is None.
    """

    lower: str
    lower_dtype: str
    frobenius_error: float
    eigenvalue_error: float
    relative_eigenvalue_error: float | None
    eigenvalues_compared: int
    not_positive: int
    logdet: float | None
    logdet_of_lower: float | None
    logdet_error: float | None


@dataclass(frozen=True, kw_only=True)
class CompareAnswer(Answer):
    """Differences between two kernels K and L; K, the first one, is the reference.

    Attributes:
        distance: 1 − ⟨K, L⟩ / (‖K‖ ‖L‖); None if one of the kernels is zero.
        centered_alignment: Linear CKA (centred kernel alignment); None if one of the kernels is constant.
        principal_angles: Principal angles between the spaces of the top eigenvectors in radians, in descending order.
        angle_error: Upper bound on the error of each principal angle in radians.
        eigenvalues: Largest eigenvalues of L, in descending order.
        reference_eigenvalues: Largest eigenvalues of K, in descending order.
        eigenvalue_ratios: Eigenvalues of L divided by those of K; None if the eigenvalue of K is not positive.
        gaps: Gap of K and gap of L below the top eigenvalues, each relative to the smallest top eigenvalue; None if
            there are no other eigenvalues.
        cost: Errors of the less precise kernel; None unless both are of one network in two precisions.
        samples: Number of samples that the kernels share.
        samples_are_known: Whether both stores record the fingerprint of their samples.
        passes: Number of passes over the stored tiles of K and of L.
        reference: Path of the store with K.
        reference_dtype: Data type of K.
    """

    distance: float | None
    centered_alignment: float | None
    principal_angles: Sequence[float]
    angle_error: float
    eigenvalues: Sequence[float]
    reference_eigenvalues: Sequence[float]
    eigenvalue_ratios: Sequence[float | None]
    gaps: Sequence[float | None]
    cost: Cost | None
    samples: int
    samples_are_known: bool
    passes: Sequence[float]
    reference: str = ""
    reference_dtype: str = ""

    QUESTION: ClassVar[str] = "compare"
    VOLATILE: ClassVar[tuple[str, ...]] = ("reference", "reference_dtype")

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "CompareAnswer":
        """Build an answer from a saved dictionary."""
        cost = found["cost"]
        return super().from_json({**found, "cost": None if cost is None else Cost(**cost)})


def compare(
    first: Matrix, second: Matrix, settings: CompareSettings | None = None, *, report: Report = ignore_report
) -> CompareAnswer:
    """Compare the kernel K of one store with the kernel L of another store that has the same rows.

    The distance is 1 − ⟨K, L⟩ / (‖K‖ ‖L‖) with the Frobenius inner product. It is 0 if L is a positive multiple of K.
    The centred alignment is ⟨H K H, H L H⟩ / (‖H K H‖ ‖H L H‖) with H = I − 1 1ᵀ / N. This is linear CKA with rows in
    place of samples. It is 1 if L is a positive multiple of K plus a constant. Both numbers come from one pass over
    both kernels.

    The principal angles are the angles between two spaces. Each space is spanned by the eigenvectors of the ``top``
    largest eigenvalues of one kernel. The error bound of the angles is 0 if LAPACK computes the eigenvectors. The
    angles mean little if the gap below these eigenvalues, λ_k − λ_k₊₁ for k = ``top``, is small. The eigenvalue ratios
    are the eigenvalues of L divided by those of K.

    If both kernels are of one network in two precisions, the answer also has the errors of the less precise one
    (`_cost`). If the stores have tiles of different sizes, the smaller tiles may be read more than once.

    References:
        Fort et al. (2020), arXiv:2010.15110 (kernel distance).
        Kornblith, Norouzi, Lee, Hinton (2019), arXiv:1905.00414 (CKA).
        Cortes, Mohri, Rostamizadeh (2012), arXiv:1203.0550.
        Björck, Golub (1973), Numerical methods for computing angles between linear subspaces.

    Raises:
        FingerprintError: If the rows of the kernels are not of the same samples and outputs.
        InputError: If the kernels have fewer than ``top`` eigenvalues.
        BudgetError: If the memory limit is too small for two tiles of each kernel.
    """
    settings = settings or CompareSettings()
    _require_same_samples(first, second)
    rows = min(first.num_rows, second.num_rows)
    first, second = _leading(first, rows), _leading(second, rows)
    top = min(defaults.COMPARED_TOP, rows) if settings.top is None else settings.top
    if not 1 <= top <= rows:
        raise InputError(
            f"The kernels have no {top:,} eigenvalues: expected from 1 to their {rows:,} rows, found `top` {top:,}. "
            "Is another kernel meant? Lower `top`."
        )
    is_dense = _dense_bytes(first, second, top) <= memory_left(settings.memory_bytes)
    asked = {"top": top, "reference": reference_of(first), "is_dense": is_dense}

    def compute() -> CompareAnswer:
        return _compared(first, second, Pairing(top, settings.memory_bytes, is_dense), report)

    answer = recall_or_compute(second, CompareAnswer, asked, compute)
    return dataclasses.replace(answer, reference=first.name, reference_dtype=first.dtype)


def reference_of(first: Matrix) -> list[Any]:
    """Return the values that identify the reference kernel in a saved answer."""
    return [first.store.manifest.fingerprint, first.store.manifest.replanned, first.dtype, first.output]


@dataclass(frozen=True)
class Pairing:
    """Resolved settings of a comparison."""

    top: int
    memory_bytes: int | None
    is_dense: bool  # whether each of the two matrices fits in memory


def _dense_bytes(first: Matrix, second: Matrix, top: int) -> int:
    """Count the bytes for all eigenvalues and the top eigenvectors, if the kernels are treated one after the other."""
    rows = first.num_rows
    return 8 * rows * (rows + 2 * top + 128) + max(reading_bytes(first), reading_bytes(second))


def _compared(first: Matrix, second: Matrix, pairing: Pairing, report: Report) -> CompareAnswer:
    moments = measure_pair(first, second, pairing.memory_bytes, report)
    spaces = [_top_space(matrix, pairing, report) for matrix in (first, second)]
    top_values = [space.values for space in spaces]
    cost = None
    if _is_one_network(first, second):
        values = [_all_eigenvalues(matrix, report) for matrix in (first, second)] if pairing.is_dense else top_values
        logdets = [_logdet(value) if pairing.is_dense else None for value in values]
        cost = _cost((first, second), moments, values, logdets)
    return CompareAnswer(
        distance=moments.distance,
        centered_alignment=moments.centered_alignment,
        principal_angles=_angles(spaces[0].vectors, spaces[1].vectors),
        angle_error=sum(space.error for space in spaces),
        eigenvalues=top_values[1].tolist(),
        reference_eigenvalues=top_values[0].tolist(),
        eigenvalue_ratios=[float(b / a) if a > 0 else None for a, b in zip(*top_values, strict=True)],
        gaps=[space.gap for space in spaces],
        cost=cost,
        samples=first.num_samples,
        samples_are_known=all("samples" in matrix.store.manifest.identity for matrix in (first, second)),
        passes=[round(matrix.passes, 3) for matrix in (first, second)],
    )


# same samples ---------------------------------------------------------------------------------------------------------


def _require_same_samples(first: Matrix, second: Matrix) -> None:
    """Refuse two kernels whose rows differ.

    Raises:
        FingerprintError: If their rows differ.
    """
    if differing := _differences(first, second):
        name, mine, other = differing[0]
        raise FingerprintError(
            f"The kernels at {first.name} and {second.name} are of different rows: expected the same {name}, found "
            f"{str(mine)[:16]} and {str(other)[:16]}. Are they of other subsamples, orders, data or outputs? Compute "
            "both of the same data set, samples, order and output."
        )


def _differences(first: Matrix, second: Matrix) -> list[tuple[str, Any, Any]]:
    """List the properties in which the rows of two kernels differ, with both values.

    A property that is missing in one of the stores is skipped, since an imported kernel may lack it.
    """
    stores = first.store, second.store
    grids, manifests = [store.grid for store in stores], [store.manifest for store in stores]
    pairs: list[tuple[str, list[Any]]] = [
        ("number of samples", [grid.num_samples for grid in grids]),
        ("number of rows per sample", [grid.num_outputs for grid in grids]),
        ("data set", [manifest.provenance.dataset for manifest in manifests]),
        ("samples, by their fingerprint", [manifest.identity.get("samples") for manifest in manifests]),
    ]
    if grids[0].num_outputs > 1:
        pairs.append(("output map", [manifest.identity.get("output") for manifest in manifests]))
    differing = [(name, a, b) for name, (a, b) in pairs if a != b and a is not None and b is not None]
    if not differing:
        arrays = [(name, [store.read(name) for store in stores]) for name in ("sample_index", "row_label")]
        is_labelled = all((labels >= 0).all() for labels in arrays[1][1])
        compared = arrays[: 1 + is_labelled]
        differing = [(name, "some", "others") for name, (a, b) in compared if not np.array_equal(a, b)]
    return differing


def _leading(matrix: Matrix, num_rows: int) -> Matrix:
    """Return a view of the leading part with this number of rows."""
    if num_rows == matrix.num_rows:
        return matrix
    return dataclasses.replace(matrix, num_rows=num_rows, view=matrix.view.leading(num_rows))


# eigenspaces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """The largest eigenvalues and their eigenvectors."""

    values: FloatArray  # (top,), descending
    vectors: FloatArray  # (rows, top)
    gap: float | None  # (λ_top − λ_top₊₁) / |λ_top|; None where there is no λ_top₊₁
    error: float = 0.0  # bound on the angle between this space and the true one, in radians


def _top_space(matrix: Matrix, pairing: Pairing, report: Report) -> Space:
    if not pairing.is_dense:
        return _krylov_space(matrix, pairing, report)
    K = matrix.dense(step=counter(report, "matrix", 0, matrix.num_tiles))
    indices = [max(0, len(K) - pairing.top - 1), len(K) - 1]
    values, vectors = scipy.linalg.eigh(K, overwrite_a=True, check_finite=False, subset_by_index=indices)
    return _space(values[::-1], vectors[:, ::-1], pairing.top, 0.0)


def _krylov_space(matrix: Matrix, pairing: Pairing, report: Report) -> Space:
    """Compute the space from products with the stored tiles.

    The error of an angle is at most ‖residuals‖ / gap (Davis, Kahan 1970).
    """
    count = min(pairing.top + 1, matrix.num_rows)
    settings = SpectrumSettings(count, TOLERANCE, MAX_PASSES, memory_bytes=pairing.memory_bytes)
    krylov = Krylov(Products(matrix, report), plan_sizes(matrix, settings))
    run(krylov, Goal(count, TOLERANCE, MAX_PASSES))
    values, S = krylov.ritz(count)
    residual = float(np.linalg.norm(krylov.residuals(S[:, : pairing.top])))
    return _space(values, krylov.vectors(S), pairing.top, residual)


def _space(values: FloatArray, vectors: FloatArray, top: int, residual: float) -> Space:
    """Keep the ``top`` first eigenvectors; the eigenvalue after them, if there is one, gives the gap."""
    if len(values) <= top:
        return Space(values, vectors, None)
    gap = float(values[top - 1] - values[top])
    error = 0.0 if residual == 0 else math.asin(min(1.0, residual / gap if gap > 0 else math.inf))
    return Space(values[:top], vectors[:, :top], gap / abs(float(values[top - 1]) or 1.0), error)


def _angles(first: FloatArray, second: FloatArray) -> list[float]:
    angles: list[float] = scipy.linalg.subspace_angles(first, second).tolist()
    return angles


# errors of the lower precision ----------------------------------------------------------------------------------------


def _is_one_network(first: Matrix, second: Matrix) -> bool:
    """Return whether both kernels have the same parameters and outputs but different precisions."""
    identity, other = (matrix.store.manifest.identity for matrix in (first, second))
    is_same = all(identity.get(name) == other.get(name) for name in ("parameters", "output"))
    is_known, is_one_output = "parameters" in identity, first.output == second.output
    return is_same and is_known and is_one_output and _precision(first) != _precision(second)


def _precision(matrix: Matrix) -> tuple[int, int]:
    """Rank a kernel by its stored data type, then by the precision of its computation."""
    name = matrix.store.manifest.identity.get("precision", "")
    return STORE_DTYPES.index(matrix.dtype), PRECISIONS.index(name) if name in PRECISIONS else -1


def _cost(
    pair: tuple[Matrix, Matrix], moments: PairMoments, values: list[FloatArray], all_logdets: list[float | None]
) -> Cost:
    """Measure the errors of the less precise kernel: of its entries, its eigenvalues and its log-determinant.

    Let K be the more precise kernel, λ its eigenvalues, E the difference of the kernels and Δλ the differences of their
    eigenvalues. The errors are ‖E‖_F / ‖K‖_F, max |Δλ| / max |λ| and max |Δλ| / |λ|. ‖E‖_F bounds every |Δλ| (Hoffman,
    Wielandt 1953). If the matrices fit in memory, all eigenvalues are compared, and the log-determinants too. Otherwise
    only the largest eigenvalues are compared.
    """
    low, high = (0, 1) if _precision(pair[0]) < _precision(pair[1]) else (1, 0)
    logdet, other = all_logdets[high], all_logdets[low]
    errors, sizes = np.abs(values[low] - values[high]), np.abs(values[high])
    return Cost(
        lower=pair[low].name,
        lower_dtype=pair[low].dtype,
        frobenius_error=math.sqrt(moments.difference / (float(moments.squares[high]) or 1.0)),
        eigenvalue_error=float(errors.max() / (sizes.max() or 1.0)),
        relative_eigenvalue_error=float((errors / sizes).max()) if sizes.all() else None,
        eigenvalues_compared=len(errors),
        not_positive=int((values[low] <= 0).sum()),
        logdet=logdet,
        logdet_of_lower=other,
        logdet_error=None if logdet is None or other is None else other - logdet,
    )


def _all_eigenvalues(matrix: Matrix, report: Report) -> FloatArray:
    K = matrix.dense(step=counter(report, "matrix", 0, matrix.num_tiles))
    return eigenvalues(K, report)


def _logdet(values: FloatArray) -> float | None:
    """Sum the logarithms of descending eigenvalues; return None where the smallest is not positive beyond rounding."""
    limit = len(values) * EPSILON * float(np.abs(values).max())
    return float(np.log(values).sum()) if values[-1] > limit else None
