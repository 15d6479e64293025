"""`ntkgen report`: one page on some kernels, for people."""

from typing import Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import Command, out_option
from ntkgen.units import human_bytes


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True)
@out_option("-o", default="report.html", show_default=True, metavar="FILE", help="The page.")
@shared_options
def report(paths: tuple[str, ...], out: str, **options: Any) -> None:
    """Write one page on the kernels at PATHS, in HTML, with everything in it: it needs no network and no other file.

    Pictures, tables that a click sorts, where each kernel comes from, how accurate it is, how to make it again and how
    to cite it. What was not asked yet is found out now, where a kernel fits with its eigenvectors in 1 GB, or in
    --memory; of a larger one `ntkgen analyze` asks first.
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
