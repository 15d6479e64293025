"""Every picture of a kernel: which there are, what each is drawn from, and how it becomes a file."""

from collections.abc import Callable, Mapping, Sequence

from ntkgen.analysis.plots.flow import draw_flow, draw_modes
from ntkgen.analysis.plots.logdet import draw_logdet
from ntkgen.analysis.plots.matrix import draw_matrix
from ntkgen.analysis.plots.regression import draw_regression
from ntkgen.analysis.plots.spectrum import draw_alignment, draw_density, draw_spectrum
from ntkgen.analysis.plots.style import Picture
from ntkgen.analysis.report.answers import Answers
from ntkgen.progress import Report, ignore_report

Draw = Callable[[Answers], Picture]


def _draw_logdet(answers: Answers) -> Picture:
    result, law = answers.found["logdet"], answers.found.get("extrapolate")
    if law is not None and law["shift"] != result["shift"]:
        law = None
    return draw_logdet(result, answers.matrix.num_outputs, law)


# What each picture is drawn from, and how.
_DRAWN: Mapping[str, tuple[str, Draw]] = {
    "spectrum": ("spectrum", lambda answers: draw_spectrum(answers.found["spectrum"], answers.matrix.error_norm)),
    "density": ("density", lambda answers: draw_density(answers.found["density"])),
    "modes": ("flow", lambda answers: draw_modes(answers.found["flow"])),
    "flow": ("flow", lambda answers: draw_flow(answers.found["flow"])),
    "alignment": ("align", lambda answers: draw_alignment(answers.found["align"])),
    "logdet": ("logdet", _draw_logdet),
    "regression": ("regress", lambda answers: draw_regression(answers.found["regress"])),
}
KINDS = ("matrix", *_DRAWN, "comparison")


def questions_for(kinds: Sequence[str]) -> tuple[str, ...]:
    """Say which answers some pictures need."""
    needed = [_DRAWN[kind][0] for kind in kinds if kind in _DRAWN]
    return (*needed, *["extrapolate"] * ("logdet" in kinds))


def draw_all(answers: Answers, kinds: Sequence[str], report: Report = ignore_report) -> dict[str, Picture]:
    """Draw the pictures of one kernel that can be drawn, by kind."""
    pictures = {"matrix": draw_matrix(answers.matrix, report)} if "matrix" in kinds else {}
    for kind, (question, draw) in _DRAWN.items():
        if kind in kinds and question in answers.found:
            pictures[kind] = draw(answers)
    return pictures


def left_out(answers: Answers, kinds: Sequence[str]) -> dict[str, str]:
    """Say why some pictures cannot be drawn."""
    return {
        kind: answers.lacking[question]
        for kind, (question, _) in _DRAWN.items()
        if kind in kinds and question in answers.lacking
    }
