"""The report on stored kernels: answers and pictures → one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

from ntkgen.analysis.answers import compare_all, gather
from ntkgen.analysis.matrix import Matrix
from ntkgen.analysis.plots.draw import KINDS, draw_all
from ntkgen.analysis.report.content import Paragraph, Section
from ntkgen.analysis.report.page import write_page
from ntkgen.analysis.report.sections import comparison, overview, sections_of, title_of
from ntkgen.progress import Report, ignore_report

LEAD = (
    "The empirical neural tangent kernel is K = J Jᵀ. The Jacobian J has the derivatives of a network’s outputs on all "
    "samples with respect to its parameters."
)


@dataclass(frozen=True)
class Made:
    """A finished report.

    Attributes:
        page: The page in HTML.
        lacking: For each kernel the reason for each missing answer, by question.
    """

    page: bytes
    lacking: tuple[dict[str, str], ...]


def make_report(matrices: Sequence[Matrix], memory_bytes: int | None = None, report: Report = ignore_report) -> Made:
    """Write a report on stored kernels.

    Saved answers are read. Missing answers are computed if the kernel fits in memory.
    """
    answers_of_all = [gather(matrix, memory_bytes, report=report) for matrix in matrices]
    titles = [title_of(answers) for answers in answers_of_all]
    drawn = [sections_of(answers, draw_all(answers, KINDS, report)) for answers in answers_of_all]
    if len(answers_of_all) == 1:
        title, sections = titles[0], list(drawn[0])
    else:
        title = f"{len(answers_of_all)} neural tangent kernels"
        compared = comparison(*compare_all(matrices, memory_bytes, report))
        names = [matrix.name.rstrip("/").rpartition("/")[2] for matrix in matrices]
        sections = [overview(answers_of_all), compared]
        each = zip(names, titles, drawn, strict=True)
        sections += [Section(name, [Paragraph(words)], parts) for name, words, parts in each]
    lacking = tuple(dict(answers.lacking) for answers in answers_of_all)
    return Made(write_page(title, [Paragraph(LEAD, "soft")], sections), lacking)
