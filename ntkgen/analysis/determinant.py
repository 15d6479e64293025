"""The log-determinant of a kernel, exact and out of core, with those of all its leading principal blocks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkgen.analysis.linalg.cholesky import FactorSettings, Work, factored
from ntkgen.analysis.linalg.factor import Factor, FactorPlan, place_of_factor, prefix_logdets, remove_folder
from ntkgen.analysis.linalg.indefinite import examined
from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.analysis.results import remembered
from ntkgen.files.lock import write_lock
from ntkgen.progress import Report, ignore_report

# Of the subspace in which the smallest eigenvalue is looked for.
VECTORS, ITERATIONS = 8, 3
# Rounded to these, a number has an error that is felt in every small eigenvalue.
COARSE = ("float16", "bfloat16")
PREFIX_KEYS = ("prefixes", "prefix_rows", "prefix_signs")


def logdet(
    matrix: Matrix, settings: FactorSettings, *, prefixes: bool = False, report: Report = ignore_report
) -> dict[str, Any]:
    """Compute log |det(K + λI)| and its sign, by a Cholesky factor on disk; or by LDLᵀ, if the settings say so.

    ``prefixes`` are those of the leading principal blocks of ``prefix_rows`` rows: of every number of rows where the
    kernel is positive definite, else of those at which a tile of the factor ends. Costs N³/3 FLOPs; see `factored`.

    Raises:
        NotPositiveError: If a pivot is not positive, and must be; or LDLᵀ cannot be trusted.
    """
    keeping = dataclasses.replace(settings, keep=True)

    def compute() -> dict[str, Any]:
        with factored(matrix, keeping, report) as (factor, work):
            return _measured(matrix, settings, (factor, work), report)

    asked = {"shift": float(settings.shift), "indefinite": settings.indefinite}
    result = remembered(matrix, "logdet", asked, compute)
    if settings.keep and result["remembered"]:
        with factored(matrix, keeping, report):
            pass
    elif not settings.keep and not result["remembered"]:  # only now that the result is on the disk
        remove_factor(matrix, settings.shift)
    return result if prefixes else {name: value for name, value in result.items() if name not in PREFIX_KEYS}


def remove_factor(matrix: Matrix, shift: float) -> None:
    """Remove the factor of K + λI, if there is one."""
    folder, _ = place_of_factor(matrix, shift)
    with write_lock(folder):
        remove_folder(folder)


def _measured(matrix: Matrix, settings: FactorSettings, made: tuple[Factor, Work], report: Report) -> dict[str, Any]:
    factor, work = made
    pivots = factor.pivots()
    of_blocks = _prefixes(pivots, factor.plan)
    result = {
        "logdet": of_blocks["prefixes"][-1],
        "sign": of_blocks["prefix_signs"][-1],
        "shift": float(settings.shift),
        "logdet_per_row": of_blocks["prefixes"][-1] / len(pivots),
        "inertia": {"positive": int((pivots > 0).sum()), "negative": int((pivots < 0).sum())},
        "smallest_pivot": float(np.abs(pivots).min()),
        **_planned(factor.plan),
        "gflops": _speed(factor.plan, work),
        "error_norm": matrix.error_norm,
        **of_blocks,
    }
    if settings.indefinite:
        result |= examined(matrix, factor, settings.shift, report)
    smallest = _smallest_eigenvalue(matrix, factor, pivots)
    return {**result, "smallest_eigenvalue_bound": smallest, "warnings": warnings_of(matrix, pivots, smallest)}


def _prefixes(pivots: FloatArray, plan: FactorPlan) -> dict[str, list[Any]]:
    """List the log-determinants of leading blocks, where they are known: not inside tiles that were pivoted."""
    every, signs = prefix_logdets(pivots), np.cumprod(np.sign(pivots))
    is_positive = bool((pivots > 0).all())
    rows = np.arange(1, len(pivots) + 1) if is_positive else [plan.rows(block).stop for block in range(plan.num_blocks)]
    at = np.asarray(rows) - 1
    return {
        "prefixes": every[at].tolist(),
        "prefix_rows": (at + 1).tolist(),
        "prefix_signs": signs[at].astype(int).tolist(),
    }


def _planned(plan: FactorPlan) -> dict[str, Any]:
    return {
        "tile_rows": plan.side,
        "panel_rows": plan.panel_rows,
        "panels": -(-plan.num_blocks // plan.panel_tiles),
        "bytes_kept_planned": plan.panel_bytes,
        "bytes_read_planned": plan.bytes_read,
        "factor_bytes": plan.factor_bytes,
    }


def _speed(plan: FactorPlan, work: Work) -> float | None:
    """Say at how many GFLOP/s this process has worked; None where it found the factor there."""
    fraction = work.products / plan.num_products if plan.num_products else 1.0
    return fraction * plan.num_rows**3 / 3 / work.seconds / 1e9 if fraction else None


def _smallest_eigenvalue(matrix: Matrix, factor: Factor, pivots: FloatArray) -> float | None:
    """Bound the smallest eigenvalue of a positive definite K + λI from above, so closely that its error is judged.

    No pivot is below it. Where these do not settle whether ‖E‖ reaches it, or no ‖E‖ is known, it is at most the
    reciprocal of a Ritz value of the inverse, by a few steps of subspace iteration on the factor.
    """
    if (pivots < 0).any():
        return None
    bound, limit = float(pivots.min()), matrix.error_norm
    if limit is None or bound <= limit:
        return bound
    X = np.random.default_rng(0).standard_normal((len(pivots), min(VECTORS, len(pivots))))
    for _ in range(ITERATIONS):
        Q = np.linalg.qr(X)[0]
        X = factor.solve(Q)
        bound = min(bound, 1 / float(np.linalg.eigvalsh(Q.T @ X)[-1]))
        if bound <= limit:
            break
    return bound


def warnings_of(matrix: Matrix, pivots: FloatArray, smallest: float | None) -> list[str]:
    """Say what of a log-determinant is not to be trusted."""
    norm, precision = matrix.error_norm, matrix.store.manifest.plan.precision
    known = (
        "it has no certificate, so that its error is not known"
        if norm is None
        else f"its certificate bounds the error of every eigenvalue by ‖E‖ ≤ {norm:.3g}, with 95 % confidence"
    )
    found = []
    if coarse := [name for name in (matrix.dtype, precision) if name in COARSE]:
        found.append(f"The kernel at {matrix.name} is of {' and '.join(coarse)} numbers; {known}.")
    negative = int((pivots < 0).sum())
    if negative:
        found.append(
            f"The kernel at {matrix.name} has {negative:,} negative eigenvalues, which the true one has not: they, and "
            f"as many small ones, are errors; {known}."
        )
    if norm is not None and smallest is not None and norm >= smallest:
        found.append(
            f"The error of the kernel at {matrix.name} may exceed its smallest eigenvalue: {known}, and the smallest "
            f"eigenvalue is at most {smallest:.3g}. The log-determinant is that of the stored numbers alone."
        )
    return found


def samples_of(
    result: dict[str, Any], num_outputs: int
) -> tuple[Sequence[int], Sequence[float]]:  # samples, log-determinants
    """Pick the prefixes that are of whole samples."""
    pairs = [
        (rows // num_outputs, value)
        for rows, value in zip(result["prefix_rows"], result["prefixes"], strict=True)
        if rows % num_outputs == 0
    ]
    return [samples for samples, _ in pairs], [value for _, value in pairs]
