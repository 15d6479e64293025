"""Extrapolation of the log-determinant to more samples, from the leading blocks of a computed kernel."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.linalg import qr, solve_triangular
from scipy.special import gammaln

from ntkgen.analysis import defaults
from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.determinant import LogdetSettings, logdet
from ntkgen.analysis.linalg.cholesky import FactorSettings
from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.analysis.results import recall_or_compute
from ntkgen.errors import InputError
from ntkgen.progress import Report, ignore_report

# Maximum condition number of the scaled columns; above it they do not determine the coefficients.
MAX_CONDITION = 1e12
# Maximum relative difference between the predictions of the fit to all prefixes and of that without the last ones.
UNSURE = 0.05


@dataclass(frozen=True)
class Law:
    """A law for the log-determinant of the first x samples, and the prefixes that it is fitted to.

    The terms are ln x!, x and 1, ``q`` terms ln x!/xⁱ and ``powers`` terms x⁻ⁱ. A prefix is a leading principal block
    of whole samples.

    Attributes:
        to: Number of samples for which the log-determinant is predicted.
        burn_in: Number of samples up to which prefixes are ignored. None means a tenth of the samples.
        q: Number of terms ln x!/xⁱ.
        powers: Number of terms x⁻ⁱ.
        alpha: Exponent α of the weights x^−α of the least-squares fit.
        holdout: Fraction of the prefixes, the last ones, that a second fit leaves out to measure the error.
    """

    to: int
    burn_in: int | None = None
    q: int = defaults.Q
    powers: int = defaults.POWERS
    alpha: float = defaults.ALPHA
    holdout: float = defaults.HOLDOUT

    def __post_init__(self) -> None:
        wrong = (
            [f"`to` of {self.to}, which must be positive"] * (self.to < 1)
            + [f"`burn_in` of {self.burn_in}, which must not be negative"] * ((self.burn_in or 0) < 0)
            + [f"{min(self.q, self.powers)} terms, which must not be fewer than none"] * (min(self.q, self.powers) < 0)
            + [f"`holdout` of {self.holdout:g}, which must be from 0 to below 1"] * (not 0 <= self.holdout < 1)
            + [f"`alpha` of {self.alpha:g}, which must be a number"] * (not np.isfinite(self.alpha))
        )
        if wrong:
            raise InputError(f"The law cannot be fitted: found {'; '.join(wrong)}. Is one misspelt? Correct it.")

    @property
    def terms(self) -> list[str]:
        """Names of the basis functions."""
        logarithmic = [f"ln x!/x^{i}" for i in range(1, self.q + 1)]
        return ["ln x!", "x", "1", *logarithmic, *[f"x^-{i}" for i in range(1, self.powers + 1)]]

    def basis(
        self,
        x: FloatArray,  # (points,)
    ) -> FloatArray:  # (points, terms)
        """Evaluate the basis functions at x.

        >>> Law(to=9, q=1, powers=1).basis(np.array([2.0])).round(3).tolist()
        [[0.693, 2.0, 1.0, 0.347, 0.5]]
        """
        factorial = gammaln(x + 1)
        logarithmic = [factorial / x**i for i in range(1, self.q + 1)]
        columns = [factorial, x, np.ones_like(x), *logarithmic, *[x**-i for i in range(1, self.powers + 1)]]
        return np.stack(columns, axis=1)

    def first_after(self, num_samples: int) -> int:
        """Return the minimum number of samples of a prefix that is fitted, out of this number of samples."""
        return (num_samples // 10 if self.burn_in is None else self.burn_in) + 1


@dataclass(frozen=True)
class Fit:
    """A fitted law: its coefficients in the order of its terms, and the conditioning of the fit."""

    law: Law
    coefficients: FloatArray  # (terms,)
    scales: FloatArray  # (terms,): norms of the weighted columns; each column was divided by its norm
    condition: float  # condition number of the scaled columns

    def at(self, x: FloatArray) -> FloatArray:
        """Evaluate the law at x."""
        return np.asarray(self.law.basis(x) @ self.coefficients)


def fit(
    law: Law,
    x: FloatArray,  # (points,)
    y: FloatArray,  # (points,)
) -> Fit:
    """Fit a law by weighted least squares, with a QR factorisation of the basis, whose columns are scaled to norm 1.

    Raises:
        InputError: If there are too few points, or the points do not determine the coefficients.
    """
    num_terms = len(law.terms)
    if len(x) < num_terms:
        raise InputError(
            f"There are too few prefixes to fit the law: expected at least {num_terms}, one for each term, found "
            f"{len(x)} after burn-in and holdout. Is the kernel too small? Lower `q`, `burn_in` or `holdout`."
        )
    weights = x**-law.alpha
    design = law.basis(x) * weights[:, None]
    scales = np.linalg.norm(design, axis=0)
    Q, R = qr(design / scales, mode="economic")
    condition = float(np.linalg.cond(R))
    if condition > MAX_CONDITION:
        raise InputError(
            f"The prefixes do not determine the law: expected a condition number below {MAX_CONDITION:g}, found "
            f"{condition:.3g} for {num_terms} terms and {len(x)} prefixes. Are there too many terms? Lower `q`."
        )
    return Fit(law, solve_triangular(R, Q.T @ (weights * y)) / scales, scales, condition)


@dataclass(frozen=True)
class ExtrapolateSettings(Law, Settings):
    """Settings of `extrapolate`: the law, and the matrix K + ``shift`` I that it is fitted to.

    The attributes of `Law` are settings too.

    Attributes:
        shift: Shift λ that is added to the diagonal; not negative.
        indefinite: Whether negative eigenvalues are allowed; see `FactorSettings`.
    """

    shift: float = defaults.SHIFT
    indefinite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        FactorSettings(self.shift)  # raises an error for a negative or infinite shift

    @property
    def law(self) -> Law:
        """The law without the other settings."""
        return Law(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Law)})


@dataclass(frozen=True, kw_only=True)
class ExtrapolateAnswer(Answer):
    """The predicted log-determinant of the kernel of more samples, and the quality of the fit.

    Attributes:
        to: Number of samples of the larger kernel.
        to_rows: Number of rows of the larger kernel.
        logdet: Predicted log-determinant in nats.
        logdet_per_row: Predicted log-determinant divided by the number of rows, in nats.
        nu: Exponent ν: adding the x-th sample multiplies the determinant by about x^−ν.
        nu_per_output: ν divided by the number of outputs.
        coefficients: Coefficients of the law, by the names of its terms.
        column_scales: Norms of the weighted columns of the fit, by the names of their terms.
        condition: Condition number of the fit.
        q: Number of terms ln x!/xⁱ.
        powers: Number of terms x⁻ⁱ.
        alpha: Exponent α of the weights x^−α.
        burn_in: Number of samples; leading blocks of at most this size were ignored.
        unit: Unit of x, ``samples``.
        num_outputs: Number of rows per sample.
        prefixes_used: Number of leading blocks that were fitted.
        fitted_from: Number of samples of the smallest fitted block.
        fitted_to: Number of samples of the largest fitted block.
        rms_residual: Root mean square residual of the fit in nats.
        holdout_logdet: Log-determinant of the larger kernel in nats, predicted by a second fit that leaves out the last
            leading blocks. This and the other ``holdout_`` fields are None if no block was held out.
        holdout: Number of the last leading blocks that the second fit leaves out.
        holdout_from: Number of samples of the first block that was held out.
        holdout_error: Error of the second fit on the last block in nats.
        holdout_error_relative: The same error relative to the log-determinant of the last block.
        holdout_error_per_row: Largest error of the second fit on a held-out block, divided by the block's number of
            rows, in nats.
        shift: Shift λ that was added to the diagonal.
        warnings: Warnings about the prediction, and about the log-determinants that it is fitted to.
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
        """Build an answer from a saved dictionary and the saved settings, which include the shift."""
        return dataclasses.replace(cls.from_json(found), shift=asked["shift"])

    @property
    def law(self) -> Law:
        """The law that was fitted."""
        return Law(self.to, self.burn_in, self.q, self.powers, self.alpha)


