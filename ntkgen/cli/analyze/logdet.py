"""`ntkgen analyze logdet`: log-determinant of a kernel."""

from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.messages import warn
from ntkgen.cli.options import Command, aligned, shift_option
from ntkgen.units import human_bytes

if TYPE_CHECKING:
    from ntkgen.analysis.determinant import LogdetAnswer

# Approximate number of printed prefixes. JSON has all.
SHOWN = 10


@click.command(cls=Command, short_help="Log-determinant, by a Cholesky factor on disk.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@shared_options
@shift_option
@click.option("--prefixes", is_flag=True, help="Also compute the log-determinants of all leading blocks.")
@click.option("--indefinite", is_flag=True, help="Continue with LDLᵀ if the kernel is not positive definite.")
@click.option("--keep-factor", "keep", is_flag=True, help="Keep the factor in STORE.analysis.")
def logdet(paths: tuple[str, ...], **options: Any) -> None:
    """Compute the log-determinant of each kernel at PATH, exactly and out of core.

    The command writes a Cholesky factor in float64 into STORE.analysis and removes it at the end. The factor takes as
    much disk space as one triangle in float64. After an interruption, the same command continues.
    """
    from ntkgen import analysis
    from ntkgen.cli.progress import progress_bars

    asked = Asked.pop_from(options)
    settings = analysis.LogdetSettings(**options, memory_bytes=asked.memory_bytes)
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            answer = analysis.logdet(matrix, settings, report=report)
        for warning in answer.warnings:
            warn(warning)
        asked.show(answer, _page(answer))


def _page(answer: "LogdetAnswer") -> list[str]:
    bound, speed = answer.smallest_eigenvalue_bound, answer.gflops
    lines = {
        "log |det|": f"{answer.logdet:.12g} nats, {answer.logdet_per_row:.6g} per row, sign {answer.sign}",
        "matrix": f"{answer.rows:,} rows of {answer.dtype}" + f", K + {answer.shift:g} I" * (answer.shift > 0),
        "panels": f"{answer.panels:,} of {answer.panel_rows:,} rows; a panel takes "
        f"{human_bytes(answer.bytes_kept_planned)} of memory, all panels read {human_bytes(answer.bytes_read_planned)}",
        "time": f"{answer.seconds:,.1f} s" + f", {speed or 0:,.0f} GFLOP/s" * ((speed or 0) >= 1),
        "smallest": f"pivot {answer.smallest_pivot:.3g}",
    }
    if bound is not None and bound < answer.smallest_pivot:
        lines["smallest"] += f", eigenvalue at most {bound:.3g}"
    if answer.residual is not None:
        signs = answer.inertia
        lines["inertia"] = f"{signs.positive:,} positive, {signs.negative:,} negative"
        lines["LDLᵀ"] = f"max |L| {answer.max_factor:.3g}, ‖(K − LDLᵀ)v‖ = {answer.residual:.3g} ‖Kv‖"
    return [*aligned(lines), *_prefix_lines(answer)]


def _prefix_lines(answer: "LogdetAnswer") -> list[str]:
    pairs = list(zip(answer.prefix_rows or (), answer.prefixes or (), strict=True))
    step = max(1, len(pairs) // SHOWN)
    return [f"  {rows:>12,} rows  {value:.12g}" for rows, value in pairs[step - 1 :: step]]
