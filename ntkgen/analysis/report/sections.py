"""The sections of the report about a kernel. A section without an answer has the reason instead.

The certificate of a store is a measured bound on the error of its kernel.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ntkgen.analysis.alignment import AlignAnswer
from ntkgen.analysis.answers import Answers
from ntkgen.analysis.comparison import CompareAnswer, Cost
from ntkgen.analysis.determinant import LogdetAnswer
from ntkgen.analysis.eigenvalues import SpectrumAnswer
from ntkgen.analysis.extrapolation import ExtrapolateAnswer, warnings_of
from ntkgen.analysis.plots.compare import draw_comparison, short
from ntkgen.analysis.plots.style import Picture, plain
from ntkgen.analysis.regression import RegressAnswer
from ntkgen.analysis.report.content import Code, Facts, Figure, Paragraph, Part, Section, Table
from ntkgen.analysis.report.reproduce import citation, question_command, recipe_of
from ntkgen.store.describe import StoreDescription, describe
from ntkgen.units import human_bytes

if TYPE_CHECKING:
    from ntkgen.store.certificate import StoredError

# Maximum number of eigenvalues in the table. The saved answer beside the store has all.
MAX_LISTED = 50
NO_CERTIFICATE = "The store has no certificate (measured error bound). `ntkgen verify --certify` makes one."

Pictures = Mapping[str, Picture]


def title_of(answers: Answers) -> str:
    """Write a short title for a kernel."""
    made = answers.matrix.store.manifest.provenance
    if made.imported_from is not None:
        return f"Kernel imported from {made.imported_from}"
    if made.model is None:
        return f"Kernel of {answers.matrix.name.rpartition('/')[2]}"
    return f"Neural tangent kernel of {made.model} on {'?' if made.dataset is None else made.dataset}"


def sections_of(answers: Answers, pictures: Pictures) -> tuple[Section, ...]:
    """Write all sections about one kernel."""
    described = describe(answers.matrix.store)
    return (
        _what(answers, described, pictures),
        _spectrum(answers, pictures),
        _logdet(answers, pictures),
        _regression(answers, pictures),
        _alignment(answers, pictures),
        _certificate(described),
        _provenance(described),
        _reproduce(answers),
        Section("How to cite", [Code(citation(answers.matrix.store))]),
    )


def _shown(pictures: Pictures, *kinds: str) -> list[Part]:
    return [Figure(pictures[kind]) for kind in kinds if kind in pictures]


def _what(answers: Answers, described: StoreDescription, pictures: Pictures) -> Section:
    matrix = answers.matrix
    samples = f"{described.num_samples:,} samples × {described.num_outputs} outputs"
    stored = f"{', '.join(described.arrays)}; layout {described.layout}, {human_bytes(described.stored_bytes)}"
    lines = {
        "Kernel": f"{described.quantity}, {described.rows:,} × {described.cols:,}: {samples}",
        "Output map": described.output,
        "Network": _network(described),
        "Data": described.provenance.dataset,
        "Stored": stored,
        "Analysed here": f"ntk_{matrix.dtype}" + _part(answers),
        "Computed in": described.precision,
        "Path": described.store,
    }
    listed = Facts(_known(lines), "The kernel")
    return Section("The kernel", [*_wrong(described), listed, *_shown(pictures, "matrix")])


def _network(described: StoreDescription) -> str | None:
    model, accuracy = described.provenance.model, described.provenance.train_accuracy
    if model is None:
        return None
    trained = "without training" if accuracy is None else f"trained to {accuracy:.2f} % of the training samples"
    return f"{model}, {described.num_params:,} parameters, {trained}"


def _part(answers: Answers) -> str:
    if not answers.matrix.is_partial:
        return ""
    rows, whole = answers.matrix.num_rows, answers.matrix.store.grid.num_rows
    return f", the first {rows:,} of {whole:,} rows, because tiles of the others are missing"


def _lacking(answers: Answers, question: str) -> list[Part]:
    """Write the reason for a missing answer."""
    return [Paragraph(answers.lacking[question], "soft")] if question in answers.lacking else []


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out unknown values."""
    return {title: value for title, value in values.items() if value is not None}


def _spectrum(answers: Answers, pictures: Pictures) -> Section:
    answer = answers.get(SpectrumAnswer)
    if answer is None:
        return Section("Spectrum", _lacking(answers, "spectrum"))
    numbers = {
        "Trace, Σ λ": answer.trace,
        "Frobenius norm, ‖K‖_F": answer.frobenius_norm,
        "Effective rank, exp of the entropy": answer.effective_rank,
        "Participation ratio, (Σ λ)² / Σ λ²": answer.participation_ratio,
        "Stable rank, ‖K‖²_F / λ₁²": answer.stable_rank,
        "Condition number, λ₁ / λ_N": answer.condition,
    }
    listed = Facts(_known(numbers), "Numbers of the spectrum")
    return Section(
        "Spectrum", [listed, *_noise(answer), *_shown(pictures, "spectrum", "density"), _eigenvalues(answer)]
    )


