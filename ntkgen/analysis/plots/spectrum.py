"""Pictures of eigenvalues: the spectrum and its sum, its density, and what the labels have to do with it."""

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

MAX_BARS = 40
# A bound that is a smaller part of its eigenvalue is thinner than the line.
VISIBLE = 0.02


def draw_spectrum(answer: SpectrumAnswer, error_norm: float | None = None) -> Picture:
    """Draw eigenvalues against their number, and what share of the trace the first ones have.

    Args:
        answer: The answer of `spectrum`.
        error_norm: The certificate's bound of ‖E‖_F: no eigenvalue is known more closely than that.
    """
    values = np.asarray(answer.eigenvalues, dtype=np.float64)
    with styled():
        figure, (left, right) = new_axes(2)
        _draw_eigenvalues(left, values, answer.residual_bounds, error_norm)
        _draw_cumulated(right, values, answer)
        legend(left)
    return Picture("spectrum", "Eigenvalues", _spectrum_caption(values, answer, error_norm), figure)


def _draw_eigenvalues(axes: "Axes", values: FloatArray, bounds: Sequence[Any], error_norm: float | None) -> None:
    """Draw sizes on logarithmic axes; what is negative as crosses, what nobody knows below a line."""
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
    axes.set(xscale="log", yscale=scale, xlabel="number k, the largest first", ylabel="eigenvalue λₖ of K")
    axes.set_title("Spectrum")


def _draw_cumulated(axes: "Axes", values: FloatArray, answer: SpectrumAnswer) -> None:
    """Draw Σ_{i≤k} λᵢ / tr K."""
    trace = float(answer.trace or values.sum()) or 1.0
    axes.plot(np.arange(1, len(values) + 1), 100 * np.cumsum(values) / trace, **LINES[0].style(len(values)))
    rank = answer.effective_rank
    axes.axvline(rank, color=WARM, linestyle="--")
    is_late = rank > len(values) ** 0.8  # no room to the right of it
    axes.annotate(
        f"effective rank {plain(rank)}", (rank, 3), xytext=(-4 if is_late else 4, 0), textcoords="offset points",
        color=WARM, rotation=90, va="bottom", ha="right" if is_late else "left",
    )  # fmt: skip
    axes.set(xscale="log", ylim=(0, 103), xlabel="first k eigenvalues", ylabel="share of the trace, %")
    axes.set_title("Cumulated")


def _spectrum_caption(values: FloatArray, answer: SpectrumAnswer, error_norm: float | None) -> str:
    rows = answer.rows
    which = f"All {rows:,} eigenvalues"
    if len(values) < rows:
        which = f"The {len(values):,} largest of {rows:,} eigenvalues"
    floor = ""
    if error_norm:
        floor = (
            f" The certificate bounds the error of each by ‖E‖_F ≤ {plain(error_norm)}: the stored matrix does not "
            "tell those below from zero."
        )
    right = "on the right, the share of the trace that the first ones have"
    return f"{which}, from {plain(values[0])} to {plain(values[-1])}; {right}.{floor}"


def draw_density(answer: DensityAnswer) -> Picture:
    """Draw the density of eigenvalues on a logarithmic axis, and what part of them lies above each value.

    Args:
        answer: The answer of `density`.
    """
    values = 10.0 ** np.asarray(answer.log10_eigenvalues, dtype=np.float64)
    density = np.asarray(answer.density, dtype=np.float64)
    errors = np.nan_to_num(np.asarray(answer.density_errors, dtype=np.float64))  # unknown below what is resolved
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
        right.set(title="Counted", xscale=scale, xlabel="eigenvalue λ of K", ylabel="share of all above λ, %")
        legend(left)
    return Picture("density", "Density of eigenvalues", _density_caption(answer), figure)


def _mark_limits(left: "Axes", right: "Axes", answer: DensityAnswer) -> None:
    """Mark below what value the stored matrix, or the method, knows nothing of single eigenvalues."""
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
    return (
        f"The share of the eigenvalues per decade, {how}, each drawn as a Gaussian of {plain(answer.bandwidth)} "
        f"decades. {100 * answer.fraction_off_axis:.2g} % are not positive, or not told from zero."
    )


def draw_alignment(answer: AlignAnswer) -> Picture:
    """Draw the alignment of each output's kernel with its labels, and that of the whole."""
    each = {"plain": answer.output_alignment, "centred": answer.output_centered_alignment}
    whole = {"plain": answer.alignment, "centred": answer.centered_alignment}
    count = len(each["plain"])
    with styled():
        figure, (axes,) = new_axes(1)
        for index, (name, color) in enumerate({"plain": DARK, "centred": "#9ec9e8"}.items()):
            heights = [value or 0.0 for value in each[name]]
            places = np.arange(count) + 0.4 * (index - 0.5)
            axes.bar(places, heights, 0.4, color=color, edgecolor=BLACK, linewidth=0.5, label=f"{name}, one output")
            if (height := whole[name]) is not None:
                line = {"plain": "-", "centred": "--"}[name]
                axes.axhline(height, color=WARM, linestyle=line, label=f"{name}, whole kernel")
        axes.axhline(0, color=BLACK, linewidth=0.8)
        names = answer.output_names
        axes.set(xlabel=names[0].split()[0], ylabel="alignment with the labels", title="Kernel–target alignment")
        axes.grid(visible=False, axis="x")
        every = -(-count // MAX_BARS)
        axes.set_xticks(range(0, count, every), [name.split()[1] for name in names[::every]])
        legend(axes)
    caption = (
        f"How well the kernel agrees with that of the one-hot labels, 1 being y yᵀ itself: {_number(whole['plain'])} "
        f"for the whole, {_number(whole['centred'])} centred; by output, the n × n kernel of that output alone."
    )
    return Picture("alignment", "Alignment with the labels", caption, figure)


def _number(value: float | None) -> str:
    return "undefined" if value is None else plain(value)
