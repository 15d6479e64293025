"""`ntkgen analyze extrapolate`: predicted log-determinant of a larger kernel."""

from typing import TYPE_CHECKING, Any

import click

from ntkgen.analysis import defaults
from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.messages import warn
from ntkgen.cli.options import Command, aligned, shift_option

if TYPE_CHECKING:
    from ntkgen.analysis.extrapolation import ExtrapolateAnswer


@click.command(cls=Command, short_help="Predicted log-determinant of a larger kernel.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@shared_options
@click.option("--to", type=int, required=True, metavar="N_SAMPLES", help="Number of samples of the larger kernel.")
@click.option(
    "--burn-in", type=int, help="Ignore leading blocks of at most this number of samples [a tenth of the samples]."
)
@click.option("--q", type=int, default=defaults.Q, show_default=True, help="Number of terms ln x!/xⁱ in the fit.")
@click.option("--powers", type=int, default=defaults.POWERS, show_default=True, help="Number of terms x⁻ⁱ in the fit.")
@click.option(
    "--alpha", type=float, default=defaults.ALPHA, show_default=True, help="Exponent of the weights x^−α of the fit."
)
@click.option(
    "--holdout",
    type=float,
    default=defaults.HOLDOUT,
    show_default=True,
    help="Fraction of the blocks that is held out to measure the error.",
)
@shift_option
def extrapolate(paths: tuple[str, ...], **options: Any) -> None:
    """Predict the log-determinant of a kernel of N_SAMPLES from the leading blocks of each kernel at PATH.

    The samples of the stored kernel must be in random order (`ntkgen compute --shuffle-seed`). The method is FLODANCE
    (Ameli et al. 2025): adding the x-th sample multiplies the determinant by about x^−ν.
    """
    from ntkgen import analysis
    from ntkgen.cli.progress import progress_bars

    asked = Asked.pop_from(options)
    settings = analysis.ExtrapolateSettings(**options, memory_bytes=asked.memory_bytes)
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            answer = analysis.extrapolate(matrix, settings, report=report)
        for warning in answer.warnings:
            warn(warning)
        asked.show(answer, _page(answer))


def _page(answer: "ExtrapolateAnswer") -> list[str]:
    lines = {
        "log det": f"{answer.logdet:.8g} nats for {answer.to:,} samples, {answer.logdet_per_row:.6g} per row",
        "ν": f"{answer.nu:.6g}, {answer.nu_per_output:.6g} per output",
        "fitted": f"{answer.prefixes_used:,} prefixes of {answer.fitted_from:,} to {answer.fitted_to:,} "
        f"samples, q = {answer.q}, α = {answer.alpha:g}; root mean square residual {answer.rms_residual:.3g}",
        "terms": ", ".join(f"{value:.6g} · {name}" for name, value in answer.coefficients.items()),
    }
    if answer.holdout_error_relative is not None:
        lines["error"] = (
            f"{answer.holdout_error:.4g} nats ({100 * answer.holdout_error_relative:.3g} %) at "
            f"{answer.fitted_to:,} samples, by a fit below {answer.holdout_from:,}, which predicts "
            f"{answer.holdout_logdet:.8g} nats for {answer.to:,}"
        )
    return aligned(lines)
