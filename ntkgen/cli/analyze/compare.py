"""`ntkgen analyze compare`: differences between kernels of the same samples."""

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from ntkgen.analysis import defaults
from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import Command, top_option

if TYPE_CHECKING:
    from ntkgen.analysis.comparison import CompareAnswer, Cost
    from ntkgen.analysis.matrix import Matrix

# Maximum number of printed angles and ratios.
LISTED = 5


@click.command(cls=Command, short_help="Distance, CKA, angles and ratios of kernels.")
@click.argument("paths", nargs=-1, required=True)
@top_option(f"Number of largest eigenvalues and eigenvectors to compare [{defaults.COMPARED_TOP}].")
@shared_options
def compare(paths: tuple[str, ...], top: int | None, **options: Any) -> None:
    """Compare the kernel at the first of PATHS with the kernel at each other path.

    All kernels need the same samples. They may differ in checkpoint, width, precision or training data. The command
    prints the distance, the centred alignment (CKA), the principal angles between the eigenspaces, and the ratios of
    the eigenvalues. For two kernels of one network it also prints the error of the lower precision. For a single path,
    it compares the most precise dtype of the store with the other dtypes.
    """
    asked = Asked.pop_from(options)
    from ntkgen import analysis
    from ntkgen.cli.progress import progress_bars

    settings = analysis.CompareSettings(top, memory_bytes=asked.memory_bytes)
    first, others = _matrices(asked, paths)
    for second in others:
        with progress_bars(second.name, quiet=asked.quiet) as report:
            answer = analysis.compare(first, second, settings, report=report)
        asked.show(answer, _page(answer))


def _matrices(asked: Asked, paths: tuple[str, ...]) -> "tuple[Matrix, list[Matrix]]":
    """Open the kernels that are compared.

    Raises:
        UsageError: If there is only one kernel.
    """
    first = asked.matrix(paths[0])
    if len(paths) > 1:
        return first, [asked.matrix(path) for path in paths[1:]]
    store = first.store
    dtypes = [dtype for dtype in reversed(store.manifest.dtypes) if dtype != first.dtype]
    if not dtypes:
        raise click.UsageError(f"{store.name} holds only one kernel: expected two to compare. Give a second path.")
    others = [dataclasses.replace(asked, dtype=dtype).matrix(paths[0]) for dtype in dtypes]
    return first, others


def _page(answer: "CompareAnswer") -> list[str]:
    angles = _few([f"{angle:.3g}" for angle in answer.principal_angles])
    ratios = _few(["none" if ratio is None else f"{ratio:.4g}" for ratio in answer.eigenvalue_ratios])
    return [
        f"  {answer.dtype}, against {answer.reference} ({answer.reference_dtype})",
        f"  {'distance':<20}{_number(answer.distance)}",
        f"  {'centred alignment':<20}{_number(answer.centered_alignment)}",
        f"  {'principal angles':<20}{angles} rad, of the first {len(answer.principal_angles)} eigenvectors",
        f"  {'eigenvalue ratios':<20}{ratios}",
        *_cost(answer.cost),
    ]


def _cost(cost: "Cost | None") -> list[str]:
    if cost is None:
        return []
    lines = [
        f"  Errors of the lower precision, {cost.lower_dtype} in {cost.lower}:",
        f"    {'Frobenius error':<18}{cost.frobenius_error:.3g}",
        f"    {'eigenvalues':<18}{cost.eigenvalue_error:.3g} of the largest, for {cost.eigenvalues_compared:,}",
    ]
    if cost.logdet_error is not None and cost.logdet is not None:
        lines.append(f"    {'log-determinant':<18}{cost.logdet_error:+.6g} of {cost.logdet:.6g}")
    elif cost.not_positive:
        lines.append(f"    {'log-determinant':<18}unknown: {cost.not_positive:,} eigenvalues are not positive")
    return lines


def _few(texts: list[str]) -> str:
    return ", ".join(texts[:LISTED]) + ", …" * (len(texts) > LISTED)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
