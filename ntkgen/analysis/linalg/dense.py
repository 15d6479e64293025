"""All eigenvalues of a matrix in memory, computed by LAPACK. LAPACK reports no progress during its calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import scipy.linalg

from ntkgen.analysis.matrix import FloatArray
from ntkgen.progress import Report, ignore_report


def eigenvalues(
    K: FloatArray,  # (rows, rows), symmetric, in Fortran order; overwritten
    report: Report = ignore_report,
) -> FloatArray:  # (rows,), descending
    """Compute all eigenvalues in descending order.

    Costs 4/3 rows³ FLOPs. The memory bandwidth limits the speed of half of them.
    """
    with _announced(report, 4 / 3 * len(K) ** 3):
        values: FloatArray = scipy.linalg.eigvalsh(K, overwrite_a=True, check_finite=False)
    return values[::-1]


def eigenvalues_and_vectors(
    K: FloatArray,  # (rows, rows), symmetric, in Fortran order; overwritten
    report: Report = ignore_report,
) -> tuple[FloatArray, FloatArray]:  # (rows,), ascending; (rows, rows)
    """Compute all eigenvalues in ascending order, and the eigenvectors.

    Costs about 9 rows³ FLOPs, and holds 24 rows² bytes in memory.
    """
    with _announced(report, 9 * len(K) ** 3):
        values, vectors = scipy.linalg.eigh(K, overwrite_a=True, check_finite=False, driver="evd")
    return values, vectors


@contextmanager
def _announced(report: Report, flops: float) -> Iterator[None]:
    """Report the start of a LAPACK call, with its number of FLOPs, and its end."""
    report("eigenvalues", 0, 1, f"LAPACK, {flops / 1e9:,.0f} GFLOP, reports no progress during this call")
    yield
    report("eigenvalues", 1, 1)
