"""`ntkgen report`: one HTML page about some kernels."""

from typing import Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import Command, out_option
from ntkgen.units import human_bytes


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True)
@out_option("-o", default="report.html", show_default=True, metavar="FILE", help="File of the report.")
@shared_options
def report(paths: tuple[str, ...], out: str, **options: Any) -> None:
    """Write one self-contained HTML page about the kernels at PATHS.

    The page needs no other file and no internet. It has pictures, tables that can be sorted, the origin and accuracy of
    each kernel, the commands that reproduce it, and its citation. The command uses the results that `ntkgen analyze`
    saved beside a store. It computes missing results if the kernel and its eigenvectors fit in 1 GB, or in --memory.
    """
    asked = Asked.pop_from(options)
    from ntkgen.analysis.report.make import make_report
    from ntkgen.analysis.results import peak_bytes
    from ntkgen.cli.plot import unique_names
    from ntkgen.cli.progress import progress_bars
    from ntkgen.files.folder import file_of

    file = file_of(out)
    file.require_writable()
    matrices = [asked.matrix(path) for path in paths]
    with progress_bars(", ".join(unique_names(paths)), quiet=asked.quiet) as progress:
        made = make_report(matrices, asked.memory_bytes, progress)
    file.folder.write(file.name, made.page)
    for matrix, lacking in zip(matrices, made.lacking, strict=True):
        result = {
            "store": matrix.name,
            "report": out,
            "report_bytes": len(made.page),
            "lacking": lacking,
            "peak_bytes": peak_bytes(),
        }
        page = [f"  no {question}: {reason}" for question, reason in lacking.items()]
        asked.show_values(matrix.name, result, page)
    if not asked.as_json:
        click.echo(f"{out}: {human_bytes(len(made.page))}")