def extrapolate(matrix: Matrix, settings: ExtrapolateSettings, *, report: Report = ignore_report) -> ExtrapolateAnswer:
    """Predict the log-determinant of a kernel of more samples from the log-determinants of leading blocks.

    With x samples of m outputs, the law is log det K_x = −ν ln x! + c₁ x + c₀ + Σᵢ bᵢ ln x!/xⁱ + Σᵢ aᵢ x⁻ⁱ. Adding the
    x-th sample then multiplies the determinant by about x^−ν. The samples must be in random order. The law predicts the
    trend, without the fluctuations from sample to sample. Its error is measured on the last leading blocks, with a
    second fit that leaves them out.

    References:
        Ameli, van der Heide, Hodgkinson, Roosta, Mahoney (2025), arXiv:2503.04424.

    Raises:
        NotPositiveError: If the kernel cannot be factored; see `logdet`.
        InputError: If the leading blocks do not determine the law.
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
    """Warn if the predictions of the two fits, with and without the last prefixes, differ too much."""
    predicted, other = answer.logdet, answer.holdout_logdet
    if other is None or abs(other - predicted) <= UNSURE * abs(predicted):
        return []
    return [
        f"The log-determinant of {answer.to:,} samples is not determined by the kernel at {answer.store}: fitted "
        f"to all prefixes up to {answer.fitted_to:,} samples the law predicts {predicted:.6g} nats, to those below "
        f"{answer.holdout_from:,} it predicts {other:.6g}. Compute a larger kernel, predict one that is less large, "
        "or lower `q`; the samples must be in random order (`ntkgen compute --shuffle-seed`)."
    ]


def fitted(law: Law, samples: Sequence[int], values: Sequence[float], num_outputs: int) -> ExtrapolateAnswer:
    """Fit a law to prefixes; return the prediction, the coefficients and the error on the prefixes held out."""
    x, y = np.asarray(samples, dtype=np.float64), np.asarray(values, dtype=np.float64)
    is_used = x >= law.first_after(int(x[-1]))
    x, y = x[is_used], y[is_used]
    fit_to_all, rows = fit(law, x, y), law.to * num_outputs
    predicted = float(fit_to_all.at(np.array([float(law.to)]))[0])
    answer = ExtrapolateAnswer(
        to=law.to,
        to_rows=rows,
        logdet=predicted,
        logdet_per_row=predicted / rows,
        nu=float(-fit_to_all.coefficients[0]),
        nu_per_output=float(-fit_to_all.coefficients[0]) / num_outputs,
        coefficients=dict(zip(law.terms, fit_to_all.coefficients.tolist(), strict=True)),
        column_scales=dict(zip(law.terms, fit_to_all.scales.tolist(), strict=True)),
        condition=fit_to_all.condition,
        q=law.q,
        powers=law.powers,
        alpha=law.alpha,
        burn_in=law.first_after(samples[-1]) - 1,
        unit="samples",
        num_outputs=num_outputs,
        prefixes_used=len(x),
        fitted_from=int(x[0]),
        fitted_to=int(x[-1]),
        rms_residual=float(np.sqrt(np.mean((fit_to_all.at(x) - y) ** 2))),
        holdout=0,
    )
    return _with_holdout(answer, law, x, y)


def _with_holdout(answer: ExtrapolateAnswer, law: Law, x: FloatArray, y: FloatArray) -> ExtrapolateAnswer:
    """Fit the law without the last prefixes, and measure its error on them."""
    count = int(law.holdout * len(x))
    if not count:
        return answer
    second_fit, last = fit(law, x[:-count], y[:-count]), slice(-count, None)
    errors = second_fit.at(x[last]) - y[last]
    return dataclasses.replace(
        answer,
        holdout_logdet=float(second_fit.at(np.array([float(law.to)]))[0]),
        holdout=count,
        holdout_from=int(x[last][0]),
        holdout_error=float(errors[-1]),
        holdout_error_relative=float(abs(errors[-1]) / max(abs(y[-1]), np.finfo(float).tiny)),
        holdout_error_per_row=float(np.max(np.abs(errors) / (x[last] * answer.num_outputs))),
    )
