"""Pictures of algorithms over tasks: accuracy, units, weights and kernels, as means over seeds with standard errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ntkgen.analysis.plots.style import BLACK, DARK, GREY, LIGHT, LINES, WARM, Line, Picture, legend, new_axes, styled
from ntkgen.continual import algorithms as of
from ntkgen.continual.algorithms import METRICS, Results, are_divided, curves_of
from ntkgen.continual.metrics.over_tasks import Curve
from ntkgen.continual.results_tree import WEIGHTS
from ntkgen.continual.streams.views import NEXT, PREVIOUS
from ntkgen.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Opacity of a band.
OPACITY = 0.22
# Further lines, beside the five of the other pictures.
GREEN = Line("#009e73", (0, (1, 1)), "P")  # type: ignore[arg-type]  # a pattern of dashes
PINK = Line("#cc79a7", (0, (3, 1, 1, 1)), "X")  # type: ignore[arg-type]
OCHRE = Line("#8a6d00", "-", "*")
_BY_COLOUR = {line.color: line for line in LINES}
# The line of each algorithm, under its published name and under that of `ntkgen cl-run --method`.
FIXED = {
    "continual_backpropagation": _BY_COLOUR[DARK],
    "continual-backprop": _BY_COLOUR[DARK],
    "base_deep_learning_system": _BY_COLOUR[WARM],
    "base": _BY_COLOUR[WARM],
    "shrink_and_perturb": _BY_COLOUR[LIGHT],
    "shrink-and-perturb": _BY_COLOUR[LIGHT],
    "head_resetting": _BY_COLOUR[GREY],
    "reset-head": _BY_COLOUR[GREY],
    "retrained_network": _BY_COLOUR[BLACK],
    "reset-network": _BY_COLOUR[BLACK],
    "l2": GREEN,
    "redo": PINK,
}


@dataclass(frozen=True)
class Panel:
    """How a metric is drawn. The texts have the places of `_words`, such as ``{samples}``.

    Attributes:
        title: Title of the picture.
        short: Title of its panel in the overview.
        label: Label of the axis of values.
        meaning: What it is, for the caption.
        factor: What the values are multiplied by.
    """

    title: str
    short: str
    label: str
    meaning: str
    factor: float = 1.0

    def filled(self, words: Mapping[str, str]) -> "Panel":
        """Fill the places in the texts."""
        texts = {name: getattr(self, name).format(**words) for name in ("title", "short", "label", "meaning")}
        return Panel(**texts, factor=self.factor)


def _panels() -> dict[str, Panel]:
    accuracy = "the accuracy on the {samples} samples of all classes so far{why}, at the end of each task"
    found = {
        of.RELATIVE: Panel(
            "{Samples} accuracy relative to {baseline}",
            "Relative accuracy",
            "percentage points",
            f"{accuracy}, minus that of {{baseline}}",
            100,
        ),
        of.ACCURACY: Panel("{Samples} accuracy", "{Samples} accuracy", "accuracy, %", accuracy, 100),
        of.LOSS: Panel(
            "{Samples} loss",
            "{Samples} loss",
            "cross-entropy, nats",
            "the mean cross-entropy on the {samples} samples of all classes so far{why}, at the end of each task",
        ),
        WEIGHTS: Panel(
            "Weight magnitude", "Weights", "mean |p|", "the mean magnitude of all parameters at each boundary"
        ),
        of.KERNEL_RANK: Panel(
            "Effective rank of the kernel",
            "Kernel: eff. rank",
            "effective rank",
            "the effective rank of the kernel of the whole probe at each boundary",
        ),
        of.KERNEL_DISTANCE: Panel(
            "Distance of the kernel",
            "Kernel: distance",
            "1 − cosine",
            "the distance of the kernel of the whole probe from that at the boundary before",
        ),
    }
    units = {
        "dormant_units": ("Dormant units", "% of the units", "the hidden units that are active on few samples", 100),
        "effective_rank": ("Effective rank", "{rank}", "the effective rank of the last hidden layer's activations", 1),
        "stable_rank": ("Rank of 99 %", "{rank}", "the number of singular values that have 99 % of their sum, of the "
                        "last hidden layer's activations", 1),
    }  # fmt: skip
    samples = {
        NEXT: ("next task", "on samples of the next task, before it is learned"),
        PREVIOUS: ("previous tasks", "on samples of all tasks so far"),
    }
    for view, (name, where) in samples.items():
        for measure, (title, label, meaning, factor) in units.items():
            panel = Panel(f"{title}, {name}", title, label, f"{meaning}, {where}", factor)
            found[f"{view}_{measure}_analysis"] = panel
    return found


PANELS = _panels()
# The panels of the overview: those of the publication, weights, and the kernel beside them.
OVERVIEW = (
    of.RELATIVE,
    "next_task_dormant_units_analysis",
    "next_task_stable_rank_analysis",
    WEIGHTS,
    of.KERNEL_RANK,
    of.KERNEL_DISTANCE,
)


def draw_algorithms(
    results: Sequence[Results], metrics: Sequence[str] = (), baseline: Results | None = None
) -> tuple[list[Picture], dict[str, str]]:
    """Draw results of algorithms.

    Args:
        results: The algorithms.
        metrics: Names of metrics; none for all, and an overview of the most important ones.
        baseline: The algorithm that relative accuracies are relative to.

    Returns:
        The pictures, and the reason for each that is left out.

    Raises:
        UnknownNameError: If there is no such metric.
        InputError: If a metric that is named cannot be drawn.
    """
    curves, left_out = dict[str, Mapping[str, Curve]](), dict[str, str]()
    for metric in metrics or METRICS:
        try:
            curves[metric] = _curves(results, metric, baseline)
        except InputError as error:
            if metrics:
                raise
            left_out[metric] = str(error)
    lines, panels = _lines(results), {}
    for metric, found in curves.items():
        shown = [each for each in results if each.name in found]
        panels[metric] = PANELS[metric].filled(_words(shown, baseline if metric == of.RELATIVE else None))
    drawn = [_draw_metric(metric, panels[metric], found, lines) for metric, found in curves.items()]
    if not metrics and len(overview := {name: curves[name] for name in OVERVIEW if name in curves}) > 1:
        drawn.insert(0, _draw_overview(overview, panels, lines))
    return drawn, left_out


def _words(results: Sequence[Results], baseline: Results | None) -> dict[str, str]:
    """Choose the words that depend on the results of a picture: the samples of accuracies, ranks, the baseline."""
    compared = [*results] if baseline is None else [*results, baseline]
    places = {each.name: each.evaluated_on for each in compared}
    kinds = {place.split()[0] for place in places.values()}
    samples = kinds.pop() if len(kinds) == 1 else "held-out"
    told = set(places.values())
    why = told.pop() if len(told) == 1 else "; ".join(f"{name}: {place}" for name, place in places.items())
    return {
        "samples": samples,
        "Samples": samples.capitalize(),
        "why": "" if samples == "test" else f" ({why})",
        "rank": "rank / features" if are_divided(results) else "rank",
        "baseline": baseline.name if baseline else "",
    }


def _curves(results: Sequence[Results], metric: str, baseline: Results | None) -> dict[str, Curve]:
    """Compute the curves of a metric.

    Raises:
        UnknownNameError: If there is no such metric.
        InputError: If no algorithm has values, or a relative accuracy has no baseline.
    """
    found = curves_of(results, metric, baseline)
    if not found:
        remedy = (
            "Record the runs with `kernels` at the end of each task."
            if metric in {of.KERNEL_RANK, of.KERNEL_DISTANCE}
            else "Run `ntkgen cl-analyze --units` with them."
        )
        raise InputError(
            f"No algorithm has values of {metric}: expected some of {', '.join(each.name for each in results)}, found "
            f"none. Are the runs not finished, or not analysed? {remedy}"
        )
    return found


def _lines(results: Sequence[Results]) -> dict[str, Line]:
    """Choose the line of each algorithm: a fixed one by its name, otherwise one that is left."""
    used = {FIXED[each.name] for each in results if each.name in FIXED}
    left = [line for line in (OCHRE, PINK, GREEN, *LINES) if line not in used] or [OCHRE]
    others = [each.name for each in results if each.name not in FIXED]
    chosen = {name: left[index % len(left)] for index, name in enumerate(others)}
    return {each.name: FIXED.get(each.name) or chosen[each.name] for each in results}


def _draw_metric(metric: str, panel: Panel, curves: Mapping[str, Curve], lines: Mapping[str, Line]) -> Picture:
    with styled():
        figure, (axes,) = new_axes()
        _draw(axes, metric, panel, curves, lines)
        axes.set(title=panel.title)
        legend(axes)
    caption = f"{panel.meaning[0].upper()}{panel.meaning[1:]}. {_bands(curves)}"
    return Picture(metric.replace("_", "-"), panel.title, caption, figure)


def _draw_overview(
    shown: Mapping[str, Mapping[str, Curve]], of_metric: Mapping[str, Panel], lines: Mapping[str, Line]
) -> Picture:
    columns = 2 if len(shown) in {2, 4} else 3
    rows = -(-len(shown) // columns)
    with styled():
        figure, panels = new_axes(columns, rows=rows, height=1.1 + 2.3 * rows)
        for axes, (metric, curves) in zip(panels, shown.items(), strict=False):
            _draw(axes, metric, of_metric[metric], curves, lines)
            for line in axes.lines:
                line.set_markersize(3)
            axes.set(title=of_metric[metric].short)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        most = max(range(len(shown)), key=lambda place: len(list(shown.values())[place]))
        legend(panels[most])
    told = "; ".join(of_metric[metric].meaning for metric in shown)
    caption = f"Over the number of classes: {told}. {_bands(next(iter(shown.values())))}"
    return Picture("plasticity", "Loss of plasticity", caption, figure)


def _draw(axes: "Axes", metric: str, panel: Panel, curves: Mapping[str, Curve], lines: Mapping[str, Line]) -> None:
    """Draw the mean of each algorithm with a band of one standard error on each side."""
    if metric == of.RELATIVE:
        axes.axhline(0, color="0.45", linewidth=0.9, zorder=0)
    for name, curve in curves.items():
        style = lines[name].style(len(curve.classes))
        mean, error = panel.factor * curve.mean, panel.factor * curve.standard_error
        axes.plot(curve.classes, mean, label=name, **style)
        axes.fill_between(curve.classes, mean - error, mean + error, color=style["color"], alpha=OPACITY, linewidth=0)
    if "dormant" in metric:
        top = max(axes.get_ylim()[1], 1.0)  # where no unit is dormant too
        axes.set_ylim(-0.03 * top, top)
    axes.set(xlabel="number of classes", ylabel=panel.label)
    axes.locator_params(axis="x", integer=True)


def _bands(curves: Mapping[str, Curve]) -> str:
    counts = {name: curve.num_seeds for name, curve in curves.items()}
    shared = set(counts.values())
    if shared == {1}:
        return "One seed each."
    told = f"{shared.pop()}" if len(shared) == 1 else ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"Lines are means over seeds ({told}), bands are ± one standard error."
