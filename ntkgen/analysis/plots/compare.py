"""Figure of the differences between kernels of the same samples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ntkgen.analysis.comparison import CompareAnswer
from ntkgen.analysis.plots.style import BLACK, LINES, Picture, legend, new_axes, plain, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Maximum number of characters of a store's name in a legend.
MAX_LETTERS = 62


def draw_comparison(answers: Sequence[CompareAnswer]) -> Picture:
    """Draw the eigenvalues of kernels divided by those of the reference, and the angles between their eigenspaces.

    Args:
        answers: Answers of `compare`, all with the same reference (the first kernel).
    """
    with styled():
        figure, (left, right) = new_axes(2, height=4.2 + 0.17 * len(answers))
        left.axhline(1, color=BLACK, linewidth=0.8)
        for index, answer in enumerate(answers):
            _draw(left, right, answer, index)
        scale = "log" if _are_positive(answers) else "linear"
        left.set(title="Eigenvalues", yscale=scale)
        left.set(xscale="log", xlabel="index k, in descending order", ylabel="λₖ ÷ λₖ of the reference")
        right.set(title="Eigenspaces", xlabel="principal angle, in ascending order", ylabel="angle, degrees")
        right.set_ylim(-2, 92)
        right.set_yticks(range(0, 91, 15))
        legend(left, columns=1)
    return Picture("comparison", "Comparison", _caption(answers), figure)


def _are_positive(answers: Sequence[CompareAnswer]) -> bool:
    return all(ratio is None or ratio > 0 for answer in answers for ratio in answer.eigenvalue_ratios)


def _draw(left: "Axes", right: "Axes", answer: CompareAnswer, index: int) -> None:
    ratios = np.array([np.nan if ratio is None else ratio for ratio in answer.eigenvalue_ratios])
    angles = np.degrees(np.sort(answer.principal_angles))
    line = LINES[index % len(LINES)]
    left.plot(np.arange(1, len(ratios) + 1), ratios, label=short(answer.store), **line.style(len(ratios)))
    right.plot(np.arange(1, len(angles) + 1), angles, **line.style(len(angles)))


def short(store: str) -> str:
    """Return the last part of a store's path without its extension, shortened in the middle if it is too long.

    >>> short("runs/lenet-digits-seed0-n200.zarr")
    'lenet-digits-seed0-n200'
    """
    name = store.rstrip("/").rpartition("/")[2].removesuffix(".zarr")
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS // 2]}…{name[1 - MAX_LETTERS // 2 :]}"


def _caption(answers: Sequence[CompareAnswer]) -> str:
    kernels = "; ".join(
        f"{short(answer.store)}: distance {_number(answer.distance)}, centred alignment "
        f"{_number(answer.centered_alignment)}"
        for answer in answers
    )
    return f"Compared with {short(answers[0].reference)}: {kernels}."


def _number(value: float | None) -> str:
    return "undefined" if value is None else plain(value)
