"""The page on some kernels, put together: answers, pictures, words."""

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
    "The empirical neural tangent kernel is K = J Jᵀ: J holds the derivatives of a network’s outputs on some samples, "
    "by its parameters."
)


@dataclass(frozen=True)
class Made:
    """A page, and for each of its kernels what could not be answered, with the reason."""

    page: bytes
    lacking: tuple[dict[str, str], ...]


def make_report(matrices: Sequence[Matrix], memory_bytes: int | None = None, report: Report = ignore_report) -> Made:
    """Write a page on some kernels: what lies beside their stores and, of those that fit in memory, the rest."""
    every = [gather(matrix, memory_bytes, report=report) for matrix in matrices]
    titles = [title_of(answers) for answers in every]
    drawn = [sections_of(answers, draw_all(answers, KINDS, report)) for answers in every]
    if len(every) == 1:
        title, sections = titles[0], list(drawn[0])
    else:
        title = f"{len(every)} neural tangent kernels"
        compared = comparison(*compare_all(matrices, memory_bytes, report))
        names = [matrix.name.rstrip("/").rpartition("/")[2] for matrix in matrices]
        sections = [overview(every), compared]
        each = zip(names, titles, drawn, strict=True)
        sections += [Section(name, [Paragraph(words)], parts) for name, words, parts in each]
    return Made(write_page(title, [Paragraph(LEAD, "soft")], sections), tuple(dict(a.lacking) for a in every))
