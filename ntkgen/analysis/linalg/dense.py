"""All eigenvalues of a matrix in memory, by LAPACK, which tells nobody how far it has come."""

from collections.abc import Iterator
from contextlib import contextmanager

import scipy.linalg

from ntkgen.analysis.matrix import FloatArray
from ntkgen.progress import Report, ignore_report


def eigenvalues(
    K: FloatArray,  # (rows, rows), symmetric, in Fortran's order; overwritten
    report: Report = ignore_report,
) -> FloatArray:  # (rows,), descending
    """Compute all eigenvalues. Costs 4/3 rows³ FLOPs, half of them bound by memory."""
    with _told(report, 4 / 3 * len(K) ** 3):
        values: FloatArray = scipy.linalg.eigvalsh(K, overwrite_a=True, check_finite=False)
    return values[::-1]


def eigenvalues_and_vectors(
    K: FloatArray,  # (rows, rows), symmetric, in Fortran's order; overwritten
    report: Report = ignore_report,
) -> tuple[FloatArray, FloatArray]:  # (rows,), ascending; (rows, rows)
    """Compute all eigenvalues and eigenvectors. Costs about 9 rows³ FLOPs, and holds 24 rows² bytes."""
    with _told(report, 9 * len(K) ** 3):
        values, vectors = scipy.linalg.eigh(K, overwrite_a=True, check_finite=False, driver="evd")
    return values, vectors


@contextmanager
def _told(report: Report, flops: float) -> Iterator[None]:
    """Tell that LAPACK is at work, and how much it is."""
    report("eigenvalues", 0, 1, f"LAPACK, {flops / 1e9:,.0f} GFLOP, of which it tells no progress")
    yield
    report("eigenvalues", 1, 1)
