"""The certificate of a finished store: the measured error of its kernel, with an upper bound, and its statistics."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from ntkgen.plan.tiles import Tile, TileGrid

Record = TypeVar("Record", "StoredError", "Certificate")
Compared = Literal["random vectors", "whole kernel"]

# Confidence of the upper bounds of an estimated error.
CONFIDENCE = 0.95
# Largest relative change of a number by rounding to a store dtype, in the range of its normal numbers.
UNIT_ROUNDOFF = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
# Largest absolute change of a number by rounding to a store dtype, below its normal numbers.
HALF_SUBNORMAL = {"float16": 2.0**-25, "float32": 2.0**-150, "float64": 0.0}
# Largest relative change of a sample's factors by rounding them once, for each precision policy.
POLICY_ROUNDOFF = {
    "float64": 2.0**-53,
    "float64-accumulate": 2.0**-24,
    "float32": 2.0**-24,
    "tf32": 2.0**-11,
    "bfloat16": 2.0**-9,
}
# Largest error that a precision policy explains, relative to ‖K‖_F. Wrong layer rules and wrong batches caused errors
# of at least half a per cent in every network where they were found.
POLICY_ERRORS = {
    # The error of trained networks is about 1e-15. The passes of deep untrained networks amplify rounding errors by
    # several thousand, to 1e-12, as in float32. The exact product in the comparison has rounding errors of that size.
    "float64": 1e-8,
    # The network is run in float32. The error is 2e-8 to 3e-7 for trained networks and up to 3e-4 for deep untrained
    # networks. Where rounding changes the sign of a ReLU's input, the rows of its sample change by a few per cent.
    "float64-accumulate": 1e-3,
    "float32": 1e-3,
    # Each factor is also rounded once to 11 or 8 bits, by 5e-4 or 2e-3. Measured errors are 3e-4 to 2e-3.
    "tf32": 1e-2,
    "bfloat16": 1e-2,
}
# Factor by which the relative error of one block's rows may exceed `POLICY_ERRORS`. In a block of few samples, one
# ReLU input whose sign changes has a large effect.
BLOCK_RATIO = 10.0


def allowed_error(precision: str, dtype: str, *, ratio: float = 1.0) -> float:
    """Bound the relative error that a precision policy, times ``ratio``, and rounding to a store dtype explain.

    >>> f"{allowed_error('float32', 'float16'):.2g}", f"{allowed_error('float64', 'float64'):.2g}"
    ('0.002', '1e-08')
    """
    return ratio * POLICY_ERRORS[precision] + 2 * UNIT_ROUNDOFF[dtype]


@dataclass(frozen=True)
class StoredError:
    """The error of the kernel in one store dtype. E is the stored kernel minus the exact kernel K.

    If the whole kernel was compared, the norms are exact. If random vectors were used, they are estimates.

    Attributes:
        dtype: Store dtype.
        error: ‖E‖_F, the square root of the sum of the squared errors of all entries.
        bound: Upper bound of ‖E‖_F: with 95 % confidence for an estimate, otherwise `error` itself. It also bounds the
            error of every eigenvalue, and of every singular value of a rectangular kernel: |λ̃ − λ| ≤ ‖E‖₂ ≤ ‖E‖_F
            (Weyl).
        relative_error: `error` divided by ‖K‖_F.
        relative_bound: `bound` divided by ‖K‖_F.
        allowed: Largest relative error that the precision policy and the store dtype explain.
        max_pair_error: Largest |E_rc| / √(K_rr K_cc) of the compared entries.
        block_errors: ‖E_b‖_F for the rows of each block of samples. Their squares add up to `error`².
        suspicious: Blocks whose error is much larger than that of the others. `suspicious_blocks` has the rule.
        exceeding: Blocks whose error, relative to the size of their rows, is larger than the policy explains.
    """

    dtype: str
    error: float
    bound: float
    relative_error: float
    relative_bound: float
    allowed: float
    max_pair_error: float
    block_errors: tuple[float, ...]
    suspicious: tuple[int, ...]
    exceeding: tuple[int, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether rounding explains the error of the whole kernel and of each block.

        The estimate is judged, not the bound. With few probes the bound is far above the estimate, and would refuse
        accurate kernels.
        """
        return self.relative_error <= self.allowed and not self.wrong_blocks

    @property
    def wrong_blocks(self) -> tuple[int, ...]:
        """Blocks of samples that are suspicious or exceed the allowed error."""
        return tuple(sorted({*self.suspicious, *self.exceeding}))


