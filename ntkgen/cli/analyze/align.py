"""`ntkgen analyze align`: alignment of a kernel with the labels."""

from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import Command

if TYPE_CHECKING:
    from ntkgen.analysis.alignment import AlignAnswer


@click.command(cls=Command, short_help="Alignment with the labels.")
@click.argument("paths", nargs=-1, required=True)
@shared_options
def align(paths: tuple[str, ...], **options: Any) -> None:
    """Measure the alignment of the kernels at PATHS with their one-hot labels y, plain and centred.

    The alignment is 1 if the kernel is proportional to y yᵀ. It is printed for the whole kernel and for the kernel of
    each output. The centred kernel is H K H with H = I − 11ᵀ/N. N is the number of rows: all rows for the whole kernel,
    and the number of samples for the kernel of one output.
    """
    asked = Asked.pop_from(options)
    from ntkgen import analysis
    from ntkgen.cli.progress import progress_bars

    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            answer = analysis.align(matrix, analysis.AlignSettings(memory_bytes=asked.memory_bytes), report=report)
        asked.show(answer, _page(answer))


def _page(answer: "AlignAnswer") -> list[str]:
    each = zip(answer.output_names, answer.output_alignment, answer.output_centered_alignment, strict=True)
    return [
        f"  {'':<12}{'alignment':>10}{'centred':>10}",
        f"  {'whole':<12}{_number(answer.alignment)}{_number(answer.centered_alignment)}",
        *(f"  {name:<12}{_number(plain)}{_number(centred)}" for name, plain, centred in each),
    ]


def _number(value: float | None) -> str:
    return f"{'none' if value is None else f'{value:.4f}':>10}"
