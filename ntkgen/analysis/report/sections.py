"""What the page says of a kernel, section by section; what is not known is said, with the reason."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ntkgen.analysis.plots.compare import draw_comparison, short
from ntkgen.analysis.plots.style import Picture
from ntkgen.analysis.report.answers import Answers, Result
from ntkgen.analysis.report.page import Section, code, facts, figure, paragraph, table
from ntkgen.analysis.report.reproduce import citation, question_command, recipe_of
from ntkgen.store.describe import describe
from ntkgen.store.manifest import IMPORTED
from ntkgen.units import human_bytes

# Eigenvalues that the table lists; all of them are beside the store.
MAX_LISTED = 50

Pictures = Mapping[str, Picture]


def title_of(answers: Answers) -> str:
    """Name a kernel in a few words."""
    made = answers.matrix.store.manifest.provenance
    if IMPORTED in made:
        return f"Kernel imported from {made[IMPORTED]}"
    if "model" not in made:
        return f"Kernel of {answers.matrix.name.rpartition('/')[2]}"
    return f"Neural tangent kernel of {made['model']} on {made.get('dataset', '?')}"


def sections_of(answers: Answers, pictures: Pictures) -> tuple[Section, ...]:
    """Write everything about one kernel."""
    values = describe(answers.matrix.store)
    return (
        _what(answers, values, pictures),
        _spectrum(answers, pictures),
        _logdet(answers, pictures),
        _regression(answers, pictures),
        _alignment(answers, pictures),
        _certificate(values),
        _provenance(values),
        _reproduce(answers),
        Section("How to cite", code(citation(answers.matrix.store))),
    )


def _shown(pictures: Pictures, *kinds: str) -> str:
    return "".join(figure(pictures[kind]) for kind in kinds if kind in pictures)


def _what(answers: Answers, values: Mapping[str, Any], pictures: Pictures) -> Section:
    matrix = answers.matrix
    n, m = values["num_samples"], values["num_outputs"]
    lines = {
        "Kernel": f"{values['quantity']}, {values['rows']:,} × {values['cols']:,}: {n:,} samples × {m} outputs",
        "Output map": values["output"],
        "Network": _network(values),
        "Data": values["dataset"],
        "Stored": f"{', '.join(values['arrays'])}; layout {values['layout']}, {human_bytes(values['stored_bytes'])}",
        "Looked at here": f"ntk_{matrix.dtype}" + _part(answers),
        "Computed in": values["precision"],
        "Lies at": values["store"],
    }
    known = {key: value for key, value in lines.items() if value is not None}
    return Section("What it is", _wrong(values) + facts(known, "What the kernel is") + _shown(pictures, "matrix"))


def _network(values: Mapping[str, Any]) -> str | None:
    if values["model"] is None:
        return None
    accuracy = values["provenance"].get("train_accuracy")
    trained = "taken as built" if accuracy is None else f"trained to {accuracy:.2f} % of the training samples"
    return f"{values['model']}, {values['num_params']:,} parameters, {trained}"


def _part(answers: Answers) -> str:
    if not answers.matrix.is_partial:
        return ""
    rows, whole = answers.matrix.num_rows, answers.matrix.store.grid.num_rows
    return f", the first {rows:,} of {whole:,} rows; the others are not complete"


def _lacking(answers: Answers, *questions: str) -> str:
    reasons = {answers.lacking[question] for question in questions if question in answers.lacking}
    return "".join(paragraph(reason, kind="soft") for reason in sorted(reasons))


def _numbers(result: Result, names: Mapping[str, str]) -> dict[str, Any]:
    """Pick some numbers of a result that are known, under names for people."""
    return {title: result[key] for key, title in names.items() if result.get(key) is not None}


def _spectrum(answers: Answers, pictures: Pictures) -> Section:
    result = answers.found.get("spectrum")
    if result is None:
        return Section("Spectrum", _lacking(answers, "spectrum"))
    names = {
        "trace": "Trace, Σ λ",
        "frobenius_norm": "Frobenius norm, ‖K‖_F",
        "effective_rank": "Effective rank, exp of the entropy",
        "participation_ratio": "Participation ratio, (Σ λ)² / Σ λ²",
        "stable_rank": "Stable rank, ‖K‖²_F / λ₁²",
        "condition": "Condition number, λ₁ / λ_N",
    }
    listed = facts(_numbers(result, names), "Numbers of the spectrum")
    return Section("Spectrum", listed + _shown(pictures, "spectrum", "density") + _eigenvalues(result))


def _eigenvalues(result: Result) -> str:
    """List the largest eigenvalues, with the bound of what is known of them and their share of the trace."""
    values = result["eigenvalues"][:MAX_LISTED]
    bounds = list(result.get("residual_bounds") or [])[: len(values)]
    bounds += [None] * (len(values) - len(bounds))
    trace = result.get("trace")
    rows = [
        (number, value, bound, 100 * value / trace if trace else None)
        for number, (value, bound) in enumerate(zip(values, bounds, strict=True), 1)
    ]
    columns = ("k", "Eigenvalue λₖ", "Residual bound", "Share of the trace, %")
    return table(columns, rows, "The largest eigenvalues")


def _logdet(answers: Answers, pictures: Pictures) -> Section:
    result = answers.found.get("logdet")
    if result is None:
        return Section("Log-determinant", _lacking(answers, "logdet"))
    names = {
        "logdet": "log |det (K + λI)|, nats",
        "sign": "Sign",
        "shift": "λ",
        "logdet_per_row": "Nats per row",
        "smallest_pivot": "Smallest pivot",
    }
    warnings = "".join(paragraph(warning, kind="warning") for warning in result.get("warnings") or [])
    listed = facts(_numbers(result, names), "Numbers of the log-determinant")
    return Section("Log-determinant", listed + warnings + _shown(pictures, "logdet") + _law(answers))


def _law(answers: Answers) -> str:
    result = answers.found.get("extrapolate")
    if result is None:
        return ""
    names = {
        "logdet": "Predicted log-determinant, nats",
        "nu": "ν",
        "holdout_error": "Error on held-out prefixes, nats",
        "holdout_error_relative": "The same, relative",
    }
    words = f"Extrapolated to {result['to']:,} samples, by the law that the leading blocks follow:"
    return paragraph(words) + facts(_numbers(result, names), "Extrapolation")


def _regression(answers: Answers, pictures: Pictures) -> Section:
    result = answers.found.get("regress")
    if result is None:
        return Section("Regression", _lacking(answers, "regress"))
    columns = {
        "shifts": "λ",
        "train_error": "Training error",
        "loo_error": "Left-out error",
        "gcv": "GCV",
        "test_error": "Test error",
        "train_accuracy": "Training, %",
        "loo_accuracy": "Left out, %",
        "test_accuracy": "Test, %",
    }
    known = [name for name in columns if any(value is not None for value in result.get(name) or [])]
    rows = list(zip(*(_in_percent(name, result[name]) for name in known), strict=True))
    start = {"zero": "zero", "logits": "the network’s logits"}.get(result.get("offset", ""), "f₀")
    words = (
        f"Kernel ridge regression on the one-hot labels, from {start}. Errors are mean squares per output; “left out” "
        "is one sample at a time, with all of its outputs. In per cent: the samples classified correctly."
    )
    listed = table([columns[name] for name in known], rows, "Regression")
    return Section("Regression", paragraph(words) + _shown(pictures, "regression") + listed)


def _in_percent(name: str, values: Sequence[float | None]) -> list[float | None]:
    """Turn accuracies into per cent, and leave errors as they are."""
    factor = 100 if name.endswith("accuracy") else 1
    return [None if value is None else factor * value for value in values]


def _alignment(answers: Answers, pictures: Pictures) -> Section:
    result = answers.found.get("align")
    if result is None:
        return Section("Alignment with the labels", _lacking(answers, "align"))
    each = zip(result["output_names"], result["output_alignment"], result["output_centered_alignment"], strict=True)
    rows = [(name.removeprefix("output "), plain, centred) for name, plain, centred in each]
    rows.append(("whole", result["alignment"], result["centered_alignment"]))
    columns = ("Output", "Alignment", "Centred alignment")
    body = _shown(pictures, "alignment") + table(columns, rows, "Alignment by output")
    return Section("Alignment with the labels", body + _shown(pictures, "modes", "flow") + _lacking(answers, "flow"))


def _wrong(values: Mapping[str, Any]) -> str:
    return "" if values["inaccuracy"] is None else paragraph(values["inaccuracy"], kind="warning")


def _certificate(values: Mapping[str, Any]) -> Section:
    found = values["certificate"]
    if found is None:
        return Section("Precision certificate", paragraph("There is none: `ntkgen verify --certify` makes one."))
    words = (
        f"E is what is stored minus the exact kernel. {found['num_probes']} Gaussian vectors and {found['num_pairs']} "
        f"pairs of samples, drawn with the seed {found['seed']}, bound it with 95 % confidence: no eigenvalue is off "
        "by more than the bound on ‖E‖_F."
    )
    rows = [
        (e["dtype"], e["error"], e["bound"], e["relative_bound"], e["max_pair_error"], len(e["suspicious"]))
        for e in found["errors"]
    ]
    columns = (
        "Stored as", "‖E‖_F, estimate", "‖E‖_F, bound", "Bound ÷ ‖K‖_F", "Largest entry error ÷ √(K_rr K_cc)",
        "Suspicious blocks",
    )  # fmt: skip
    return Section(
        "Precision certificate", _wrong(values) + paragraph(words) + table(columns, rows, "Precision certificate")
    )


def _provenance(values: Mapping[str, Any]) -> Section:
    made = {key.replace("_", " "): value for key, value in values["provenance"].items() if value is not None}
    lines = {**made, "tile": f"{values['tile_side']:,} rows", "fingerprint": values["fingerprint"]}
    return Section("Provenance", facts(lines, "Provenance"))


def _reproduce(answers: Answers) -> Section:
    recipe = recipe_of(answers.matrix.store)
    path = shlex.quote(answers.matrix.name)
    asked = [question_command(question, result, answers.matrix.name) for question, result in answers.found.items()]
    body = code(recipe.commands) + "".join(map(paragraph, recipe.notes))
    check = paragraph("To see that the store holds what it should, and to ask the questions of this page again:")
    return Section("How to reproduce", body + check + code([f"ntkgen verify {path}", *asked]))


def overview(every: Sequence[Answers]) -> str:
    """Compare some kernels in one table."""
    columns = (
        "Store", "Rows", "Largest eigenvalue", "Effective rank", "log |det|, nats", "Least left-out error",
        "Alignment", "‖E‖_F, bound",
    )  # fmt: skip
    return table(columns, [_line(answers) for answers in every], "All kernels of this page")


def _line(answers: Answers) -> tuple[Any, ...]:
    found = {name: answers.found.get(name, {}) for name in ("spectrum", "logdet", "regress", "align")}
    errors = [value for value in found["regress"].get("loo_error") or [] if value is not None]
    return (
        short(answers.matrix.name),
        answers.matrix.num_rows,
        next(iter(found["spectrum"].get("eigenvalues") or []), None),
        found["spectrum"].get("effective_rank"),
        found["logdet"].get("logdet") if not found["logdet"].get("shift") else None,
        min(errors, default=None),
        found["align"].get("alignment"),
        answers.matrix.error_norm,
    )


def comparison(results: Sequence[Result], refused: Mapping[str, str]) -> Section:
    """Compare the other kernels with the first one."""
    reasons = "".join(paragraph(reason, kind="soft") for reason in refused.values())
    if not results:
        return Section("Comparison", reasons)
    columns = ("Store", "Distance", "Centred alignment", "Largest angle, degrees", "λ₁ ÷ λ₁ of the first")
    rows = [
        (
            short(result["store"]),
            result["distance"],
            result["centered_alignment"],
            math.degrees(max(result["principal_angles"])),
            result["eigenvalue_ratios"][0],
        )
        for result in results
    ]
    words = paragraph(f"With {results[0]['reference']}, whose samples are the same.")
    drawn = figure(draw_comparison(results))
    return Section("Comparison", words + drawn + table(columns, rows, "Comparison") + _costs(results) + reasons)


def _costs(results: Sequence[Result]) -> str:
    """Say what a lower precision costs, where two kernels are of one network."""
    names = {
        "frobenius_error": "‖difference‖_F ÷ ‖K‖_F",
        "eigenvalue_error": "Largest change of an eigenvalue ÷ λ₁",
        "relative_eigenvalue_error": "Largest relative change of an eigenvalue",
        "negative_eigenvalues": "Eigenvalues that are not positive in the lower",
        "logdet_error": "Change of the log-determinant, nats",
    }
    costs = [(result, result["cost"]) for result in results if result.get("cost")]
    return "".join(
        paragraph(f"What the lower precision costs: {cost['lower_dtype']} of {cost['lower']}.")
        + facts(_numbers(cost, names), f"Cost of {cost['lower_dtype']} at {result['store']}")
        for result, cost in costs
    )
