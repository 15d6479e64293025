"""Figure of the log-determinant against the number of samples, with the fitted law."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.analysis.determinant import LogdetAnswer
from ntkgen.analysis.extrapolation import ExtrapolateAnswer
from ntkgen.analysis.matrix import FloatArray
from ntkgen.analysis.plots.style import DARK, LINES, WARM, Picture, legend, new_axes, plain, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Maximum number of points of a curve. Differences are averaged over the prefixes between two points.
MAX_POINTS = 240


def draw_logdet(answer: LogdetAnswer, num_outputs: int, law: ExtrapolateAnswer | None = None) -> Picture:
    """Draw log |det| of the leading blocks against their number of samples, and its increase per sample.

    Args:
        answer: The answer of `logdet`, with its prefixes.
        num_outputs: Number of rows per sample, m.
        law: The answer of `extrapolate` for the same shift. Its curve is drawn up to the predicted number of samples.
    """
    samples, logdets = answer.by_samples(num_outputs)
    x, y = _thinned(np.asarray(samples, dtype=np.float64), np.asarray(logdets, dtype=np.float64))
    with styled():
        figure, (left, right) = new_axes(2)
        points = LINES[0].style(len(x))
        left.plot(x, y, label="leading blocks of the kernel", **points)
        if len(x) > 1:
            right.plot(x[1:], np.diff(y) / np.diff(x), **LINES[0].style(len(x) - 1))
        if law is not None:
            _draw_law(left, right, law, (float(x[0]), float(x[-1])))
        shifted = "K" if not answer.shift else f"(K + {plain(answer.shift)} I)"
        left.set(title="Log-determinant", xlabel="samples n", ylabel=f"log |det {shifted}ₙ|, nats")
        right.set(title="Increase per sample", xlabel="samples n", ylabel="nats per sample", xscale="log")
        legend(left)
    return Picture("logdet", "Log-determinant", _caption(answer, law), figure)


def _thinned(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Select at most `MAX_POINTS` points, evenly on a logarithmic axis, with the first and the last."""
    wanted = np.unique(np.geomspace(1, len(x), MAX_POINTS).round().astype(int)) - 1
    return x[wanted], y[wanted]


def _draw_law(left: "Axes", right: "Axes", law: ExtrapolateAnswer, ends: tuple[float, float]) -> None:
    """Draw the fitted law from the first fitted block to the predicted number of samples, and mark the prediction."""
    known = law.law
    coefficients = np.array([law.coefficients[term] for term in known.terms])
    x = np.geomspace(max(2.0, float(law.fitted_from)), max(float(law.to), ends[1]), MAX_POINTS)
    style: dict[str, Any] = {"color": WARM, "linestyle": "--"}
    left.plot(x, known.basis(x) @ coefficients, label=f"fitted law, ν = {plain(law.nu)}", **style)
    right.plot(x, (known.basis(x) - known.basis(x - 1)) @ coefficients, **style)
    left.plot([law.to], [law.logdet], "*", color=WARM, markersize=10, label=f"at n = {law.to:,}")
    for axes in (left, right):
        axes.axvline(ends[1], color=DARK, linewidth=0.8, linestyle=":")


def _caption(answer: LogdetAnswer, law: ExtrapolateAnswer | None) -> str:
    rows, shift = answer.rows, answer.shift
    shifted = "K" if not shift else f"(K + {plain(shift)} I)"
    caption = (
        f"log |det {shifted}| = {plain(answer.logdet, 8)} nats for {rows:,} rows, or {plain(answer.logdet / rows)} per "
        f"row. The sign of the determinant is {'+' if answer.sign > 0 else '−'}."
    )
    if law is not None:
        caption += (
            f" The law fitted to blocks of {law.fitted_from:,} to {law.fitted_to:,} samples predicts "
            f"{plain(law.logdet, 6)} nats for {law.to:,} samples."
        )
    return caption
