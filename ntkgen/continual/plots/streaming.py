"""Pictures of runs that learn permuted streams: accuracy and plasticity over the tasks, and the kernel beside them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ntkgen.analysis.plots.style import Picture, styled
from ntkgen.continual.plots.lines import Curve, draw_curves, legend_below, panels_with_legend
from ntkgen.continual.streaming.bins import TASKS, drawn_bins
from ntkgen.continual.streaming.comparing import PLACE, notes_on, settings_of
from ntkgen.continual.streaming.labels import labels_of
from ntkgen.continual.streaming.record import BIN, COMBINATION, SEED, TASK
from ntkgen.continual.streaming.summary import HELD_OUT, held_out_of
from ntkgen.units import counted

if TYPE_CHECKING:
    import xarray

# The measures of a stream in a picture, with the titles of their panels and of their axes.
PANELS = {
    "accuracy": ("Accuracy", "part of the samples of a task"),
    "plasticity": ("Plasticity", "1 − loss after / loss before the step"),
    HELD_OUT: ("Held-out accuracy", "part of the test samples"),
}
# The measures of a kernel beside them.
OF_KERNELS = {
    "effective_rank": ("Kernel: effective rank", "rank"),
    "distance": ("Kernel: distance", "1 − cosine with the first one"),
}
# Lines of a picture, at most. More could not be told apart.
SHOWN = 20


def curves_of(runs: Sequence["xarray.Dataset"], measure: str, last: int | None = None) -> list[Curve]:
    """List a measure of every learner and combination, over all whole tasks or the last ones; see `read_stream`.

    Runs without this measure have no curve.
    """
    found, dim = [], TASK if measure == HELD_OUT else BIN
    for run in runs:
        values = held_out_of(run) if measure == HELD_OUT else run[measure]
        if values is None or not values.sizes[dim]:
            continue
        whole = _whole(run, values.sizes[dim], measure)
        own = values.isel({dim: whole if last is None else whole[-last:]}).transpose(dim, COMBINATION, SEED)
        at = np.asarray(own.samples.values)
        found += [
            Curve(name, at, np.asarray(own.values[:, index], np.float64)) for index, name in enumerate(labels_of(run))
        ]
    return found


def draw_streams(runs: Sequence["xarray.Dataset"], last: int | None = None) -> Picture:
    """Draw accuracy and plasticity over the samples: means over seeds, with bands of one standard error.

    Accuracy on test samples is drawn too, if it was measured. Of more than `SHOWN` combinations the best are drawn.

    Args:
        runs: What the runs have measured.
        last: Number of bins at the end that are drawn; None for all.
    """
    curves = {name: curves_of(runs, name, last) for name in PANELS}
    panels = {name: title for name, title in PANELS.items() if curves[name]}
    names = best_names(runs)
    part = "" if last is None else ", the last task" if last == 1 else f", the last {counted(last, 'task')}"
    with styled():
        found = [curve for curve in curves["accuracy"] if curve.name in names]
        title = f"{_title(runs)}{part}{_left_out(runs)}"
        figure, axes = panels_with_legend(len(panels), [curve.label for curve in found], _with_notes(title, runs))
        for panel, (measure, (title, label)) in zip(axes, panels.items(), strict=True):
            shown = [curve for curve in curves[measure] if curve.name in names]
            draw_curves(panel, shown, [names.index(curve.name) for curve in shown], _period(runs))
            panel.set(title=title, ylabel=label)
        legend_below(axes[0], _bands(runs))
    kind = "stream" if last is None else "stream-end"
    return Picture(kind, _title(runs), f"{_caption(runs)}{f' Shown are{part[1:]}.' if part else ''}", figure)


def draw_kernels(run: "xarray.Dataset", kernels: Sequence[Sequence["xarray.Dataset"]]) -> Picture:
    """Draw effective rank and distance of the kernel beside the plasticity of a run, for each combination.

    Args:
        run: What the run has measured.
        kernels: The metrics of the kernels of each combination and seed; see `kernel_metrics`.
    """
    names = best_names([run])
    chosen = [index for index, name in enumerate(labels_of(run)) if name in names]
    curves = curves_of([run], "plasticity")
    plasticity = [curves[index] for index in chosen]
    with styled():
        title = _with_notes(f"{stream_title(run)}: kernel of a fixed probe{_left_out([run])}", [run])
        figure, axes = panels_with_legend(3, [curve.label for curve in plasticity], title)
        draw_curves(axes[0], plasticity, period=_period([run]))
        axes[0].set(title="Plasticity", ylabel=PANELS["plasticity"][1])
        at = np.asarray(kernels[0][0].iteration.values)
        for panel, (name, (title, label)) in zip(axes[1:], OF_KERNELS.items(), strict=True):
            values = [np.stack([np.asarray(each[name].values, np.float64) for each in row], 1) for row in kernels]
            # without networks that diverge before the second kernel: the first one is that of all
            kept = [order for order, index in enumerate(chosen) if np.isfinite(values[index][1:2].mean(1)).all()]
            own = [Curve(curves[chosen[order]].name, at, values[chosen[order]]) for order in kept]
            draw_curves(panel, own, kept, _period([run]), len(chosen))
            panel.set(title=title, ylabel=label)
        legend_below(axes[0], _bands([run]))
    caption = (
        f"{_caption([run])} The kernels are those of a fixed probe; the distance is 1 − cosine, from the first kernel. "
        "Combinations with a network that diverges before the second kernel are left out."
    )
    return Picture("stream-kernels", f"{_title([run])}: kernel", caption, figure)


def _whole(run: "xarray.Dataset", count: int, measure: str) -> list[int]:
    """Number the bins of whole tasks, or the whole tasks on which held-out accuracy was measured."""
    settings = settings_of(run)
    kind = TASKS if measure == HELD_OUT else settings.bins
    drawn = drawn_bins(settings.num_samples, settings.permuted.period, kind, count)
    return [index for index, is_drawn in enumerate(drawn) if is_drawn]


def _period(runs: Sequence["xarray.Dataset"]) -> int | None:
    """Samples of a task; None if the runs differ in them."""
    found = {settings_of(run).permuted.period for run in runs}
    return found.pop() if len(found) == 1 else None


def best_names(runs: Sequence["xarray.Dataset"]) -> list[str]:
    """Name the combinations that are drawn, in their order: all, or the `SHOWN` with the best average accuracy."""
    curves = curves_of(runs, "accuracy")
    means = [float(np.nan_to_num(curve.values.mean(), nan=-1.0)) for curve in curves]
    chosen = sorted(range(len(curves)), key=lambda index: -means[index])[:SHOWN]
    return [curves[index].name for index in sorted(chosen)]


def stream_title(run: "xarray.Dataset") -> str:
    """Say which stream, data and network a run has, and the end of its place."""
    place = "/".join(str(run.attrs.get(PLACE, "")).rstrip("/").split("/")[-2:])
    return f"{place}: {_title([run])}" if place else _title([run])


def _title(runs: Sequence["xarray.Dataset"]) -> str:
    settings = [settings_of(run) for run in runs]
    parts = [dict.fromkeys(str(getattr(each, name)) for each in settings) for name in ("stream", "dataset", "model")]
    stream, dataset, model = (" and ".join(part) for part in parts)
    return f"{stream} {dataset}, {model}"


def _left_out(runs: Sequence["xarray.Dataset"]) -> str:
    count = sum(run.sizes[COMBINATION] for run in runs if run.sizes[BIN])
    return f"; the {SHOWN} combinations of {count} with the best accuracy" if count > SHOWN else ""


def _with_notes(title: str, runs: Sequence["xarray.Dataset"]) -> str:
    return "; ".join([title, *notes_on(runs).hindering])


def _bands(runs: Sequence["xarray.Dataset"]) -> str:
    """Say what lines and bands are."""
    counts = sorted({run.sizes[SEED] for run in runs})
    if counts == [1]:
        return "one seed"
    if len(counts) == 1:
        return f"mean over {counts[0]} seeds ± standard error"
    return f"mean over {counts[0]} to {counts[-1]} seeds ± standard error"


def _caption(runs: Sequence["xarray.Dataset"]) -> str:
    settings, seeds = settings_of(runs[0]), max(run.sizes[SEED] for run in runs)
    bands = "bands or bars are ± one standard error" if seeds > 1 else "without bands"
    has_cut = any(len(_whole(run, run.sizes[BIN], "accuracy")) < run.sizes[BIN] for run in runs)
    whole = " Lines have whole tasks alone." if has_cut else ""
    notes = "".join(f" Note: {note}." for note in notes_on(runs).all)
    held_out = (
        f" Held-out accuracy is that on {settings.held_out} test samples at the end of each task."
        if settings.held_out
        else ""
    )
    return (
        f"A stream of single samples, {_title(runs)}. "
        "Accuracy is that of each sample before its step; plasticity is the part of its loss that its own step takes "
        f"away.{held_out} Lines are means over {counted(seeds, 'seed')}, {bands}{_left_out(runs)}.{whole}{notes}"
    )
