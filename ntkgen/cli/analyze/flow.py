"""`ntkgen analyze flow`: gradient flow of the linearised network on the labels."""

from typing import TYPE_CHECKING, Any

import click

from ntkgen.analysis import defaults
from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.analyze.regress import test_store
from ntkgen.cli.options import Command, ManyOption, offset_option, test_option

if TYPE_CHECKING:
    from ntkgen.analysis.gradient_flow import FlowAnswer

# Maximum number of printed modes.
LISTED = 10


@click.command(cls=Command, short_help="Gradient flow on the labels.")
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "--loss",
    type=click.Choice(["squared", "cross-entropy"]),
    default=defaults.LOSS,
    show_default=True,
    help="Loss of the outputs f: ½ ‖f − y‖², or the cross-entropy of their softmax.",
)
@click.option(
    "--rate",
    type=float,
    default=defaults.RATE,
    show_default=True,
    help="Learning rate η. The unit of time is one gradient step.",
)
@click.option("--normalisation", type=float, help="Number c that divides the sum of the losses [number of samples].")
@click.option(
    "--times",
    cls=ManyOption,
    type=float,
    metavar="T...",
    help="Times of the evaluation [a range that covers all learning times].",
)
@offset_option("Outputs f₀ at the start: zero, or the logits of the network.")
@click.option(
    "--modes",
    "num_modes",
    type=int,
    default=defaults.NUM_MODES,
    show_default=True,
    help="Maximum number of modes.",
)
@test_option
@shared_options
def flow(paths: tuple[str, ...], **options: Any) -> None:
    """Compute the gradient flow on the labels y, for the linearised networks of the kernels at PATHS.

    For the squared loss, the outputs at time t are f_t = y + exp(−ηKt/c)(f₀ − y). The mode (eigenvector) of the
    eigenvalue λ is learned after the time c/(ηλ).
    """
    asked = Asked.pop_from(options)
    from ntkgen import analysis
    from ntkgen.cli.progress import progress_bars

    options["test"], options["times"] = test_store(options["test"], paths), options["times"] or None
    settings = analysis.FlowSettings(**options, memory_bytes=asked.memory_bytes)
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            answer = analysis.flow(matrix, settings, report=report)
        asked.show(answer, _page(answer))


def _page(answer: "FlowAnswer") -> list[str]:
    start = "the logits" if answer.offset == "logits" else "zero"
    series = {"loss": answer.train_loss, "accuracy": answer.train_accuracy, "test": answer.test_accuracy}
    known = {title: values for title, values in series.items() if values is not None}
    lines = [
        f"  {answer.loss} loss divided by {answer.normalisation:g}, starting from {start}, learning rate "
        f"{answer.rate:g}, method {answer.method}"
    ]
    lines += [f"  {'t':>10}" + "".join(f"{title:>11}" for title in known)]
    for at, time in enumerate(answer.times):
        numbers = (f"{values[at]:>11.{'4g' if title == 'loss' else '2%'}}" for title, values in known.items())
        lines.append(f"  {time:>10.3g}{''.join(numbers)}")
    largest = max(bound or 0.0 for bound in answer.error_bounds)
    if largest > 0:
        lines.append(f"  the error of the outputs is at most {largest:.1g} of ‖y − f₀‖")
    return [*lines, *_modes(answer)]


def _modes(answer: "FlowAnswer") -> list[str]:
    if answer.eigenvalues is None or answer.learning_times is None or answer.energies is None:
        return []
    modes = list(zip(answer.eigenvalues, answer.learning_times, answer.energies, strict=True))[:LISTED]
    lines = [f"  {'eigenvalue':>11}{'learned at':>12}{'label part':>11}"]
    return lines + [f"  {value:>11.4g}{_time(time):>12}{energy:>11.2%}" for value, time, energy in modes]


def _time(time: float | None) -> str:
    return "never" if time is None else f"{time:.3g}"
