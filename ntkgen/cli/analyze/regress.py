"""`ntkgen analyze regress`: kernel ridge regression on the labels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ntkgen.analysis import defaults
from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.options import Command, ManyOption, offset_option, test_option

if TYPE_CHECKING:
    from ntkgen.analysis.regression import RegressAnswer
    from ntkgen.store.store import KernelStore


@click.command(cls=Command, short_help="Kernel ridge regression on the labels.")
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "--shifts",
    cls=ManyOption,
    type=float,
    metavar="λ...",
    help="Ridge parameters λ [10⁻⁶ to 10² times the mean eigenvalue, without values below the kernel's error].",
)
@offset_option("Outputs at the start of the fit: zero, or the logits of the network.")
@test_option
@click.option(
    "--method",
    type=click.Choice(["auto", "eigh", "cholesky", "cg"]),
    default=defaults.METHOD,
    show_default=True,
    help="Solver. auto takes the fastest one that fits in memory.",
)
@shared_options
def regress(paths: tuple[str, ...], **options: Any) -> None:
    """Fit the labels by kernel ridge regression with the kernels at PATHS, for each ridge parameter λ.

    The command prints three mean squared errors: the training error, the leave-one-out error (each sample is left out
    with all its outputs), and the error of generalised cross-validation (GCV). With --test it also prints the test
    error. The accuracies are printed too.
    """
    asked = Asked.pop_from(options)
    from ntkgen import analysis
    from ntkgen.cli.progress import progress_bars

    options["test"] = test_store(options["test"], paths)
    settings = analysis.RegressSettings(
        **{**options, "shifts": options["shifts"] or None}, memory_bytes=asked.memory_bytes
    )
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            answer = analysis.regress(matrix, settings, report=report)
        asked.show(answer, _page(answer))


def test_store(path: str | None, paths: Sequence[str]) -> "KernelStore | None":
    """Open the kernel with test samples, which belongs to exactly one training kernel.

    Raises:
        UsageError: If there are several training kernels.
    """
    from ntkgen.store.opening import open_store

    if path is not None and len(paths) > 1:
        raise click.UsageError(
            f"--test belongs to one kernel: expected one path, found {len(paths)}. Give one path at a time."
        )
    return None if path is None else open_store(path)


def _page(answer: "RegressAnswer") -> list[str]:
    series: dict[str, Sequence[float | None] | None] = {
        "train": answer.train_error,
        "loo": answer.loo_error,
        "GCV": answer.gcv,
        "test": answer.test_error,
        "train acc": answer.train_accuracy,
        "loo acc": answer.loo_accuracy,
        "test acc": answer.test_accuracy,
    }
    known = {title: values for title, values in series.items() if values is not None}
    start = "the logits" if answer.offset == "logits" else "zero"
    lines = [f"  starting from {start}, solver {answer.method}; errors are mean squares, loo is leave-one-out"]
    lines += ["  " + f"{'λ':>10}" + "".join(f"{title:>11}" for title in known)]
    for at, shift in enumerate(answer.shifts):
        numbers = "".join(_number(values[at], is_part="acc" in title) for title, values in known.items())
        lines.append(f"  {shift:>10.3g}{numbers}")
    if answer.method == "cg":
        lines.append(f"  residuals are at most {max(answer.residual_bounds):.1g}; the leave-one-out error is unknown")
    if answer.error_norm is not None and answer.error_norm > min(answer.shifts):
        lines.append(f"  the kernel has an error of up to ‖E‖ = {answer.error_norm:.2g}: smaller λ fit this error")
    return lines


def _number(value: float | None, *, is_part: bool) -> str:
    if value is None:
        return f"{'unknown':>11}"
    return f"{value:>11.2%}" if is_part else f"{value:>11.4g}"
