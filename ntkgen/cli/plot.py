"""`ntkgen plot`: pictures of kernels as files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import Command, ManyOption, format_option, out_option
from ntkgen.errors import InputError

if TYPE_CHECKING:
    from ntkgen.analysis.matrix import Matrix
    from ntkgen.analysis.plots.style import Picture
    from ntkgen.files.folder import LocalFolder

KINDS = ("matrix", "spectrum", "density", "modes", "flow", "alignment", "logdet", "regression", "comparison")


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "--kind",
    "kinds",
    cls=ManyOption,
    type=click.Choice(KINDS),
    metavar="KIND...",
    help=f"Pictures: {', '.join(KINDS)} [all that can be drawn].",
)
@format_option
@out_option("-o", default="plots", show_default=True, metavar="FOLDER", help="Folder of the pictures.")
@shared_options
def plot(paths: tuple[str, ...], kinds: tuple[str, ...], formats: tuple[str, ...], out: str, **options: Any) -> None:
    """Draw the kernels at PATHS and the results of `ntkgen analyze`.

    The command uses the results that are saved beside a store. It computes missing results if the kernel and its
    eigenvectors fit in 1 GB, or in --memory. Write the options after the paths.

    \b
    ntkgen plot runs/lenet-digits-seed0-n500.zarr --kind matrix spectrum --format png svg
    """  # noqa: D301 - \b tells click not to wrap the lines
    asked = Asked.pop_from(options)
    from ntkgen.analysis.results import peak_bytes
    from ntkgen.files.folder import LocalFolder

    folder = LocalFolder(Path(out))
    folder.require_writable()
    chosen, names = kinds or KINDS, unique_names(paths)
    matrices = [asked.matrix(path) for path in paths]  # wrong input is reported before any computation
    compared, refused = _compare(matrices, chosen, asked, is_required="comparison" in kinds)
    for index, (matrix, name) in enumerate(zip(matrices, names, strict=True)):
        pictures, missing = _draw(matrix, name, chosen, asked)
        if index == 0 and compared is not None:
            pictures.append(compared)
        missing |= {"comparison": refused[matrix.name]} if matrix.name in refused else {}
        _require_all(missing if kinds else {})
        files = write_pictures(folder, name, pictures, formats)
        result = {"store": matrix.name, "pictures": files, "left_out": missing, "peak_bytes": peak_bytes()}
        page = [f"  {made['file']}" for made in files] + [f"  no {kind}: {why}" for kind, why in missing.items()]
        asked.show_values(matrix.name, result, page)


def _draw(matrix: "Matrix", name: str, kinds: Sequence[str], asked: Asked) -> "tuple[list[Picture], dict[str, str]]":
    """Draw one kernel. Return the pictures, and the reason for each picture that cannot be drawn."""
    from ntkgen.analysis.answers import gather
    from ntkgen.analysis.plots.draw import draw_all, left_out, questions_for
    from ntkgen.cli.progress import progress_bars

    with progress_bars(name, quiet=asked.quiet) as report:
        answers = gather(matrix, asked.memory_bytes, questions_for(kinds), report)
        return list(draw_all(answers, kinds, report).values()), left_out(answers, kinds)


def _compare(
    matrices: "Sequence[Matrix]", kinds: Sequence[str], asked: Asked, *, is_required: bool
) -> "tuple[Picture | None, dict[str, str]]":
    """Draw the comparison of the first kernel with the others. Return it, and the reason for each refused store.

    Raises:
        InputError: If there is only one kernel, and the command asks for a comparison by its name.
    """
    from ntkgen.analysis.answers import compare_all
    from ntkgen.analysis.plots.compare import draw_comparison
    from ntkgen.cli.progress import progress_bars

    if "comparison" not in kinds:
        return None, {}
    if len(matrices) == 1 and is_required:
        raise InputError(
            f"The kernel at {matrices[0].name} cannot be compared: expected two paths or more, found one. Is a path "
            "missing? Add the other paths, or leave comparison out of --kind."
        )
    with progress_bars("comparison", quiet=asked.quiet) as report:
        results, refused = compare_all(matrices, asked.memory_bytes, report)
    return draw_comparison(results) if results else None, refused


def _require_all(missing: Mapping[str, str]) -> None:
    """Require that no picture is missing.

    Raises:
        InputError: If a picture is missing. The message is its reason.
    """
    if missing:
        raise InputError(next(iter(missing.values())))


def unique_names(paths: Sequence[str]) -> list[str]:
    """Derive the names of pictures from the names of their stores. Repeated names get a number.

    >>> unique_names(["a/k.zarr", "b/k.zarr/", "b/c.zarr"])
    ['k', 'k-2', 'c']
    """
    stems = [os.path.basename(os.path.abspath(os.path.expanduser(path))).removesuffix(".zarr") for path in paths]
    numbers = [stems[:index].count(stem) + 1 for index, stem in enumerate(stems)]
    return [stem if number == 1 else f"{stem}-{number}" for stem, number in zip(stems, numbers, strict=True)]


def write_pictures(
    folder: "LocalFolder", name: str, pictures: "Sequence[Picture]", formats: Sequence[str]
) -> list[dict[str, str]]:
    """Write pictures in the given formats. Return the kind, the file and the caption of each."""
    from ntkgen.analysis.plots.style import render

    written = []
    for picture in pictures:
        for form in formats:
            file = f"{name}-{picture.kind}.{form}"
            folder.write(file, render(picture, form))
            written.append({"kind": picture.kind, "file": str(folder / file), "caption": picture.caption})
    return written
