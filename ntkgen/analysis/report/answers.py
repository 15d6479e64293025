"""Every answer that is to be had of a kernel: what lies beside its store, and what is quick to find out.

Quick is what fits into memory as one matrix. Of a larger kernel nothing is begun that could take days.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ntkgen.analysis.matrix import Matrix, memory_left
from ntkgen.analysis.results import VERSION, identity_of, kept_files
from ntkgen.errors import InputError, NtkgenError
from ntkgen.progress import Report, ignore_report

Result = dict[str, Any]

# What a kernel is asked, in the order of the page. Of several results the one with most of this is taken.
QUESTIONS = {
    "spectrum": "eigenvalues",
    "density": "density",
    "logdet": "prefixes",
    "extrapolate": "coefficients",
    "regress": "shifts",
    "flow": "times",
    "align": "output_alignment",
}
COMPARISON = "compare"
RICHNESS = {**QUESTIONS, COMPARISON: "eigenvalues"}
# The matrix, its eigenvectors, and LAPACK's workspace.
BYTES_PER_ENTRY = 24
# Of kernels that take more, pictures find nothing out by themselves, unless a budget is given: it takes minutes.
QUICK_BYTES = 10**9
MAX_MODES = 1000
# How questions are asked unless somebody wants something else.
USUAL: Mapping[str, Mapping[str, Any]] = {
    "density": {"bandwidth": 0.1},
    "logdet": {"shift": 0.0},
    "regress": {"offset": "zero"},
    "flow": {"loss": "squared", "rate": 1.0, "offset": "zero"},
}
# Eigenvalues and angles of two kernels that are compared in passing.
TOP = 50


@dataclass(frozen=True)
class Answers:
    """What is known of a kernel, by question; and why the rest is not."""

    matrix: Matrix
    found: Mapping[str, Result]
    lacking: Mapping[str, str] = field(default_factory=dict)


def gather(
    matrix: Matrix,
    memory_bytes: int | None = None,
    questions: Sequence[str] = tuple(QUESTIONS),
    report: Report = ignore_report,
) -> Answers:
    """Read what was found out before and, where the kernel fits in memory, find out the rest."""
    found, lacking = dict[str, Result](), dict[str, str]()
    kept = _kept(matrix)
    for question in questions:
        best = max((result for result in kept if result["kind"] == question), key=_richness, default=None)
        if best is not None:
            found[question] = best
        if question not in _ASKING or (best is not None and _is_usual(best)):
            continue
        try:
            found[question] = _ask(matrix, question, memory_bytes, report)
        except NtkgenError as error:
            if best is None or not _is_drawable(best):
                found.pop(question, None)
                lacking[question] = str(error)
    return Answers(matrix, found, lacking)


def compare_all(
    matrices: Sequence[Matrix], memory_bytes: int | None = None, report: Report = ignore_report
) -> tuple[list[Result], dict[str, str]]:
    """Compare the first kernel with each other one; where they cannot be compared, say why, by store."""
    from ntkgen.analysis.comparison import CompareSettings, compare

    found, lacking = list[Result](), dict[str, str]()
    for matrix in matrices[1:]:
        reference = _identity(matrices[0])
        kept = [result for result in _kept(matrix) if result["kind"] == COMPARISON and result["reference"] == reference]
        try:
            if not kept:
                _require_small(matrix, f"{COMPARISON} {matrices[0].name}", memory_bytes)
                top = min(TOP, matrix.num_rows, matrices[0].num_rows)
                settings = CompareSettings(top, memory_bytes=memory_bytes)
                kept = [{**compare(matrices[0], matrix, settings, report=report).to_json(), "kind": COMPARISON}]
            best: Result = max(kept, key=_richness)
            found.append({**best, "reference": matrices[0].name})
        except NtkgenError as error:
            lacking[matrix.name] = str(error)
    return found, lacking


def _identity(matrix: Matrix) -> list[Any]:
    """Say which kernel it is, as `compare` keeps it."""
    manifest = matrix.store.manifest
    return [manifest.fingerprint, manifest.replanned, matrix.dtype, matrix.output]


def _is_usual(result: Result) -> bool:
    """Say whether a question was asked as others are, so that answers of several kernels can be compared."""
    return all(result.get(name, value) == value for name, value in USUAL.get(result["kind"], {}).items())


def _is_drawable(result: Result) -> bool:
    """Say whether a result has what pictures are made of: the flow of the cross-entropy has no modes."""
    return result["kind"] != "flow" or "energies" in result


def _richness(result: Result) -> tuple[bool, bool, int, float, int]:
    """Say how much a result holds; what was asked as usual comes first, and of equals the one with the least shift."""
    size = len(result.get(RICHNESS[result["kind"]]) or [])
    shift, to = float(result.get("shift") or 0.0), int(result.get("to") or 0)
    return _is_usual(result), "test_accuracy" in result, size, -shift, to


def _kept(matrix: Matrix) -> list[Result]:
    """Read the results beside the store that are of this matrix, each with its kind."""
    folder = kept_files(matrix)
    kept: list[Result] = []
    if folder is None:
        return kept
    for name in sorted(folder.sizes()):
        kind, _, rest = name.rpartition("-")
        if kind in RICHNESS and rest.endswith(".json") and (result := _read(matrix, folder.read(name))):
            kept.append({**result, "kind": kind, "store": matrix.name})
    return kept


def _read(matrix: Matrix, data: bytes | None) -> Result | None:
    """Read a result, if it is whole and of this very matrix, with what was asked."""
    try:
        result: Result = json.loads(data or b"")
        identity = result.pop("identity")
    except (ValueError, KeyError):
        return None
    wanted = {**identity_of(matrix), "version": VERSION}
    if {name: identity.get(name) for name in wanted} != wanted:
        return None
    return {**identity["settings"], **result, "asked": identity["settings"]}


def is_small(matrix: Matrix, memory_bytes: int | None) -> bool:
    """Say whether a kernel fits in memory with its eigenvectors; without a budget, in what takes a minute or so."""
    room = memory_left(memory_bytes) if memory_bytes is not None else min(memory_left(None), QUICK_BYTES)
    return BYTES_PER_ENTRY * matrix.num_rows**2 <= room


def _ask(matrix: Matrix, question: str, memory_bytes: int | None, report: Report) -> Result:
    """Find out what nobody has asked before, with the usual settings."""
    _require_small(matrix, question, memory_bytes)
    return {**_ASKING[question](matrix, memory_bytes, report), "kind": question}


def _require_small(matrix: Matrix, question: str, memory_bytes: int | None) -> None:
    """Refuse to begin what could take long.

    Raises:
        InputError: If it could.
    """
    if not is_small(matrix, memory_bytes):
        raise InputError(
            f"Nobody has asked this yet: expected the result of `ntkgen analyze {question} {matrix.name}` beside the "
            "store, found none, and of a kernel that does not fit in memory it could take long. Run that command "
            "first, or raise --memory."
        )


def _spectrum(matrix: Matrix, memory_bytes: int | None, report: Report) -> Result:
    from ntkgen.analysis.eigenvalues import SpectrumSettings, spectrum

    return spectrum(matrix, SpectrumSettings(memory_bytes=memory_bytes), report=report).to_json()


def _density(matrix: Matrix, memory_bytes: int | None, report: Report) -> Result:
    from ntkgen.analysis.eigenvalue_density import DensitySettings, density

    return density(matrix, DensitySettings(memory_bytes=memory_bytes), report=report).to_json()


def _logdet(matrix: Matrix, memory_bytes: int | None, report: Report) -> Result:
    from ntkgen.analysis.determinant import LogdetSettings, logdet

    return logdet(matrix, LogdetSettings(prefixes=True, memory_bytes=memory_bytes), report=report).to_json()


def _regress(matrix: Matrix, memory_bytes: int | None, report: Report) -> Result:
    from ntkgen.analysis.regression import RegressSettings, regress

    return regress(matrix, RegressSettings(memory_bytes=memory_bytes), report=report).to_json()


def _flow(matrix: Matrix, memory_bytes: int | None, report: Report) -> Result:
    from ntkgen.analysis.gradient_flow import FlowSettings, flow

    settings = FlowSettings(num_modes=min(matrix.num_rows, MAX_MODES), memory_bytes=memory_bytes)
    return flow(matrix, settings, report=report).to_json()


def _align(matrix: Matrix, memory_bytes: int | None, report: Report) -> Result:
    from ntkgen.analysis.alignment import AlignSettings, align

    return align(matrix, AlignSettings(memory_bytes=memory_bytes), report=report).to_json()


_ASKING: Mapping[str, Callable[[Matrix, int | None, Report], Result]] = {
    "spectrum": _spectrum,
    "density": _density,
    "logdet": _logdet,
    "regress": _regress,
    "flow": _flow,
    "align": _align,
}
