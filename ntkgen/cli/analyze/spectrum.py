"""`ntkgen analyze spectrum`: the eigenvalues of a kernel."""

from typing import Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import FiniteRange, aligned

# So many eigenvalues are shown to people; JSON has all.
SHOWN = 10


@click.command(short_help="Eigenvalues, and the numbers that sum them up.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@shared_options
@click.option("--top", type=int, metavar="K", help="The K largest alone [all; 50 where all do not fit in memory].")
@click.option(
    "--tolerance",
    type=FiniteRange(min=0, min_open=True, max=1, max_open=True),
    default=1e-6,
    show_default=True,
    help="Error of each eigenvalue, relative to it, out of core.",
)
@click.option("--max-passes", type=click.IntRange(min=1), default=100, show_default=True, help="Over the stored tiles.")
@click.option("--condition", is_flag=True, help="The smallest eigenvalue out of core too, by a factor on disk.")
def spectrum(paths: tuple[str, ...], **options: Any) -> None:
    """Compute the eigenvalues of each kernel at PATH, with error bounds, and what its spectrum is summed up by.

    All of them where they fit in memory, else the largest in a few passes over the stored tiles.
    """
    from ntkgen.analysis import eigenvalues as spectra
    from ntkgen.cli.progress import progress_bars

    asked = Asked.pop_from(options)
    settings = spectra.SpectrumSettings(asked.memory_bytes, **options)
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            result = spectra.spectrum(matrix, settings, report=report)
        asked.show(result, _page(result))


def _page(result: dict[str, Any]) -> list[str]:
    lines = {
        "method": _method(result),
        "trace": f"{result['trace']:.10g}",
        "‖K‖_F": f"{result['frobenius_norm']:.10g}",
        "ranks": f"effective {_within(result['effective_rank'], result['effective_rank_error'])}, participation ratio "
        f"{result['participation_ratio']:.6g}, stable {result['stable_rank']:.6g}",
        "condition": _condition(result),
        "error": _error(result),
    }
    return [*aligned(lines), *_eigenvalue_lines(result)]


def _method(result: dict[str, Any]) -> str:
    count = f"{len(result['eigenvalues']):,} of {result['rows']:,} eigenvalues, {result['passes']:g} passes"
    if result["method"] == "all":
        return f"{count}, by LAPACK"
    reached = "" if result["is_converged"] else "; NOT CONVERGED: raise --max-passes"
    return f"{count}, by block Krylov with blocks of {result['block']:,}{reached}"


def _within(value: float, error: float) -> str:
    return f"{value:.6g}" + f" ± {error:.2g}" * (error > 0)


def _condition(result: dict[str, Any]) -> str:
    if "not_positive" in result:
        return f"none. {result['not_positive']}"
    if result["smallest"] is None:
        return "not computed: all eigenvalues do not fit in memory, see --condition"
    smallest = f"smallest eigenvalue {_within(result['smallest'], result['smallest_error'])}"
    negative = f", {result['num_negative']:,} negative" if result["num_negative"] else ""
    if result["condition"] is None:
        return f"none, the {smallest} is not told from zero{negative}"
    return f"{_within(result['condition'], result['condition_error'])}, {smallest}"


def _error(result: dict[str, Any]) -> str:
    if result["error_norm"] is None:
        return "not known, there is no certificate"
    above, count = result["num_above_error"], len(result["eigenvalues"])
    noise = "" if above >= count else f"; only the first {above:,} are above that, the others are noise"
    return f"‖E‖ ≤ {result['error_norm']:.3g}, and so is that of each eigenvalue{noise}"


def _eigenvalue_lines(result: dict[str, Any]) -> list[str]:
    pairs = zip(result["eigenvalues"][:SHOWN], result["error_bounds"], strict=False)
    return [f"  {number:>12,}  {value:<18.12g} ± {bound:.1g}" for number, (value, bound) in enumerate(pairs, start=1)]
