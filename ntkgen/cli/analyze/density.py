"""`ntkgen analyze density`: density of the eigenvalues of a kernel."""

from typing import TYPE_CHECKING, Any

import click

from ntkgen.analysis import defaults
from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import Command, aligned

if TYPE_CHECKING:
    from ntkgen.analysis.eigenvalue_density import DensityAnswer


@click.command(cls=Command, short_help="Density of the eigenvalues on a logarithmic axis.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@shared_options
@click.option(
    "--passes",
    type=int,
    default=defaults.DENSITY_PASSES,
    show_default=True,
    help="Maximum number of passes over the tiles.",
)
@click.option(
    "--bandwidth", type=float, default=defaults.BANDWIDTH, show_default=True, help="Width of the smoothing, in decades."
)
def density(paths: tuple[str, ...], **options: Any) -> None:
    """Compute the density of the eigenvalues of each kernel at PATH, on a logarithmic axis.

    If the kernel fits in memory, the density is computed from all eigenvalues. Otherwise it is estimated by stochastic
    Lanczos quadrature, with error bars.
    """
    from ntkgen import analysis
    from ntkgen.cli.progress import progress_bars

    asked = Asked.pop_from(options)
    settings = analysis.DensitySettings(**options, memory_bytes=asked.memory_bytes)
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            answer = analysis.density(matrix, settings, report=report)
        asked.show(answer, _page(answer))


def _page(answer: "DensityAnswer") -> list[str]:
    sampled = f"{answer.passes:g} passes with {answer.probes} Gaussian vectors"
    lines = {"method": "all eigenvalues" if answer.method == "all" else sampled}
    if answer.fraction_off_axis > 0:
        lines["off axis"] = f"{100 * answer.fraction_off_axis:.3g} % are negative or may be zero"
    if answer.resolved_above is not None:
        lines["resolved"] = f"above {answer.resolved_above:.3g}; below, the quadrature has few nodes"
    if answer.error_norm is not None:
        lines["error"] = f"‖E‖ ≤ {answer.error_norm:.3g}; smaller eigenvalues are noise"
    return [*aligned(lines), *_decade_lines(answer)]


def _decade_lines(answer: "DensityAnswer") -> list[str]:
    """Write the percentage of the eigenvalues in each decade."""
    places, above = answer.log10_eigenvalues, answer.fraction_above
    if not places:
        return []
    decades = range(int(places[-1] // 1), int(places[0] // 1) - 1, -1)
    at = [next((a for place, a in zip(places, above, strict=True) if place >= low), 0.0) for low in decades]
    counts = [value - before for value, before in zip(at, [0.0, *at], strict=False)]
    limit = answer.resolved_above
    is_known = [limit is None or 10.0**low >= limit for low in decades]
    lines = [
        f"  10^{low:<4} to 10^{low + 1:<4} {100 * count:8.3f} %"
        for low, count, known in zip(decades, counts, is_known, strict=True)
        if known
    ]
    rest = sum(count for count, known in zip(counts, is_known, strict=True) if not known)
    return lines if all(is_known) else [*lines, f"  below         {100 * rest:11.3f} %, not resolved"]
