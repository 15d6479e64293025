"""Pictures of kernel ridge regression: errors and accuracies against λ."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.analysis.plots.style import LINES, Picture, legend, new_axes, plain, scale_for, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]

ERRORS = {
    "train_error": "training",
    "loo_error": "leave one sample out",
    "gcv": "generalised cross-validation",
    "test_error": "test",
}
ACCURACIES = {"train_accuracy": "training", "loo_accuracy": "leave one sample out", "test_accuracy": "test"}


def draw_regression(result: Result) -> Picture:
    """Draw the errors of kernel ridge regression against λ and, where they are known, the accuracies."""
    accuracies = [name for name in ACCURACIES if _known(result, name)]
    with styled():
        figure, panels = new_axes(2 if accuracies else 1)
        _draw_lines(panels[0], result, ERRORS)
        drawn = [line.get_ydata() for line in panels[0].lines]
        panels[0].set(title="Error", yscale=scale_for(*drawn), ylabel="mean squared error per output")
        panels[0].set_ylim(bottom=_lowest(result))
        if accuracies:
            shown = {**result, **{name: [_percent(value) for value in result[name]] for name in accuracies}}
            _draw_lines(panels[1], shown, ACCURACIES)
            panels[1].set(title="Accuracy", ylabel="samples classified correctly, %")
        legend(panels[0])
    return Picture("regression", "Kernel ridge regression", _caption(result), figure)


def _lowest(result: Result) -> float | None:
    """Choose where the axis of errors ends below: the training error goes on to zero, and would flatten the others."""
    others = [value for name in ERRORS if name != "train_error" for value in result.get(name) or [] if value]
    training = [value for value in result["train_error"] if value]
    return None if not others or not training else max(min(others) / 30, 0.5 * min(*training, *others))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _known(result: Result, name: str) -> bool:
    return any(value is not None for value in result.get(name) or [])


def _draw_lines(axes: "Axes", result: Result, names: Mapping[str, str]) -> None:
    """Draw a line for each series that is known; the same series has the same line in every panel."""
    shifts = np.asarray(result["shifts"], dtype=np.float64)
    kinds = dict(zip(ERRORS.values(), LINES, strict=False))
    for name, label in names.items():
        if _known(result, name):
            values = np.array([np.nan if value is None else value for value in result[name]], dtype=np.float64)
            axes.plot(shifts, values, label=label, **kinds[label].style(len(shifts)))
    axes.set(xscale="log" if (shifts > 0).all() else "symlog", xlabel="ridge λ, in units of K")


def _caption(result: Result) -> str:
    """Say where the left-out error is least."""
    name = next((name for name in ("loo_error", "gcv") if _known(result, name)), None)
    if name is None:
        return "Errors of kernel ridge regression on the one-hot labels, against the ridge λ."
    values = [np.inf if value is None else value for value in result[name]]
    best = int(np.argmin(values))
    accuracy = (result.get("loo_accuracy") or [None] * len(values))[best]
    rightly = "" if accuracy is None else f", where {100 * accuracy:.1f} % of the samples are classified correctly"
    return (
        f"Kernel ridge regression on the one-hot labels. The error of {ERRORS[name]} is least, {plain(values[best])}, "
        f"at λ = {plain(result['shifts'][best])}{rightly}."
    )
