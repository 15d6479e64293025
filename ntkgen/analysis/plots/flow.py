"""Figures of gradient flow: the energy and the learning time of each mode of the kernel, and the loss over time."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.analysis.gradient_flow import FlowAnswer
from ntkgen.analysis.plots.style import DARK, GREY, LINES, Picture, legend, new_axes, plain, scale_for, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_modes(answer: FlowAnswer) -> Picture:
    """Draw the energy of the labels in the first modes of the kernel, and the learning time of each mode."""
    energies = np.asarray(answer.energies or (), dtype=np.float64)
    with styled():
        figure, (left, right) = new_axes(2)
        _draw_cumulated(left, energies, answer.rows)
        _draw_times(right, answer)
        legend(left)
    half = int(np.searchsorted(np.cumsum(energies), 0.5)) + 1
    halved = f"the first {half:,} modes hold half of it" if half <= len(energies) else "they hold less than half of it"
    caption = (
        f"Share of y − f₀, the part of the labels still to be learned, in each of the {len(energies):,} modes with the "
        f"largest eigenvalues: {halved}. A mode is learned after the time c/(ηλₖ)."
    )
    return Picture("modes", "The labels in the modes of the kernel", caption, figure)


def _draw_cumulated(axes: "Axes", energies: "np.ndarray[Any, Any]", rows: int) -> None:
    """Draw Σ_{i≤k} (uᵢᵀ r)² / ‖r‖² with r = y − f₀, and its mean for random labels."""
    numbers = np.arange(1, len(energies) + 1)
    axes.plot(numbers, 100 * np.cumsum(energies), label="these labels", **LINES[0].style(len(numbers)))
    axes.plot(numbers, 100 * numbers / rows, color=GREY, linestyle=":", label="random labels, on average")
    axes.set(xscale="log", ylim=(0, 103), xlabel="first k modes", ylabel="share of the labels, %")
    axes.set_title("Alignment of the top modes")


def _draw_times(axes: "Axes", answer: FlowAnswer) -> None:
    """Draw the energy of each mode against its learning time; skip modes that are never learned."""
    modes = zip(answer.learning_times or (), answer.energies or (), strict=True)
    known = np.array([(time, 100 * energy) for time, energy in modes if time is not None and energy > 0])
    if len(known):
        axes.plot(known[:, 0], known[:, 1], "o", color=DARK, markersize=3, alpha=0.6)
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel="learning time, steps", ylabel="share of the labels in a mode, %", title="Modes")


def draw_flow(answer: FlowAnswer) -> Picture:
    """Draw loss and accuracy against time."""
    times = np.asarray(answer.times, dtype=np.float64)
    with styled():
        figure, (left, right) = new_axes(2)
        left.plot(times, answer.train_loss, **LINES[0].style(len(times)))
        accuracies = {"training": answer.train_accuracy, "test": answer.test_accuracy}
        for (label, accuracy), line in zip(accuracies.items(), LINES, strict=False):
            if accuracy is not None:
                right.plot(times, 100 * np.asarray(accuracy), label=label, **line.style(len(times)))
        left.set(title="Loss", xlabel="time, steps", ylabel=f"{answer.loss} loss", yscale=scale_for(answer.train_loss))
        right.set(title="Accuracy", xlabel="time, steps", ylabel="samples classified correctly, %")
        for axes in (left, right):
            axes.set_xscale("log" if (times > 0).all() else "linear")
        legend(right)
    start = "zero" if answer.offset == "zero" else "the network’s logits"
    caption = (
        f"Gradient flow of the linearised network on the {answer.loss} loss, from {start}, with the learning rate "
        f"{plain(answer.rate)}. At the last time {100 * answer.train_accuracy[-1]:.1f} % of the training samples are "
        "classified correctly."
    )
    return Picture("flow", "Gradient flow", caption, figure)
