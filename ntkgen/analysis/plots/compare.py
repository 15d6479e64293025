"""A picture of what differs between kernels of the same samples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ntkgen.analysis.comparison import CompareAnswer
from ntkgen.analysis.plots.style import BLACK, LINES, Picture, legend, new_axes, plain, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Letters of a store's name that a legend has room for.
MAX_LETTERS = 62


def draw_comparison(answers: Sequence[CompareAnswer]) -> Picture:
    """Draw the eigenvalues of some kernels over those of the first one, and the angles between their eigenspaces.

    Args:
        answers: Answers of `compare` about the same first kernel and some others.
    """
    with styled():
        figure, (left, right) = new_axes(2, height=4.2 + 0.17 * len(answers))
        left.axhline(1, color=BLACK, linewidth=0.8)
        for index, answer in enumerate(answers):
            _draw(left, right, answer, index)
        scale = "log" if _are_positive(answers) else "linear"
        left.set(title="Eigenvalues", yscale=scale)
        left.set(xscale="log", xlabel="number k, the largest first", ylabel="λₖ ÷ λₖ of the first")
        right.set(title="Eigenspaces", xlabel="principal angle, the smallest first", ylabel="angle, degrees")
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
    """Name a store by the end of its path, as far as there is room.

    >>> short("runs/lenet-digits-seed0-n200.zarr")
    'lenet-digits-seed0-n200'
    """
    name = store.rstrip("/").rpartition("/")[2].removesuffix(".zarr")
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS // 2]}…{name[1 - MAX_LETTERS // 2 :]}"


def _caption(answers: Sequence[CompareAnswer]) -> str:
    each = "; ".join(
        f"{short(answer.store)}: distance {_number(answer.distance)}, centred alignment "
        f"{_number(answer.centered_alignment)}"
        for answer in answers
    )
    return f"Compared with {short(answers[0].reference)}: {each}."


def _number(value: float | None) -> str:
    return "undefined" if value is None else plain(value)
