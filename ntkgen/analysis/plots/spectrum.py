"""Figures of the eigenvalues, of their density, and of the alignment of the kernel with the labels.

The certificate of a store, which some figures show as a line, is a measured bound on the error of the stored kernel.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.analysis.alignment import AlignAnswer
from ntkgen.analysis.eigenvalue_density import DensityAnswer
from ntkgen.analysis.eigenvalues import SpectrumAnswer
from ntkgen.analysis.matrix import FloatArray
from ntkgen.analysis.plots.style import (
    BLACK,
    DARK,
    GREY,
    LINES,
    WARM,
    Picture,
    legend,
    new_axes,
    plain,
    scale_for,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Maximum number of labelled bars.
MAX_BARS = 40
# Minimum ratio of an error bound to its value at which the bound is drawn; smaller ones are thinner than the line.
VISIBLE = 0.02


def draw_spectrum(answer: SpectrumAnswer, error_norm: float | None = None) -> Picture:
    """Draw the eigenvalues in descending order, and the share of the trace of the first k eigenvalues.

    Args:
        answer: The answer of `spectrum`.
        error_norm: Upper bound on ‖E‖_F from the certificate, which bounds the error of every eigenvalue; None
            without one.
    """
    values = np.asarray(answer.eigenvalues, dtype=np.float64)
    with styled():
        figure, (left, right) = new_axes(2)
        _draw_eigenvalues(left, values, answer.residual_bounds, error_norm)
        _draw_cumulated(right, values, answer)
        legend(left)
    return Picture("spectrum", "Eigenvalues", _spectrum_caption(values, answer, error_norm), figure)


def _draw_eigenvalues(axes: "Axes", values: FloatArray, bounds: Sequence[Any], error_norm: float | None) -> None:
    """Draw magnitudes on logarithmic axes, negative eigenvalues as crosses, and the certificate's bound as a line."""
    numbers = np.arange(1, len(values) + 1)
    is_positive = values > 0
    axes.plot(numbers[is_positive], values[is_positive], label="eigenvalue λₖ", **LINES[0].style(len(values)))
    if (values < 0).any():
        axes.plot(numbers[values < 0], -values[values < 0], "x", color=WARM, label="|λₖ| of negative ones")
    half = np.asarray([bound or 0.0 for bound in bounds] or [0.0] * len(values))
    if (half > VISIBLE * np.abs(values)).any():
        low = np.maximum(values - half, np.abs(values).max() * 1e-18)
        axes.fill_between(numbers, low, values + half, color=DARK, alpha=0.25, linewidth=0, label="± residual bound")
    if error_norm:
        axes.axhline(error_norm, color=GREY, linestyle="--", label="certificate: bound on ‖E‖$_F$")
    scale = scale_for(np.abs(values))
    axes.set(xscale="log", yscale=scale, xlabel="index k, in descending order", ylabel="eigenvalue λₖ of K")
    axes.set_title("Spectrum")


def _draw_cumulated(axes: "Axes", values: FloatArray, answer: SpectrumAnswer) -> None:
    """Draw Σ_{i≤k} λᵢ / tr K, and the effective rank as a vertical line."""
    trace = float(answer.trace or values.sum()) or 1.0
    axes.plot(np.arange(1, len(values) + 1), 100 * np.cumsum(values) / trace, **LINES[0].style(len(values)))
    rank = answer.effective_rank
    axes.axvline(rank, color=WARM, linestyle="--")
    is_late = rank > len(values) ** 0.8  # then the text does not fit to the right of the line
    axes.annotate(
        f"effective rank {plain(rank)}", (rank, 3), xytext=(-4 if is_late else 4, 0), textcoords="offset points",
        color=WARM, rotation=90, va="bottom", ha="right" if is_late else "left",
    )  # fmt: skip
    axes.set(xscale="log", ylim=(0, 103), xlabel="first k eigenvalues", ylabel="share of the trace, %")
    axes.set_title("Cumulative")


def _spectrum_caption(values: FloatArray, answer: SpectrumAnswer, error_norm: float | None) -> str:
    rows = answer.rows
    which = f"All {rows:,} eigenvalues"
    if len(values) < rows:
        which = f"The {len(values):,} largest of {rows:,} eigenvalues"
    floor = ""
    if error_norm:
        floor = (
            f" The certificate, a measured error bound, gives ‖E‖_F ≤ {plain(error_norm)}. Eigenvalues below that are "
            "indistinguishable from zero."
        )
    right = "On the right: the share of the trace of the first k eigenvalues"
    return f"{which}, from {plain(values[0])} to {plain(values[-1])}. {right}.{floor}"


