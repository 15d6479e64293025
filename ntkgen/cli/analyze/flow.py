"""`ntkgen analyze flow`: what gradient flow has learned when."""

from typing import Any

import click

from ntkgen.cli.analyze import Asked, shared_options
from ntkgen.cli.analyze.regress import test_store
from ntkgen.cli.options import ManyCommand, ManyOption

# Modes that the page lists.
LISTED = 10


@click.command(cls=ManyCommand, short_help="Gradient flow on the labels.")
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "--loss",
    type=click.Choice(["squared", "cross-entropy"]),
    default="squared",
    show_default=True,
    help="Of the outputs, ½ ‖f − y‖² or the cross-entropy of their softmax.",
)
@click.option("--rate", type=float, default=1.0, show_default=True, help="Learning rate η; times count its steps.")
@click.option("--normalisation", type=float, help="What the sum of losses is divided by, c [the number of samples].")
@click.option("--times", cls=ManyOption, type=float, metavar="T...", help="When to look [over all learning times].")
@click.option(
    "--offset",
    type=click.Choice(["zero", "logits"]),
    default="zero",
    show_default=True,
    help="Where the outputs begin: at zero, or at the network's logits.",
)
@click.option("--modes", "num_modes", type=int, default=100, show_default=True, help="Modes to list in --json.")
@click.option("--test", help="Kernel of the same samples with test samples (`compute --against test`).")
@shared_options
def flow(paths: tuple[str, ...], **options: Any) -> None:
    """Follow gradient flow on the labels with the kernels at PATHS, as the linearised network does it.

    For the squared loss f_t = y + exp(−ηKt/c)(f₀ − y), and each mode of the kernel is learned in its own time, c/(ηλ).
    """
    asked = Asked.pop_from(options)
    from ntkgen.analysis import gradient_flow as flowing
    from ntkgen.cli.progress import progress_bars

    options["test"], options["times"] = test_store(options["test"], paths), options["times"] or None
    for path in paths:
        matrix = asked.matrix(path)
        with progress_bars(path, quiet=asked.quiet) as report:
            result = flowing.flow(matrix, flowing.Flow(**options), asked.memory_bytes, report)
        asked.show(result, _page(result))


def _page(result: dict[str, Any]) -> list[str]:
    start = "the logits" if result["offset"] == "logits" else "zero"
    c, rate = result["normalisation"], result["rate"]
    columns = {"train_loss": "loss", "train_accuracy": "accuracy", "test_accuracy": "test"}
    there = {name: title for name, title in columns.items() if name in result}
    lines = [f"  {result['loss']} loss / {c:g}, from {start}, learning rate {rate:g}, by {result['method']}"]
    lines += [f"  {'t':>10}" + "".join(f"{title:>11}" for title in there.values())]
    for at, time in enumerate(result["times"]):
        numbers = (f"{result[name][at]:>11.{'2%' if 'accuracy' in name else '4g'}}" for name in there)
        lines.append(f"  {time:>10.3g}{''.join(numbers)}")
    if max(bound or 0.0 for bound in result["error_bounds"]) > 0:
        lines.append(f"  errors at most {max(result['error_bounds']):.1g} of what is to be learned")
    return [*lines, *_modes(result)]


def _modes(result: dict[str, Any]) -> list[str]:
    if "energies" not in result:
        return []
    modes = list(zip(result["eigenvalues"], result["learning_times"], result["energies"], strict=True))[:LISTED]
    lines = [f"  {'eigenvalue':>11}{'learned at':>12}{'of labels':>11}"]
    return lines + [f"  {value:>11.4g}{_time(time):>12}{energy:>11.2%}" for value, time, energy in modes]


def _time(time: float | None) -> str:
    return "never" if time is None else f"{time:.3g}"
