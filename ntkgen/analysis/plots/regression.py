"""Figures of kernel ridge regression: errors and accuracies against λ."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ntkgen.analysis.plots.style import LINES, Picture, legend, new_axes, plain, scale_for, styled
from ntkgen.analysis.regression import RegressAnswer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Mapping[str, Sequence[float | None]]

# Names of the curves, in the order of their line styles.
TRAINING, LEFT_OUT, VALIDATION, TEST = "training", "leave-one-out", "generalised cross-validation", "test"


def draw_regression(answer: RegressAnswer) -> Picture:
    """Draw the errors of kernel ridge regression against λ and, where they are known, the accuracies."""
    errors, accuracies = _errors(answer), _accuracies(answer)
    with styled():
        figure, panels = new_axes(2 if accuracies else 1)
        _draw_lines(panels[0], answer.shifts, errors)
        drawn = [line.get_ydata() for line in panels[0].lines]
        panels[0].set(title="Error", yscale=scale_for(*drawn), ylabel="mean squared error per output")
        panels[0].set_ylim(bottom=_lowest(errors))
        if accuracies:
            percent = {label: [_percent(value) for value in values] for label, values in accuracies.items()}
            _draw_lines(panels[1], answer.shifts, percent)
            panels[1].set(title="Accuracy", ylabel="samples classified correctly, %")
        legend(panels[0])
    return Picture("regression", "Kernel ridge regression", _caption(answer), figure)


def _errors(answer: RegressAnswer) -> Series:
    return _known(
        {
            TRAINING: answer.train_error,
            LEFT_OUT: answer.loo_error,
            VALIDATION: answer.gcv,
            TEST: answer.test_error,
        }
    )


def _accuracies(answer: RegressAnswer) -> Series:
    return _known({TRAINING: answer.train_accuracy, LEFT_OUT: answer.loo_accuracy, TEST: answer.test_accuracy})


def _known(series: Mapping[str, Sequence[float | None] | None]) -> Series:
    """Drop the curves that have no known value."""
    return {label: values for label, values in series.items() if values and any(value is not None for value in values)}


def _lowest(errors: Series) -> float | None:
    """Choose the lower end of the error axis; a training error close to zero would compress the other curves."""
    others = [value for label, values in errors.items() if label != TRAINING for value in values if value]
    training = [value for value in errors.get(TRAINING, ()) if value]
    return None if not others or not training else max(min(others) / 30, 0.5 * min(*training, *others))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _draw_lines(axes: "Axes", shifts: Sequence[float], series: Series) -> None:
    """Draw one curve per series; a series has the same line style in every panel."""
    x = np.asarray(shifts, dtype=np.float64)
    lines = dict(zip((TRAINING, LEFT_OUT, VALIDATION, TEST), LINES, strict=False))
    for label, values in series.items():
        y = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        axes.plot(x, y, label=label, **lines[label].style(len(x)))
    axes.set(xscale="log" if (x > 0).all() else "symlog", xlabel="ridge λ, in units of K")


def _caption(answer: RegressAnswer) -> str:
    """State the smallest leave-one-out error and its λ; if it is not known, use the cross-validation score."""
    errors = _errors(answer)
    name = LEFT_OUT if LEFT_OUT in errors else VALIDATION
    values = [np.inf if value is None else value for value in errors[name]]
    best = int(np.argmin(values))
    accuracies = _accuracies(answer).get(LEFT_OUT)
    accuracy = None if accuracies is None else accuracies[best]
    correct = "" if accuracy is None else f", where {100 * accuracy:.1f} % of the samples are classified correctly"
    return (
        f"Kernel ridge regression on the one-hot labels. The {name} error is smallest, {plain(values[best])}, "
        f"at λ = {plain(answer.shifts[best])}{correct}."
    )