def _noise(answer: SpectrumAnswer) -> list[Part]:
    """Warn if the smallest eigenvalue, and with it the condition number, is only that of the stored numbers."""
    bound, smallest = answer.error_norm, answer.smallest
    if answer.condition is None or bound is None or smallest is None or smallest > bound:
        return []
    words = (
        f"The smallest eigenvalue, {plain(smallest)}, is below the bound ‖E‖_F ≤ {plain(bound)}. It and the condition "
        "number are those of the stored numbers only."
    )
    return [Paragraph(words, "warning")]


def _eigenvalues(answer: SpectrumAnswer) -> Table:
    """List the largest eigenvalues with their residual bounds and their shares of the trace."""
    pairs = zip(answer.eigenvalues[:MAX_LISTED], answer.residual_bounds, strict=False)
    rows = [
        (number, value, bound, 100 * value / answer.trace if answer.trace else None)
        for number, (value, bound) in enumerate(pairs, 1)
    ]
    columns = ("k", "Eigenvalue λₖ", "Residual bound", "Share of the trace, %")
    return Table(columns, rows, "The largest eigenvalues")


def _logdet(answers: Answers, pictures: Pictures) -> Section:
    answer = answers.get(LogdetAnswer)
    if answer is None:
        return Section("Log-determinant", _lacking(answers, "logdet"))
    numbers = {
        "log |det (K + λI)|, nats": answer.logdet,
        "Sign": answer.sign,
        "λ": answer.shift,
        "Nats per row": answer.logdet_per_row,
        "Smallest pivot": answer.smallest_pivot,
    }
    listed = Facts(numbers, "Numbers of the log-determinant")
    warnings = [Paragraph(warning, "warning") for warning in answer.warnings]
    return Section("Log-determinant", [listed, *warnings, *_shown(pictures, "logdet"), *_law(answers)])


def _law(answers: Answers) -> list[Part]:
    answer = answers.get(ExtrapolateAnswer)
    if answer is None:
        return []
    numbers = {
        "Predicted log-determinant, nats": answer.logdet,
        "ν": answer.nu,
        "Error on held-out prefixes, nats": answer.holdout_error,
        "Relative error on held-out prefixes": answer.holdout_error_relative,
    }
    words = f"Log-determinant of {answer.to:,} samples, extrapolated from the leading blocks of this kernel:"
    warnings = [Paragraph(warning, "warning") for warning in warnings_of(answer)]
    return [Paragraph(words), *warnings, Facts(_known(numbers), "Extrapolation")]


def _regression(answers: Answers, pictures: Pictures) -> Section:
    answer = answers.get(RegressAnswer)
    if answer is None:
        return Section("Regression", _lacking(answers, "regress"))
    series: dict[str, Sequence[float | None] | None] = {
        "λ": answer.shifts,
        "Training error": answer.train_error,
        "Leave-one-out error": answer.loo_error,
        "GCV": answer.gcv,
        "Test error": answer.test_error,
        "Training, %": _in_percent(answer.train_accuracy),
        "Leave-one-out, %": _in_percent(answer.loo_accuracy),
        "Test, %": _in_percent(answer.test_accuracy),
    }
    known = {title: each for title, each in series.items() if any(value is not None for value in each or ())}
    rows = list(zip(*(each for each in known.values() if each is not None), strict=True))
    start = "zero" if answer.offset == "zero" else "the network’s logits"
    words = (
        f"Kernel ridge regression on the one-hot labels, starting from {start}. Errors are mean squared errors per "
        "output. Leave-one-out removes each sample with all its outputs. GCV is generalised cross-validation. Columns "
        "in % are accuracies."
    )
    listed = Table(tuple(known), rows, "Regression")
    return Section("Regression", [Paragraph(words), *_shown(pictures, "regression"), listed])


def _in_percent(values: Sequence[float | None] | None) -> list[float | None]:
    return [None if value is None else 100 * value for value in values or ()]


def _alignment(answers: Answers, pictures: Pictures) -> Section:
    answer = answers.get(AlignAnswer)
    if answer is None:
        return Section("Alignment with the labels", _lacking(answers, "align"))
    each = zip(answer.output_names, answer.output_alignment, answer.output_centered_alignment, strict=True)
    rows = [(name.removeprefix("output "), plain, centred) for name, plain, centred in each]
    rows.append(("whole", answer.alignment, answer.centered_alignment))
    columns = ("Output", "Alignment", "Centred alignment")
    body = [*_shown(pictures, "alignment"), Table(columns, rows, "Alignment by output")]
    body += [*_shown(pictures, "modes", "flow"), *_lacking(answers, "flow")]
    return Section("Alignment with the labels", body)


def _wrong(described: StoreDescription) -> list[Part]:
    return [] if described.inaccuracy is None else [Paragraph(described.inaccuracy, "warning")]


