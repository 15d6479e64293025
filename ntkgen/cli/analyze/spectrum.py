"""`ntkgen analyze spectrum`: eigenvalues of a kernel."""

from typing import TYPE_CHECKING, Any

import click

from ntkgen.analysis import defaults
from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import Command, FiniteRange, aligned, top_option

if TYPE_CHECKING:
    from ntkgen.analysis.eigenvalues import SpectrumAnswer

# Maximum number of printed eigenvalues. JSON has all.
SHOWN = 10


@click.command(cls=Command, short_help="Eigenvalues, ranks and condition number.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@shared_options
@top_option(
    f"Number of largest eigenvalues [all; {defaults.SPECTRUM_TOP} if the kernel does not fit in memory].", metavar="K"
)
@click.option(
    "--tolerance",
    type=FiniteRange(min=0, min_open=True, max=1, max_open=True),
    default=defaults.TOLERANCE,
    show_default=True,
    help="Maximum relative error of an eigenvalue if the kernel does not fit in memory.",
)
@click.option(
    "--max-passes",
    type=click.IntRange(min=1),
    default=defaults.MAX_PASSES,
    show_default=True,
    help="Maximum number of passes over the tiles.",
)
@click.option(
    "--condition", is_flag=True, help="Compute the smallest eigenvalue even if the kernel does not fit in memory."
)
def spectrum(paths: tuple[str, ...], **options: Any) -> None:
    """Compute the eigenvalues with error bounds, the ranks and the condition number of each kernel at PATH.

    If the kernel fits in memory, all eigenvalues are computed. Otherwise the largest ones are computed in a few passes
    over the stored tiles. In this case, --condition writes a Cholesky factor of the kernel to disk.
    """
    from ntkgen import analysis
    from ntkgen.cli.progress import progress_bars

    asked = Asked.pop_from(options)
    settings = analysis.SpectrumSettings(**options, memory_bytes=asked.memory_bytes)
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            answer = analysis.spectrum(matrix, settings, report=report)
        asked.show(answer, _page(answer))


def _page(answer: "SpectrumAnswer") -> list[str]:
    lines = {
        "method": _method(answer),
        "trace": f"{answer.trace:.10g}",
        "‖K‖_F": f"{answer.frobenius_norm:.10g}",
        "ranks": f"effective {_within(answer.effective_rank, answer.effective_rank_error)}, participation ratio "
        f"{answer.participation_ratio:.6g}, stable {answer.stable_rank:.6g}",
        "condition": _condition(answer),
        "error": _error(answer),
    }
    return [*aligned(lines), *_eigenvalue_lines(answer)]


def _method(answer: "SpectrumAnswer") -> str:
    noun = "pass" if answer.passes == 1 else "passes"
    count = f"{len(answer.eigenvalues):,} of {answer.rows:,} eigenvalues, {answer.passes:g} {noun}"
    if answer.method == "all":
        return f"{count}, by LAPACK"
    reached = "" if answer.is_converged else "; NOT CONVERGED: raise --max-passes"
    return f"{count}, by block Krylov with blocks of {answer.block:,}{reached}"


def _within(value: float, error: float | None) -> str:
    return f"{value:.6g} ± {error:.2g}" if error else f"{value:.6g}"


def _condition(answer: "SpectrumAnswer") -> str:
    if answer.not_positive is not None:
        return f"none. {answer.not_positive}"
    if answer.smallest is None:
        return "not computed, because the kernel does not fit in memory; see --condition"
    smallest = f"smallest eigenvalue {_within(answer.smallest, answer.smallest_error)}"
    negative = f", {answer.num_negative:,} negative" if answer.num_negative else ""
    if answer.condition is None:
        return f"none: the {smallest} may be zero{negative}"
    is_noise = answer.error_norm is not None and answer.smallest <= answer.error_norm
    noise = ", which is below ‖E‖: both are those of the stored numbers only" if is_noise else ""
    return f"{_within(answer.condition, answer.condition_error)}, {smallest}{noise}"


def _error(answer: "SpectrumAnswer") -> str:
    if answer.error_norm is None:
        return "unknown: the store has no certificate (measured error bound)"
    above, count = answer.num_above_error, len(answer.eigenvalues)
    noise = "" if above is None or above >= count else f"; only the first {above:,} are above it, the others are noise"
    return f"‖E‖ ≤ {answer.error_norm:.3g}, which also bounds the error of each eigenvalue{noise}"


def _eigenvalue_lines(answer: "SpectrumAnswer") -> list[str]:
    pairs = zip(answer.eigenvalues[:SHOWN], answer.error_bounds, strict=False)
    return [f"  {number:>12,}  {value:<18.12g} ± {bound:.1g}" for number, (value, bound) in enumerate(pairs, start=1)]
