"""`ntkgen analyze extrapolate`: the log-determinant of a much larger kernel."""

from typing import Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import aligned


@click.command(short_help="Log-determinant of a much larger kernel.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@shared_options
@click.option("--to", type=int, required=True, metavar="N_SAMPLES", help="Samples of the larger kernel.")
@click.option("--burn-in", type=int, help="Samples of the largest prefix that is left out [a tenth].")
@click.option("--q", type=int, default=2, show_default=True, help="Terms ln x!/xⁱ.")
@click.option("--powers", type=int, default=0, show_default=True, help="Terms x⁻ⁱ.")
@click.option("--alpha", type=float, default=0.0, show_default=True, help="Weights are x^−ALPHA.")
@click.option("--holdout", type=float, default=0.25, show_default=True, help="Fraction held out to measure the error.")
@click.option("--shift", type=float, default=0.0, show_default=True, help="λ of K + λI.")
def extrapolate(paths: tuple[str, ...], *, shift: float, **options: Any) -> None:
    """Predict the log-determinant of the kernel of N_SAMPLES, from those of the leading blocks of the one at PATH.

    The samples of the kernel should be in random order (`ntkgen compute --shuffle-seed`). By FLODANCE (Ameli et al.
    2025): adding the x-th sample multiplies the determinant by about x^−ν.
    """
    from ntkgen.analysis import extrapolation
    from ntkgen.analysis.linalg.cholesky import FactorSettings
    from ntkgen.cli.progress import progress_bars

    asked = Asked.pop_from(options)
    law, settings = extrapolation.Law(**options), FactorSettings(shift=shift, memory_bytes=asked.memory_bytes)
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            result = extrapolation.extrapolate(matrix, law, settings, report)
        for warning in result["warnings"]:
            click.echo(f"Warning: {warning}", err=True)
        asked.show(result, _page(result))


def _page(result: dict[str, Any]) -> list[str]:
    lines = {
        "log det": f"{result['logdet']:.8g} nats for {result['to']:,} samples, {result['logdet_per_row']:.6g} per row",
        "ν": f"{result['nu']:.6g}, {result['nu_per_output']:.6g} per output",
        "fitted": f"{result['prefixes_used']:,} prefixes of {result['fitted_from']:,} to {result['fitted_to']:,} "
        f"samples, q = {result['q']}, α = {result['alpha']:g}; root mean square residual {result['rms_residual']:.3g}",
        "terms": ", ".join(f"{value:.6g} · {name}" for name, value in result["coefficients"].items()),
    }
    if result["holdout"]:
        lines["error"] = (
            f"{result['holdout_error']:.4g} nats ({100 * result['holdout_error_relative']:.3g} %) at "
            f"{result['fitted_to']:,} samples, by a fit below {result['holdout_from']:,}, which predicts "
            f"{result['holdout_logdet']:.8g} nats for {result['to']:,}"
        )
    return aligned(lines)
