"""All answers about one kernel, for pictures and reports: saved ones, and those that are quick to compute.

An answer is quick to compute if the kernel and its eigenvectors fit in memory. For a larger kernel only saved answers
are used, because a computation could take days.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field

from ntkgen.analysis import defaults
from ntkgen.analysis.alignment import AlignAnswer, AlignSettings, align
from ntkgen.analysis.answer import Answer
from ntkgen.analysis.comparison import CompareAnswer, CompareSettings, compare, reference_of
from ntkgen.analysis.determinant import LogdetAnswer, LogdetSettings, logdet
from ntkgen.analysis.eigenvalue_density import DensityAnswer, DensitySettings, density
from ntkgen.analysis.eigenvalues import SpectrumAnswer, SpectrumSettings, spectrum
from ntkgen.analysis.extrapolation import ExtrapolateAnswer
from ntkgen.analysis.gradient_flow import FlowAnswer, FlowSettings, flow
from ntkgen.analysis.matrix import Matrix, memory_left
from ntkgen.analysis.regression import RegressAnswer, RegressSettings, regress
from ntkgen.analysis.results import AnAnswer, Kept, kept_answers
from ntkgen.errors import InputError, NtkgenError
from ntkgen.progress import Report, ignore_report

# Kinds of answers, in the order of the report.
KINDS: tuple[type[Answer], ...] = (
    SpectrumAnswer, DensityAnswer, LogdetAnswer, ExtrapolateAnswer, RegressAnswer, FlowAnswer, AlignAnswer,
)  # fmt: skip
QUESTIONS = tuple(kind.QUESTION for kind in KINDS)
# Memory per entry of the kernel in bytes: the matrix, its eigenvectors, and LAPACK's workspace in float64.
BYTES_PER_ENTRY = 24
# Maximum memory of a computation without a memory limit. Larger kernels would take minutes.
QUICK_BYTES = 10**9
# Maximum number of modes in an answer of the question `flow`.
MAX_MODES = 1000
# Number of eigenvalues and of angles in a comparison.
TOP = 50


@dataclass(frozen=True)
class Answers:
    """Answers about a kernel.

    Attributes:
        matrix: The kernel.
        found: The answers by question.
        lacking: The reason for each missing answer, by question.
    """

    matrix: Matrix
    found: Mapping[str, Kept[Answer]]
    lacking: Mapping[str, str] = field(default_factory=dict)

    def get(self, kind: type[AnAnswer]) -> AnAnswer | None:
        """Return the answer of a kind, or None if it is missing."""
        kept = self.found.get(kind.QUESTION)
        return kept.answer if kept is not None and isinstance(kept.answer, kind) else None


def gather(
    matrix: Matrix,
    memory_bytes: int | None = None,
    questions: Sequence[str] = QUESTIONS,
    report: Report = ignore_report,
) -> Answers:
    """Read the saved answers, and compute the missing ones if the kernel fits in memory."""
    found, lacking = dict[str, Kept[Answer]](), dict[str, str]()
    kept = kept_answers(matrix, KINDS)
    for question in questions:
        saved = [each for each in kept if question == each.answer.QUESTION]
        best = max(saved, key=lambda each: _richness(each.answer), default=None)
        if best is not None:
            found[question] = best
        if question not in _COMPUTING or (best is not None and _is_usual(best.answer)):
            continue
        try:
            _require_small(matrix, question, memory_bytes)
            found[question] = _as_saved(matrix, _COMPUTING[question](matrix, memory_bytes, report))
        except NtkgenError as error:
            if best is None or not _is_drawable(best.answer):
                found.pop(question, None)
                lacking[question] = str(error)
    return Answers(matrix, found, lacking)


def _as_saved(matrix: Matrix, answer: Answer) -> Kept[Answer]:
    """Find a new answer among the saved ones, which have its settings. An answer that was not saved has none."""
    values = answer.to_keep()
    saved = (kept for kept in kept_answers(matrix, [type(answer)]) if kept.answer.to_keep() == values)
    return Kept(answer, next((kept.asked for kept in saved), {}))


def compare_all(
    matrices: Sequence[Matrix], memory_bytes: int | None = None, report: Report = ignore_report
) -> tuple[list[CompareAnswer], dict[str, str]]:
    """Compare the first kernel with each other one. Return the comparisons, and the reason for each refused store."""
    found, lacking = list[CompareAnswer](), dict[str, str]()
    for matrix in matrices[1:]:
        try:
            found.append(_comparison(matrices[0], matrix, memory_bytes, report))
        except NtkgenError as error:
            lacking[matrix.name] = str(error)
    return found, lacking


def _comparison(first: Matrix, second: Matrix, memory_bytes: int | None, report: Report) -> CompareAnswer:
    """Read the saved comparison with the most eigenvalues, or compute one."""
    reference = reference_of(first)
    kept = [each.answer for each in kept_answers(second, [CompareAnswer]) if each.asked["reference"] == reference]
    if kept:
        return dataclasses.replace(max(kept, key=_richness), reference=first.name, reference_dtype=first.dtype)
    _require_small(second, f"compare {first.name}", memory_bytes)
    top = min(TOP, second.num_rows, first.num_rows)
    return compare(first, second, CompareSettings(top, memory_bytes=memory_bytes), report=report)


def _is_usual(answer: Answer) -> bool:
    """Return whether an answer has the default settings, so that answers about several kernels can be compared."""
    match answer:
        case DensityAnswer():
            return answer.bandwidth == defaults.BANDWIDTH
        case LogdetAnswer():
            return answer.shift == defaults.SHIFT
        case RegressAnswer():
            return answer.offset == defaults.OFFSET
        case FlowAnswer():
            return (answer.loss, answer.rate, answer.offset) == (defaults.LOSS, defaults.RATE, defaults.OFFSET)
    return True


def _is_drawable(answer: Answer) -> bool:
    """Return whether an answer can be drawn. Gradient flow of the cross-entropy cannot, since it has no modes."""
    return not isinstance(answer, FlowAnswer) or answer.energies is not None


def _richness(answer: Answer) -> tuple[bool, bool, int, float, int]:
    """Rank an answer: default settings first, then test samples, the number of listed values, and a small shift."""
    has_test = isinstance(answer, RegressAnswer | FlowAnswer) and answer.test_accuracy is not None
    shift = answer.shift if isinstance(answer, LogdetAnswer | ExtrapolateAnswer) else 0.0
    to = answer.to if isinstance(answer, ExtrapolateAnswer) else 0
    return _is_usual(answer), has_test, _size(answer), -shift, to


def _size(answer: Answer) -> int:
    """Count the values that an answer lists."""
    listed: Sized | None = None
    match answer:
        case SpectrumAnswer() | CompareAnswer():
            listed = answer.eigenvalues
        case DensityAnswer():
            listed = answer.density
        case LogdetAnswer():
            listed = answer.prefixes
        case ExtrapolateAnswer():
            listed = answer.coefficients
        case RegressAnswer():
            listed = answer.shifts
        case FlowAnswer():
            listed = answer.times
        case AlignAnswer():
            listed = answer.output_alignment
    return len(listed or ())


def is_small(matrix: Matrix, memory_bytes: int | None) -> bool:
    """Return whether a kernel and its eigenvectors fit in memory.

    Without ``memory_bytes`` the limit is 1 GB, for which a computation takes about a minute.
    """
    available = memory_left(memory_bytes) if memory_bytes is not None else min(memory_left(None), QUICK_BYTES)
    return BYTES_PER_ENTRY * matrix.num_rows**2 <= available


def _require_small(matrix: Matrix, question: str, memory_bytes: int | None) -> None:
    """Refuse a computation that could take long.

    Raises:
        InputError: If the kernel does not fit in memory with its eigenvectors.
    """
    if not is_small(matrix, memory_bytes):
        raise InputError(
            f"The answer is missing: expected the result of `ntkgen analyze {question} {matrix.name}` beside the "
            "store, found none. It is not computed here, because the kernel does not fit in memory and it could take "
            "long. Run that command first, or raise `memory_bytes`."
        )


def _spectrum(matrix: Matrix, memory_bytes: int | None, report: Report) -> Answer:
    return spectrum(matrix, SpectrumSettings(memory_bytes=memory_bytes), report=report)


def _density(matrix: Matrix, memory_bytes: int | None, report: Report) -> Answer:
    return density(matrix, DensitySettings(memory_bytes=memory_bytes), report=report)


def _logdet(matrix: Matrix, memory_bytes: int | None, report: Report) -> Answer:
    return logdet(matrix, LogdetSettings(prefixes=True, memory_bytes=memory_bytes), report=report)


def _regress(matrix: Matrix, memory_bytes: int | None, report: Report) -> Answer:
    return regress(matrix, RegressSettings(memory_bytes=memory_bytes), report=report)


def _flow(matrix: Matrix, memory_bytes: int | None, report: Report) -> Answer:
    num_modes = min(matrix.num_rows, MAX_MODES)
    return flow(matrix, FlowSettings(num_modes=num_modes, memory_bytes=memory_bytes), report=report)


def _align(matrix: Matrix, memory_bytes: int | None, report: Report) -> Answer:
    return align(matrix, AlignSettings(memory_bytes=memory_bytes), report=report)


# Computation of the answer to each question, with default settings.
_COMPUTING: Mapping[str, Callable[[Matrix, int | None, Report], Answer]] = {
    "spectrum": _spectrum,
    "density": _density,
    "logdet": _logdet,
    "regress": _regress,
    "flow": _flow,
    "align": _align,
}