def draw_density(answer: DensityAnswer) -> Picture:
    """Draw the density of the eigenvalues on a logarithmic axis, and the fraction of them above each value.

    Args:
        answer: The answer of `density`.
    """
    values = 10.0 ** np.asarray(answer.log10_eigenvalues, dtype=np.float64)
    density = np.asarray(answer.density, dtype=np.float64)
    errors = np.nan_to_num(np.asarray(answer.density_errors, dtype=np.float64))  # None below ``resolved_above``
    with styled():
        figure, (left, right) = new_axes(2)
        left.plot(values, density, color=DARK, label="density")
        if (errors > VISIBLE * density.max(initial=0)).any():
            low = np.maximum(density - errors, 0)
            left.fill_between(
                values, low, density + errors, color=DARK, alpha=0.25, linewidth=0, label="± two standard errors"
            )
        right.plot(values, 100 * np.asarray(answer.fraction_above), color=DARK)
        _mark_limits(left, right, answer)
        scale = scale_for(values)
        left.set(title="Density", xscale=scale, xlabel="eigenvalue λ of K", ylabel="share of all per decade", ylim=0)
        right.set(title="Cumulative", xscale=scale, xlabel="eigenvalue λ of K", ylabel="share of all above λ, %")
        legend(left)
    return Picture("density", "Density of eigenvalues", _density_caption(answer), figure)


def _mark_limits(left: "Axes", right: "Axes", answer: DensityAnswer) -> None:
    """Mark the values below which the error of the stored matrix, or the method, hides single eigenvalues."""
    limits = {
        "certificate: bound on ‖E‖$_F$": (answer.error_norm, GREY, "--"),
        "resolved above": (answer.resolved_above, WARM, ":"),
    }
    for label, (limit, color, linestyle) in limits.items():
        if limit:
            left.axvline(limit, color=color, linestyle=linestyle, label=label)
            right.axvline(limit, color=color, linestyle=linestyle)


def _density_caption(answer: DensityAnswer) -> str:
    how = "from all eigenvalues" if answer.method == "all" else f"by Lanczos quadrature with {answer.probes} vectors"
    share, bound = answer.fraction_off_axis, "negative or hidden by rounding"
    if answer.error_norm and answer.log10_eigenvalues:
        above = np.interp(np.log10(answer.error_norm), answer.log10_eigenvalues, answer.fraction_above)
        share, bound = max(0.0, 1 - float(above)), "below the bound on ‖E‖_F, and so indistinguishable from zero"
    return (
        f"Share of the eigenvalues per decade, {how}. Each eigenvalue is drawn as a Gaussian with a standard deviation "
        f"of {plain(answer.bandwidth)} decades. {plain(100 * share, 2)} % of the eigenvalues are {bound}."
    )


def draw_alignment(answer: AlignAnswer) -> Picture:
    """Draw the alignment of each output's kernel with its labels, and that of the whole kernel."""
    by_output = {"plain": answer.output_alignment, "centred": answer.output_centered_alignment}
    whole = {"plain": answer.alignment, "centred": answer.centered_alignment}
    count = len(by_output["plain"])
    with styled():
        figure, (axes,) = new_axes(1)
        for index, (name, color) in enumerate({"plain": DARK, "centred": "#9ec9e8"}.items()):
            heights = [value or 0.0 for value in by_output[name]]
            places = np.arange(count) + 0.4 * (index - 0.5)
            axes.bar(places, heights, 0.4, color=color, edgecolor=BLACK, linewidth=0.5, label=f"{name}, one output")
            if (height := whole[name]) is not None:
                line = {"plain": "-", "centred": "--"}[name]
                axes.axhline(height, color=WARM, linestyle=line, label=f"{name}, whole kernel")
        axes.axhline(0, color=BLACK, linewidth=0.8)
        names = answer.output_names
        axes.set(xlabel=names[0].split()[0], ylabel="alignment with the labels", title="Kernel–target alignment")
        axes.grid(visible=False, axis="x")
        stride = -(-count // MAX_BARS)
        axes.set_xticks(range(0, count, stride), [name.split()[1] for name in names[::stride]])
        legend(axes)
    caption = (
        f"Alignment of the kernel with the kernel y yᵀ of the one-hot labels y, at most 1: {_number(whole['plain'])} "
        f"for the whole kernel, {_number(whole['centred'])} after centring. The bars show the alignment of the n × n "
        "kernel of each output."
    )
    return Picture("alignment", "Alignment with the labels", caption, figure)


def _number(value: float | None) -> str:
    return "undefined" if value is None else plain(value)
