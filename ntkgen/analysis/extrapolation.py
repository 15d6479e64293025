"""The log-determinant of a much larger kernel, from those of the leading blocks of a small one."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.linalg import qr, solve_triangular
from scipy.special import gammaln

from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.determinant import LogdetSettings, logdet
from ntkgen.analysis.linalg.cholesky import FactorSettings
from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.analysis.results import recall_or_compute
from ntkgen.errors import InputError
from ntkgen.progress import Report, ignore_report

# Above this condition number the scaled columns do not determine their coefficients.
MAX_CONDITION = 1e12
# Two fits, one of them without the last prefixes, may differ by so much of what they predict.
UNSURE = 0.05


@dataclass(frozen=True)
class Law:
    """What is fitted, and to which prefixes.

    ``q`` terms ln x!/xⁱ and ``powers`` terms x⁻ⁱ beside ln x!, x and 1, with weights w = x^−α, to the prefixes of more
    than ``burn_in`` samples; the last ``holdout`` of these, a fraction, are held out to measure the error.
    """

    to: int
    burn_in: int | None = None  # samples; None: a tenth
    q: int = 2
    powers: int = 0
    alpha: float = 0.0
    holdout: float = 0.25

    def __post_init__(self) -> None:
        wrong = (
            [f"--to of {self.to}, which must be positive"] * (self.to < 1)
            + [f"--burn-in of {self.burn_in}, which must not be negative"] * ((self.burn_in or 0) < 0)
            + [f"{min(self.q, self.powers)} terms, which must not be fewer than none"] * (min(self.q, self.powers) < 0)
            + [f"--holdout of {self.holdout:g}, which must be from 0 to below 1"] * (not 0 <= self.holdout < 1)
            + [f"--alpha of {self.alpha:g}, which must be a number"] * (not np.isfinite(self.alpha))
        )
        if wrong:
            raise InputError(f"The law cannot be fitted: found {'; '.join(wrong)}. Is an option misspelt? Correct it.")

    @property
    def terms(self) -> list[str]:
        """Name the functions of the basis."""
        logarithmic = [f"ln x!/x^{i}" for i in range(1, self.q + 1)]
        return ["ln x!", "x", "1", *logarithmic, *[f"x^-{i}" for i in range(1, self.powers + 1)]]

    def basis(
        self,
        x: FloatArray,  # (points,)
    ) -> FloatArray:  # (points, terms)
        """Evaluate the basis.

        >>> Law(to=9, q=1, powers=1).basis(np.array([2.0])).round(3).tolist()
        [[0.693, 2.0, 1.0, 0.347, 0.5]]
        """
        factorial = gammaln(x + 1)
        logarithmic = [factorial / x**i for i in range(1, self.q + 1)]
        columns = [factorial, x, np.ones_like(x), *logarithmic, *[x**-i for i in range(1, self.powers + 1)]]
        return np.stack(columns, axis=1)

    def first_after(self, num_samples: int) -> int:
        """Say how many samples the first prefix that counts has at least."""
        return (num_samples // 10 if self.burn_in is None else self.burn_in) + 1


@dataclass(frozen=True)
class Fit:
    """Coefficients of a law, in the order of its terms, and how they were determined."""

    law: Law
    coefficients: FloatArray  # (terms,)
    scales: FloatArray  # (terms,): norms of the weighted columns, by which they were divided
    condition: float

    def at(self, x: FloatArray) -> FloatArray:
        """Evaluate the law."""
        return np.asarray(self.law.basis(x) @ self.coefficients)


def fit(
    law: Law,
    x: FloatArray,  # (points,)
    y: FloatArray,  # (points,)
) -> Fit:
    """Fit a law by weighted least squares: a QR factorisation of the basis, its columns scaled to norm 1.

    Raises:
        InputError: If there are too few points, or these do not determine the coefficients.
    """
    num_terms = len(law.terms)
    if len(x) < num_terms:
        raise InputError(
            f"There are too few prefixes to fit the law: expected at least {num_terms}, one for each term, found "
            f"{len(x)} after burn-in and holdout. Is the kernel too small? Lower --q, --burn-in or --holdout."
        )
    weights = x**-law.alpha
    design = law.basis(x) * weights[:, None]
    scales = np.linalg.norm(design, axis=0)
    Q, R = qr(design / scales, mode="economic")
    condition = float(np.linalg.cond(R))
    if condition > MAX_CONDITION:
        raise InputError(
            f"The prefixes do not determine the law: expected a condition number below {MAX_CONDITION:g}, found "
            f"{condition:.3g} for {num_terms} terms and {len(x)} prefixes. Are there too many terms? Lower --q."
        )
    return Fit(law, solve_triangular(R, Q.T @ (weights * y)) / scales, scales, condition)


@dataclass(frozen=True)
class ExtrapolateSettings(Law, Settings):
    """The law to be fitted, and the kernel K + ``shift`` I that it is fitted to; see `LogdetSettings`."""

    shift: float = 0.0
    indefinite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        FactorSettings(self.shift)  # refuses a shift that cannot be meant

    @property
    def law(self) -> Law:
        """The law alone."""
        return Law(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Law)})


@dataclass(frozen=True, kw_only=True)
class ExtrapolateAnswer(Answer):
    """The log-determinant of the kernel of more samples, as a law predicts it.

    Attributes:
        to, to_rows: Samples and rows of the larger kernel.
        logdet, logdet_per_row: What is predicted, in nats.
        nu, nu_per_output: Adding the x-th sample multiplies the determinant by about x^−ν.
        coefficients: By the names of the terms.
        column_scales: Norms of the weighted columns.
        condition: Condition number of the fit.
        q, powers, alpha, burn_in: The law; see `Law`.
        unit: What x counts.
        num_outputs: Rows per sample.
        prefixes_used, fitted_from, fitted_to: Leading blocks that were fitted, and samples of the first and the last.
        rms_residual: Root mean square error on these.
        holdout: Leading blocks that a second fit has not seen; without any the following are None.
        holdout_logdet: What the second fit predicts.
        holdout_from: Samples of the first block held out.
        holdout_error, holdout_error_relative: On the last block.
        holdout_error_per_row: The largest, each divided by the block's rows.
        shift: λ.
        warnings: What is not to be trusted.
    """

    to: int
    to_rows: int
    logdet: float
    logdet_per_row: float
    nu: float
    nu_per_output: float
    coefficients: Mapping[str, float]
    column_scales: Mapping[str, float]
    condition: float
    q: int
    powers: int
    alpha: float
    burn_in: int
    unit: str
    num_outputs: int
    prefixes_used: int
    fitted_from: int
    fitted_to: int
    rms_residual: float
    holdout_logdet: float | None = None
    holdout: int
    holdout_from: int | None = None
    holdout_error: float | None = None
    holdout_error_relative: float | None = None
    holdout_error_per_row: float | None = None
    shift: float = 0.0
    warnings: Sequence[str] = ()

    QUESTION: ClassVar[str] = "extrapolate"
    VOLATILE: ClassVar[tuple[str, ...]] = ("shift", "warnings")

    @classmethod
    def from_kept(cls, found: Mapping[str, Any], asked: Mapping[str, Any]) -> "ExtrapolateAnswer":
        """Read what was kept; the shift is kept as a setting."""
        return dataclasses.replace(cls.from_json(found), shift=asked["shift"])

    @property
    def law(self) -> Law:
        """The law that was fitted."""
        return Law(self.to, self.burn_in, self.q, self.powers, self.alpha)


def extrapolate(matrix: Matrix, settings: ExtrapolateSettings, *, report: Report = ignore_report) -> ExtrapolateAnswer:
    """Predict the log-determinant of the kernel of more samples, from those of the leading blocks of this one.

    With x samples of m outputs, log det K_x = −ν ln x! + c₁ x + c₀ + Σᵢ bᵢ ln x!/xⁱ + Σᵢ aᵢ x⁻ⁱ: adding a sample
    multiplies the determinant by about x^−ν. The samples must be in random order. What is predicted is the mean course;
    its error is that on the last prefixes, which a fit to those before them has not seen.

    References:
        Ameli, van der Heide, Hodgkinson, Roosta, Mahoney (2025), arXiv:2503.04424.

    Raises:
        NotPositiveError: If the kernel has no leading blocks to fit; see `logdet`.
        InputError: If these do not determine the law.
    """
    law = settings.law

    def compute() -> ExtrapolateAnswer:
        return fitted(law, *of_blocks.by_samples(matrix.num_outputs), matrix.num_outputs)

    of_blocks = logdet(
        matrix,
        LogdetSettings(settings.shift, settings.indefinite, prefixes=True, memory_bytes=settings.memory_bytes),
        report=report,
    )
    asked = {**vars(law), "shift": float(settings.shift), "indefinite": settings.indefinite}
    answer = recall_or_compute(matrix, ExtrapolateAnswer, asked, compute)
    warnings = [*of_blocks.warnings, *warnings_of(answer)]
    return dataclasses.replace(answer, shift=float(settings.shift), warnings=warnings)


def warnings_of(answer: ExtrapolateAnswer) -> list[str]:
    """Say that a prediction depends on which prefixes were fitted, if it does."""
    predicted, other = answer.logdet, answer.holdout_logdet
    if other is None or abs(other - predicted) <= UNSURE * abs(predicted):
        return []
    return [
        f"The log-determinant of {answer.to:,} samples is not determined by the kernel at {answer.store}: fitted "
        f"to all prefixes up to {answer.fitted_to:,} samples the law predicts {predicted:.6g} nats, to those below "
        f"{answer.holdout_from:,} it predicts {other:.6g}. Compute a larger kernel, predict one that is less large, "
        "or lower --q; the samples must be in random order (--shuffle-seed)."
    ]


def fitted(law: Law, samples: Sequence[int], values: Sequence[float], num_outputs: int) -> ExtrapolateAnswer:
    """Fit a law to prefixes, and describe it: the prediction, its coefficients, and its error on those held out."""
    x, y = np.asarray(samples, dtype=np.float64), np.asarray(values, dtype=np.float64)
    is_used = x >= law.first_after(int(x[-1]))
    x, y = x[is_used], y[is_used]
    found, rows = fit(law, x, y), law.to * num_outputs
    predicted = float(found.at(np.array([float(law.to)]))[0])
    answer = ExtrapolateAnswer(
        to=law.to,
        to_rows=rows,
        logdet=predicted,
        logdet_per_row=predicted / rows,
        nu=float(-found.coefficients[0]),
        nu_per_output=float(-found.coefficients[0]) / num_outputs,
        coefficients=dict(zip(law.terms, found.coefficients.tolist(), strict=True)),
        column_scales=dict(zip(law.terms, found.scales.tolist(), strict=True)),
        condition=found.condition,
        q=law.q,
        powers=law.powers,
        alpha=law.alpha,
        burn_in=law.first_after(samples[-1]) - 1,
        unit="samples",
        num_outputs=num_outputs,
        prefixes_used=len(x),
        fitted_from=int(x[0]),
        fitted_to=int(x[-1]),
        rms_residual=float(np.sqrt(np.mean((found.at(x) - y) ** 2))),
        holdout=0,
    )
    return _with_holdout(answer, law, x, y)


def _with_holdout(answer: ExtrapolateAnswer, law: Law, x: FloatArray, y: FloatArray) -> ExtrapolateAnswer:
    """Fit the first prefixes, and measure the error on the last."""
    count = int(law.holdout * len(x))
    if not count:
        return answer
    found, last = fit(law, x[:-count], y[:-count]), slice(-count, None)
    errors = found.at(x[last]) - y[last]
    return dataclasses.replace(
        answer,
        holdout_logdet=float(found.at(np.array([float(law.to)]))[0]),
        holdout=count,
        holdout_from=int(x[last][0]),
        holdout_error=float(errors[-1]),
        holdout_error_relative=float(abs(errors[-1]) / max(abs(y[-1]), np.finfo(float).tiny)),
        holdout_error_per_row=float(np.max(np.abs(errors) / (x[last] * answer.num_outputs))),
    )