def _certificate(described: StoreDescription) -> Section:
    found = described.certificate
    if found is None:
        return Section("Precision certificate", [Paragraph(NO_CERTIFICATE)])
    words = "The certificate is a measured bound on the error E = stored − exact kernel. " + (
        "Every entry was compared, so that ‖E‖_F is exact. No eigenvalue has an error above it."
        if found.is_exact
        else f"It was estimated with {found.num_probes} Gaussian vectors and {found.num_pairs} pairs of samples (seed "
        f"{found.seed}). With 95 % confidence, no eigenvalue has an error above the bound on ‖E‖_F."
    )
    norm = "‖E‖_F" if found.is_exact else "‖E‖_F, estimate"
    columns: dict[str, Callable[[StoredError], Any]] = {
        "Stored as": lambda error: error.dtype,
        norm: lambda error: error.error,
        "‖E‖_F, bound": lambda error: error.bound,
        "Bound ÷ ‖K‖_F": lambda error: error.relative_bound,
        "Largest entry error ÷ √(K_rr K_cc)": lambda error: error.max_pair_error,
        "Suspicious blocks": lambda error: len(error.suspicious),
    }
    listed = Table.of(found.errors, columns, "Precision certificate")
    return Section("Precision certificate", [*_wrong(described), Paragraph(words), listed])


def _provenance(described: StoreDescription) -> Section:
    values = described.provenance.to_json()  # includes keys that the user has added
    made = {key.replace("_", " "): value for key, value in values.items() if value is not None}
    lines = {**made, "tile": f"{described.tile_side:,} rows", "fingerprint": described.fingerprint}
    return Section("Provenance", [Facts(lines, "Provenance")])


def _reproduce(answers: Answers) -> Section:
    recipe = recipe_of(answers.matrix.store)
    path = shlex.quote(answers.matrix.name)
    asked = [question_command(kept, answers.matrix.name) for kept in answers.found.values()]
    made: list[Part] = [Code(recipe.commands), *map(Paragraph, recipe.notes)]
    again = Paragraph("To verify the store and to repeat the analyses of this page:")
    return Section("How to reproduce", [*made, again, Code([f"ntkgen verify {path}", *asked])])


# several kernels ------------------------------------------------------------------------------------------------------


def overview(answers_of_all: Sequence[Answers]) -> Section:
    """Compare all kernels of the page in one table."""
    columns: dict[str, Callable[[Answers], Any]] = {
        "Store": lambda answers: short(answers.matrix.name),
        "Rows": lambda answers: answers.matrix.num_rows,
        "Largest eigenvalue": _largest_eigenvalue,
        "Effective rank": _effective_rank,
        "log |det|, nats": _logdet_without_shift,
        "Smallest leave-one-out error": _least_error,
        "Alignment": _alignment_of,
        "‖E‖_F, bound": lambda answers: answers.matrix.error_norm,
    }
    return Section("Overview", [Table.of(answers_of_all, columns, "All kernels of this page")])


def _largest_eigenvalue(answers: Answers) -> float | None:
    answer = answers.get(SpectrumAnswer)
    return answer.eigenvalues[0] if answer else None


def _effective_rank(answers: Answers) -> float | None:
    answer = answers.get(SpectrumAnswer)
    return answer.effective_rank if answer else None


def _logdet_without_shift(answers: Answers) -> float | None:
    answer = answers.get(LogdetAnswer)
    return answer.logdet if answer and not answer.shift else None


def _least_error(answers: Answers) -> float | None:
    answer = answers.get(RegressAnswer)
    return min((value for value in (answer.loo_error if answer else ()) if value is not None), default=None)


def _alignment_of(answers: Answers) -> float | None:
    answer = answers.get(AlignAnswer)
    return answer.alignment if answer else None


def comparison(compared: Sequence[CompareAnswer], refused: Mapping[str, str]) -> Section:
    """Compare the other kernels with the first one."""
    reasons = [Paragraph(reason, "soft") for reason in refused.values()]
    if not compared:
        return Section("Comparison", reasons)
    columns: dict[str, Callable[[CompareAnswer], Any]] = {
        "Store": lambda answer: short(answer.store),
        "Distance": lambda answer: answer.distance,
        "Centred alignment": lambda answer: answer.centered_alignment,
        "Largest angle, degrees": lambda answer: math.degrees(max(answer.principal_angles)),
        "λ₁ ÷ λ₁ of the first": lambda answer: answer.eigenvalue_ratios[0],
    }
    words = Paragraph(f"Differences from {compared[0].reference}, which has the same samples.")
    listed = Table.of(compared, columns, "Comparison")
    costs = [part for answer in compared if answer.cost is not None for part in _cost(answer.store, answer.cost)]
    return Section("Comparison", [words, Figure(draw_comparison(compared)), listed, *costs, *reasons])


def _cost(store: str, cost: Cost) -> list[Part]:
    """Write the error of the lower precision, for two kernels of one network."""
    numbers = {
        "‖difference‖_F ÷ ‖K‖_F": cost.frobenius_error,
        "Largest change of an eigenvalue ÷ λ₁": cost.eigenvalue_error,
        "Largest relative change of an eigenvalue": cost.relative_eigenvalue_error,
        "Eigenvalues that are not positive in the lower precision": cost.not_positive,
        "Change of the log-determinant, nats": cost.logdet_error,
    }
    words = f"Error of the lower precision, which is {cost.lower_dtype} in {cost.lower}."
    return [Paragraph(words), Facts(_known(numbers), f"Cost of {cost.lower_dtype} at {store}")]
