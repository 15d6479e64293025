"""`ntkgen analyze logdet`: the log-determinant of a kernel."""

from typing import Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import aligned
from ntkgen.units import human_bytes

# So many prefixes are shown to people; JSON has all.
SHOWN = 10


@click.command(short_help="Log-determinant, by a Cholesky factor on disk.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@shared_options
@click.option("--shift", type=float, default=0.0, show_default=True, help="λ of K + λI.")
@click.option("--prefixes", is_flag=True, help="Also those of all leading principal blocks.")
@click.option("--indefinite", is_flag=True, help="Where the kernel is not positive definite, go on with LDLᵀ.")
@click.option("--keep-factor", is_flag=True, help="Leave the factor in STORE.analysis, to go on from.")
def logdet(paths: tuple[str, ...], *, shift: float, **options: Any) -> None:
    """Compute the log-determinant of each kernel at PATH, exactly and out of core.

    A Cholesky factor in float64 is written tile by tile into STORE.analysis, and removed afterwards. It takes the room
    of one triangle in float64. An interrupted run goes on with the same command.
    """
    from ntkgen.analysis import determinant as logdets
    from ntkgen.analysis.linalg.cholesky import FactorSettings
    from ntkgen.cli.progress import progress_bars

    asked = Asked.pop_from(options)
    settings = FactorSettings(shift, options["indefinite"], options["keep_factor"], memory_bytes=asked.memory_bytes)
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            result = logdets.logdet(matrix, settings, prefixes=options["prefixes"], report=report)
        for warning in result["warnings"]:
            click.echo(f"Warning: {warning}", err=True)
        asked.show(result, _page(result))


def _page(result: dict[str, Any]) -> list[str]:
    bound, speed = result["smallest_eigenvalue_bound"], result["gflops"]
    lines = {
        "log |det|": f"{result['logdet']:.12g} nats, {result['logdet_per_row']:.6g} per row, sign {result['sign']}",
        "of": f"{result['rows']:,} rows of {result['dtype']}" + f", K + {result['shift']:g} I" * (result["shift"] > 0),
        "panels": f"{result['panels']:,} of {result['panel_rows']:,} rows, keeping "
        f"{human_bytes(result['bytes_kept_planned'])}, reading {human_bytes(result['bytes_read_planned'])}",
        "took": f"{result['seconds']:,.1f} s" + f", {speed or 0:,.0f} GFLOP/s" * ((speed or 0) >= 1),
        "smallest": f"pivot {result['smallest_pivot']:.3g}",
    }
    if bound is not None and bound < result["smallest_pivot"]:
        lines["smallest"] += f", eigenvalue at most {bound:.3g}"
    if "residual" in result:
        signs = result["inertia"]
        lines["inertia"] = f"{signs['positive']:,} positive, {signs['negative']:,} negative"
        lines["LDLᵀ"] = f"max |L| {result['max_factor']:.3g}, ‖(K − LDLᵀ)v‖ = {result['residual']:.3g} ‖Kv‖"
    return [*aligned(lines), *_prefix_lines(result)]


def _prefix_lines(result: dict[str, Any]) -> list[str]:
    pairs = list(zip(result.get("prefix_rows", ()), result.get("prefixes", ()), strict=True))
    step = max(1, len(pairs) // SHOWN)
    return [f"  {rows:>12,} rows  {value:.12g}" for rows, value in pairs[step - 1 :: step]]
