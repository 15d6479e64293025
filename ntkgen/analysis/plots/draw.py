"""Every picture of a kernel: which there are, what each is drawn from, and how it becomes a file."""

from collections.abc import Callable, Mapping, Sequence

from ntkgen.analysis.alignment import AlignAnswer
from ntkgen.analysis.answers import Answers
from ntkgen.analysis.determinant import LogdetAnswer
from ntkgen.analysis.eigenvalue_density import DensityAnswer
from ntkgen.analysis.eigenvalues import SpectrumAnswer
from ntkgen.analysis.extrapolation import ExtrapolateAnswer
from ntkgen.analysis.gradient_flow import FlowAnswer
from ntkgen.analysis.plots.flow import draw_flow, draw_modes
from ntkgen.analysis.plots.logdet import draw_logdet
from ntkgen.analysis.plots.matrix import draw_matrix
from ntkgen.analysis.plots.regression import draw_regression
from ntkgen.analysis.plots.spectrum import draw_alignment, draw_density, draw_spectrum
from ntkgen.analysis.plots.style import Picture
from ntkgen.analysis.regression import RegressAnswer
from ntkgen.progress import Report, ignore_report

Draw = Callable[[Answers], Picture | None]


def _spectrum(answers: Answers) -> Picture | None:
    answer = answers.get(SpectrumAnswer)
    return None if answer is None else draw_spectrum(answer, answers.matrix.error_norm)


def _density(answers: Answers) -> Picture | None:
    answer = answers.get(DensityAnswer)
    return None if answer is None else draw_density(answer)


def _modes(answers: Answers) -> Picture | None:
    answer = answers.get(FlowAnswer)
    return None if answer is None else draw_modes(answer)


def _flow(answers: Answers) -> Picture | None:
    answer = answers.get(FlowAnswer)
    return None if answer is None else draw_flow(answer)


def _alignment(answers: Answers) -> Picture | None:
    answer = answers.get(AlignAnswer)
    return None if answer is None else draw_alignment(answer)


def _logdet(answers: Answers) -> Picture | None:
    answer, law = answers.get(LogdetAnswer), answers.get(ExtrapolateAnswer)
    if answer is None:
        return None
    is_same = law is not None and law.shift == answer.shift
    return draw_logdet(answer, answers.matrix.num_outputs, law if is_same else None)


def _regression(answers: Answers) -> Picture | None:
    answer = answers.get(RegressAnswer)
    return None if answer is None else draw_regression(answer)


# What each picture is drawn from, and how.
_DRAWN: Mapping[str, tuple[str, Draw]] = {
    "spectrum": ("spectrum", _spectrum),
    "density": ("density", _density),
    "modes": ("flow", _modes),
    "flow": ("flow", _flow),
    "alignment": ("align", _alignment),
    "logdet": ("logdet", _logdet),
    "regression": ("regress", _regression),
}
KINDS = ("matrix", *_DRAWN, "comparison")


def questions_for(kinds: Sequence[str]) -> tuple[str, ...]:
    """Say which answers some pictures need."""
    needed = [_DRAWN[kind][0] for kind in kinds if kind in _DRAWN]
    return (*needed, *["extrapolate"] * ("logdet" in kinds))


def draw_all(answers: Answers, kinds: Sequence[str], report: Report = ignore_report) -> dict[str, Picture]:
    """Draw the pictures of one kernel that can be drawn, by kind."""
    pictures = {"matrix": draw_matrix(answers.matrix, report)} if "matrix" in kinds else {}
    for kind, (_, draw) in _DRAWN.items():
        if kind in kinds and (picture := draw(answers)) is not None:
            pictures[kind] = picture
    return pictures


def left_out(answers: Answers, kinds: Sequence[str]) -> dict[str, str]:
    """Say why some pictures cannot be drawn."""
    return {
        kind: answers.lacking[question]
        for kind, (question, _) in _DRAWN.items()
        if kind in kinds and question in answers.lacking
    }
