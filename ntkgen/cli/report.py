"""`ntkgen report`: one HTML page about some kernels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import Command, out_option
from ntkgen.errors import InputError, StoreError
from ntkgen.units import human_bytes

if TYPE_CHECKING:
    from ntkgen.files.folder import File

# Options that have no meaning for runs of continual learning, and their defaults.
_OF_KERNELS = {"dtype": None, "output": None, "allow_partial": False, "memory_bytes": None, "client": None}


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True)
@out_option("-o", default="report.html", show_default=True, metavar="FILE", help="File of the report.")
@shared_options
def report(paths: tuple[str, ...], out: str, **options: Any) -> None:
    """Write one self-contained HTML page about the kernels, or the runs of `ntkgen cl-run`, at PATHS.

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
    if _are_runs(paths, asked):
        _report_runs(paths, file, asked)
        return
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


def _are_runs(paths: Sequence[str], asked: Asked) -> bool:
    """Say whether the paths are runs of continual learning.

    Raises:
        InputError: If only some are, or an option has no meaning for runs.
        StoreError: If there is nothing at a path.
    """
    from ntkgen.continual.reading import is_run

    runs = [path for path in paths if is_run(path)]
    if not runs:
        _require_content(paths)
        return False
    if len(runs) < len(paths):
        other = next(path for path in paths if path not in runs)
        raise InputError(
            f"A page is about kernels or about runs: expected paths of one kind, found the run {runs[0]} and {other}, "
            "which is none. Is a path misspelt? Write two pages."
        )
    given = [name for name, usual in _OF_KERNELS.items() if getattr(asked, name) != usual]
    if given:
        raise InputError(
            f"`{given[0]}` has no meaning for the run at {runs[0]}: expected options of runs, found one of kernels. Is "
            "the path another one? Leave the option out."
        )
    return True


def _require_content(paths: Sequence[str]) -> None:
    """Require that there is something at each path: a kernel, or what the next error describes.

    Raises:
        StoreError: If there is nothing.
    """
    from ntkgen.files.place import folder_of

    for path in paths:
        folder = folder_of(path)
        if not folder.has("zarr.json") and not folder.sizes():
            raise StoreError(
                f"There is nothing at {path}: expected a kernel that `ntkgen compute` has stored, or a run of `ntkgen "
                "cl-run`, found no file. Is the path misspelt, or relative to another folder? Correct it."
            )


def _report_runs(paths: Sequence[str], file: "File", asked: Asked) -> None:
    from ntkgen.continual.reading import open_run
    from ntkgen.continual.report import report_runs

    made = report_runs([open_run(path) for path in paths])
    file.folder.write(file.name, made.page)
    for path, left_out in zip(paths, made.left_out, strict=True):
        result = {"run": path, "report": str(file), "report_bytes": len(made.page), "left_out": left_out}
        asked.show_values(path, result, [f"  no {kind}: {why}" for kind, why in left_out.items()])
    if not asked.as_json:
        click.echo(f"{file}: {human_bytes(len(made.page))}")