@dataclass(frozen=True)
class Certificate:
    """The measured error of a finished kernel for each store dtype, and the size of the random sample behind it.

    Attributes:
        num_probes: Number of Gaussian vectors; zero if the whole kernel was compared.
        num_pairs: Number of compared pairs of samples.
        seed: Seed of the Gaussian vectors and of the pairs.
        kernel_norm: ‖K‖_F, exact or estimated as the errors are.
        errors: Error of each store dtype, in the store's order.
        exact_dtype: Dtype in which the exact kernel was computed. It is float64, or float32 where the network cannot be
            run in float64. Rounding in float32 is then part of the errors.
        num_pair_outputs: Number of outputs compared for each sample of a pair. None means all.
        comparison: ``whole kernel`` if every entry was compared, so that the errors are exact. ``random vectors`` if
            the errors are estimates. Certificates of earlier versions are of this kind.
        seconds: Duration of the measurement. It is only printed. It is neither compared nor stored, so that equal runs
            give equal bytes.

    A certificate that was read is written with the same values, so that a store of another version keeps its bytes.
    Keys that this version does not know are kept, and keys that this version has added are not written.
    """

    num_probes: int
    num_pairs: int
    seed: int
    kernel_norm: float
    errors: tuple[StoredError, ...]
    exact_dtype: str = "float64"
    num_pair_outputs: int | None = None
    comparison: Compared = "random vectors"
    seconds: float = dataclasses.field(default=0.0, compare=False)
    # The values that it was read from. `dataclasses.replace` does not copy them, because it makes another certificate.
    _read_from: Mapping[str, Any] | None = dataclasses.field(default=None, init=False, compare=False, repr=False)

    @property
    def is_good(self) -> bool:
        """Whether rounding explains the errors of all store dtypes."""
        return all(error.is_good for error in self.errors)

    @property
    def is_exact(self) -> bool:
        """Whether every entry was compared, so that the errors are exact and not estimates."""
        return self.comparison == "whole kernel"

    @property
    def bad_pairs_below(self) -> float:
        """Bound the fraction of pairs whose error is larger than that of every compared pair, as `bad_fraction` does.

        Where outputs were sampled too, the fraction counts the sampled outputs only.
        """
        return 0.0 if self.is_exact else bad_fraction(self.num_pairs)

    def to_json(self) -> dict[str, Any]:
        """Convert to dictionaries, lists, strings, and numbers rounded to three digits."""
        if self._read_from is not None:
            return dict(self._read_from)
        names = ("num_probes", "num_pairs", "seed", "exact_dtype", "num_pair_outputs", "comparison")
        kept = {name: getattr(self, name) for name in names}
        errors = [{name: _plain(name, value) for name, value in vars(error).items()} for error in self.errors]
        return {**kept, "kernel_norm": rounded(self.kernel_norm), "errors": errors}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], precision: str = "float32") -> "Certificate":
        """Read the values that `to_json` wrote. Those of earlier versions lack the allowed error.

        Args:
            values: Plain values.
            precision: Precision policy of the kernel. It gives the allowed error where the values lack it.
        """
        errors = tuple(_read_error(error, precision) for error in values["errors"])
        certificate = _read(cls, {**values, "errors": errors})
        object.__setattr__(certificate, "_read_from", dict(values))
        return certificate


def _read_error(values: Mapping[str, Any], precision: str) -> StoredError:
    if "allowed" not in values:
        values = {**values, "allowed": allowed_error(precision, values["dtype"])}
    return _read(StoredError, values)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(name, each) for each in value]
    if not isinstance(value, float):
        return value
    return rounded_up(value) if name.endswith("bound") else rounded(value)


def rounded(value: float) -> float:
    """Round to three significant digits, so that runs that differ in the last bits give equal bytes.

    >>> rounded(0.0123449), rounded(0.0)
    (0.0123, 0.0)
    """
    return float(f"{value:.3g}")


def rounded_up(value: float) -> float:
    """Round a bound up to three significant digits.

    >>> rounded_up(0.0123449), rounded_up(0.0124), rounded_up(0.0)
    (0.0124, 0.0124, 0.0)
    """
    nearest = rounded(value)
    return nearest if nearest >= value else rounded(nearest + 10.0 ** (math.floor(math.log10(value)) - 2))


def _read(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """Make a dataclass from its known fields. Keys that a later version has added are ignored."""
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    known: dict[str, Any] = {name: _frozen(value) for name, value in values.items() if name in names}
    return kind(**known)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def tiles_to_check(grid: TileGrid, suspicious: Iterable[int]) -> list[Tile]:
    """List the tiles in the rows of suspicious blocks and, for a symmetric kernel, in their columns.

    The error of a block of rows does not tell the wrong columns. Of a symmetric kernel one triangle is read: a wrong
    tile then changes the rows of two blocks. Therefore the tiles of two suspicious blocks are listed first.

    >>> tiles_to_check(TileGrid(3, 1, 1), [0, 1])[:3]
    [Tile(row=0, col=0), Tile(row=0, col=1), Tile(row=1, col=1)]
    """
    wrong = set(suspicious)
    if not grid.is_symmetric:
        return [tile for tile in grid.tiles() if tile.row in wrong]
    touched = [tile for tile in grid.tiles() if {tile.row, tile.col} & wrong]
    return sorted(touched, key=lambda tile: not {tile.row, tile.col} <= wrong)


def upper_bound(estimate: float, num_probes: int) -> float:
    """Multiply an estimate of ‖E‖_F by √(s / χ²_s(5 %)), which gives an upper bound with 95 % confidence.

    With σ_k the singular values of E, ‖E V‖²_F = Σ_k σ_k² c_k, where the c_k are independent and χ²-distributed with s
    degrees of freedom. For an E of rank one the confidence is exactly 95 %. With several singular values the sum is
    an average over several c_k. It is less often far below its mean, and the bound is conservative.

    References:
        Roosta-Khorasani, Székely (2015), arXiv:1601.04731: majorisation of the weights orders the tails of such sums.

    >>> round(upper_bound(1.0, 10), 2), round(upper_bound(1.0, 100), 2)
    (1.59, 1.13)
    """
    from scipy.stats import chi2

    return estimate * float(np.sqrt(num_probes / chi2.ppf(1 - CONFIDENCE, num_probes)))


def bad_fraction(num_pairs: int) -> float:
    """Bound the fraction of bad pairs when p sampled pairs are all good, with 95 % confidence: 1 − 0.05^(1/p).

    If a larger fraction were bad, fewer than 5 % of all random samples of p pairs would have only good pairs.

    >>> round(bad_fraction(299), 4), round(bad_fraction(16), 2), bad_fraction(0)
    (0.01, 0.17, 1.0)
    """
    return 1 - (1 - CONFIDENCE) ** (1 / num_pairs) if num_pairs else 1.0
