"""All answers to one kernel: those kept beside its store, and those that are quick to compute.

Quick is what fits into memory as one matrix. For a larger kernel nothing is begun that could take days.
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

# What a kernel is asked, in the order of the page.
KINDS: tuple[type[Answer], ...] = (
    SpectrumAnswer, DensityAnswer, LogdetAnswer, ExtrapolateAnswer, RegressAnswer, FlowAnswer, AlignAnswer,
)  # fmt: skip
QUESTIONS = tuple(kind.QUESTION for kind in KINDS)
# The matrix, its eigenvectors, and LAPACK's workspace.
BYTES_PER_ENTRY = 24
# Of kernels that take more, pictures find nothing out by themselves, unless a budget is given: it takes minutes.
QUICK_BYTES = 10**9
MAX_MODES = 1000
# Eigenvalues and angles of two kernels that are compared in passing.
TOP = 50


@dataclass(frozen=True)
class Answers:
    """What is known of a kernel, by question; and why the rest is not."""

    matrix: Matrix
    found: Mapping[str, Kept[Answer]]
    lacking: Mapping[str, str] = field(default_factory=dict)

    def get(self, kind: type[AnAnswer]) -> AnAnswer | None:
        """Pick the answer of a kind, if there is one."""
        kept = self.found.get(kind.QUESTION)
        return kept.answer if kept is not None and isinstance(kept.answer, kind) else None


def gather(
    matrix: Matrix,
    memory_bytes: int | None = None,
    questions: Sequence[str] = QUESTIONS,
    report: Report = ignore_report,
) -> Answers:
    """Read what was found out before and, where the kernel fits in memory, find out the rest."""
    found, lacking = dict[str, Kept[Answer]](), dict[str, str]()
    kept = kept_answers(matrix, KINDS)
    for question in questions:
        same = [each for each in kept if question == each.answer.QUESTION]
        best = max(same, key=lambda each: _richness(each.answer), default=None)
        if best is not None:
            found[question] = best
        if question not in _ASKING or (best is not None and _is_usual(best.answer)):
            continue
        try:
            _require_small(matrix, question, memory_bytes)
            found[question] = Kept(_ASKING[question](matrix, memory_bytes, report), {})
        except NtkgenError as error:
            if best is None or not _is_drawable(best.answer):
                found.pop(question, None)
                lacking[question] = str(error)
    return Answers(matrix, found, lacking)


def compare_all(
    matrices: Sequence[Matrix], memory_bytes: int | None = None, report: Report = ignore_report
) -> tuple[list[CompareAnswer], dict[str, str]]:
    """Compare the first kernel with each other one; where they cannot be compared, say why, by store."""
    found, lacking = list[CompareAnswer](), dict[str, str]()
    for matrix in matrices[1:]:
        try:
            found.append(_comparison(matrices[0], matrix, memory_bytes, report))
        except NtkgenError as error:
            lacking[matrix.name] = str(error)
    return found, lacking


def _comparison(first: Matrix, second: Matrix, memory_bytes: int | None, report: Report) -> CompareAnswer:
    """Read the comparison with the most eigenvalues, or compare now."""
    reference = reference_of(first)
    kept = [each.answer for each in kept_answers(second, [CompareAnswer]) if each.asked["reference"] == reference]
    if kept:
        return dataclasses.replace(max(kept, key=_richness), reference=first.name, reference_dtype=first.dtype)
    _require_small(second, f"compare {first.name}", memory_bytes)
    top = min(TOP, second.num_rows, first.num_rows)
    return compare(first, second, CompareSettings(top, memory_bytes=memory_bytes), report=report)


def _is_usual(answer: Answer) -> bool:
    """Say whether a question was asked as others are, so that answers of several kernels can be compared."""
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
    """Say whether an answer has what pictures are made of: the flow of the cross-entropy has no modes."""
    return not isinstance(answer, FlowAnswer) or answer.energies is not None


def _richness(answer: Answer) -> tuple[bool, bool, int, float, int]:
    """Say how much an answer holds; what was asked as usual comes first, and of equals the one with the least shift."""
    has_test = isinstance(answer, RegressAnswer | FlowAnswer) and answer.test_accuracy is not None
    shift = answer.shift if isinstance(answer, LogdetAnswer | ExtrapolateAnswer) else 0.0
    to = answer.to if isinstance(answer, ExtrapolateAnswer) else 0
    return _is_usual(answer), has_test, _size(answer), -shift, to


def _size(answer: Answer) -> int:
    """Count what an answer lists."""
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
    """Say whether a kernel fits in memory with its eigenvectors; without a budget, in what takes a minute or so."""
    room = memory_left(memory_bytes) if memory_bytes is not None else min(memory_left(None), QUICK_BYTES)
    return BYTES_PER_ENTRY * matrix.num_rows**2 <= room


def _require_small(matrix: Matrix, question: str, memory_bytes: int | None) -> None:
    """Refuse to begin what could take long.

    Raises:
        InputError: If it could.
    """
    if not is_small(matrix, memory_bytes):
        raise InputError(
            f"Nobody has asked this yet: expected the result of `ntkgen analyze {question} {matrix.name}` beside the "
            "store, found none, and of a kernel that does not fit in memory it could take long. Run that command "
            "first, or raise `memory_bytes`."
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


# How a question is asked that has no answer yet: with the usual settings.
_ASKING: Mapping[str, Callable[[Matrix, int | None, Report], Answer]] = {
    "spectrum": _spectrum,
    "density": _density,
    "logdet": _logdet,
    "regress": _regress,
    "flow": _flow,
    "align": _align,
}
