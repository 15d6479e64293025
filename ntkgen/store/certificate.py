"""What is known of the accuracy of a finished store, as a value: the certificate and its statistics."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ntkgen.errors import InputError
from ntkgen.plan.tiles import Tile, TileGrid

Made = TypeVar("Made", "StoredError", "Certificate")

CONFIDENCE = 0.95
# Rounding to a store dtype changes x by at most x times the first, and by at most the second below its normal numbers.
UNIT_ROUNDOFF = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
HALF_SUBNORMAL = {"float16": 2.0**-25, "float32": 2.0**-150, "float64": 0.0}
# Relative change of what is kept of a sample by rounding it once.
POLICY_ROUNDOFF = {
    "float64": 2.0**-53,
    "float64-accumulate": 2.0**-24,
    "float32": 2.0**-24,
    "tf32": 2.0**-11,
    "bfloat16": 2.0**-9,
}
# The error that a kernel may have by how it was computed, relative to ‖K‖_F. Wrong rules and wrong batches were off by
# half a per cent and more, in all networks that were found to have any.
POLICY_ERRORS = {
    # Trained networks are off by some 1e-15. Passes of deep untrained ones multiply rounding by several thousands, as
    # they do in float32, which makes 1e-12; the exact product that it is compared with rounds as much.
    "float64": 1e-8,
    # The network is run in float32. Trained ones are off by 2e-8 to 3e-7, deep untrained ones by up to 3e-4. Where an
    # input of a ReLU is within rounding of zero, one flipped unit changes the rows of its sample by some per cent.
    "float64-accumulate": 1e-3,
    "float32": 1e-3,
    # One rounding to 11 or 8 bits of each factor, 5e-4 or 2e-3, beside the above: measured are 3e-4 to 2e-3.
    "tf32": 1e-2,
    "bfloat16": 1e-2,
}
# Factor by which the rows of one block may exceed that, relative to their own size: a block may have few samples, and
# one of them a flipped unit.
BLOCK_RATIO = 10.0


def allowed_error(precision: str, dtype: str, *, ratio: float = 1.0) -> float:
    """Bound the relative error that a policy, or some times as much, and storing in a dtype explain.

    >>> f"{allowed_error('float32', 'float16'):.2g}", f"{allowed_error('float64', 'float64'):.2g}"
    ('0.002', '1e-08')
    """
    return ratio * POLICY_ERRORS[precision] + 2 * UNIT_ROUNDOFF[dtype]


@dataclass(frozen=True)
class Sampling:
    """How much is sampled: Gaussian vectors, pairs of samples, and the seed of both."""

    num_probes: int = 10
    num_pairs: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant.

        Raises:
            InputError: If there is no probe, or a number is negative.
        """
        if self.num_probes < 1 or self.num_pairs < 0 or self.seed < 0:
            raise InputError(
                f"A certificate cannot be made of {self.num_probes} probes and {self.num_pairs} pairs with the seed "
                f"{self.seed}: expected at least one probe, and nothing negative. Choose others; 10 and 16 will do."
            )


USUAL_SAMPLING = Sampling()
# A probe of the outputs `trace` and `diagonal` costs as much as m others: fewer, and a bound further from the estimate.
REDUCED_SAMPLING = Sampling(num_probes=3)


# Backward passes for the sampled pairs of a kernel of traces: each of its entries needs all m outputs of both samples.
TRACE_PASSES = 512


def usual_sampling(output: str, num_logits: int) -> Sampling:
    """Choose how much is sampled of the kernel of an output map where it is not given.

    >>> usual_sampling("full", 1000).num_pairs, usual_sampling("trace", 10).num_pairs, usual_sampling("trace", 1000)
    (16, 16, Sampling(num_probes=3, num_pairs=1, seed=0))
    """
    if output == "trace":
        num_pairs = max(1, min(REDUCED_SAMPLING.num_pairs, TRACE_PASSES // (2 * num_logits)))
        return dataclasses.replace(REDUCED_SAMPLING, num_pairs=num_pairs)
    return REDUCED_SAMPLING if output == "diagonal" else USUAL_SAMPLING


@dataclass(frozen=True)
class StoredError:
    """How far the kernel in one store dtype is from the exact one. E is their difference.

    Attributes:
        dtype: The store dtype.
        error: Estimate of ‖E‖_F, and with it of the root of the summed squares of all errors of entries.
        bound: Upper bound of ‖E‖_F with 95 % confidence. No eigenvalue, or singular value of a rectangular kernel, is
            further off: |λ̃ − λ| ≤ ‖E‖₂ ≤ ‖E‖_F (Weyl).
        relative_error: The estimate over that of ‖K‖_F.
        relative_bound: The bound over the estimate of ‖K‖_F.
        allowed: The relative error that the precision policy and the store dtype explain.
        max_pair_error: The largest |E_rc| / √(K_rr K_cc) of the sampled entries.
        block_errors: The estimate of ‖E_b‖_F for the rows of each block of samples; their squares add up to `error`².
        suspicious: The blocks whose error is out of line; see `suspicious_blocks` for the rule.
        exceeding: The blocks whose error is larger than the policy explains, for their own size.
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
        """Whether rounding explains the error, of the whole and of each block.

        Judged is the estimate. Of few probes the bound is far above it, and would refuse a kernel for its certificate.
        """
        return self.relative_error <= self.allowed and not self.wrong_blocks

    @property
    def wrong_blocks(self) -> tuple[int, ...]:
        """The blocks of samples whose error is out of line or too large."""
        return tuple(sorted({*self.suspicious, *self.exceeding}))


@dataclass(frozen=True)
class Certificate:
    """What was sampled, and the error of each store dtype.

    Attributes:
        num_probes: Gaussian vectors.
        num_pairs: Pairs of samples.
        seed: Of both.
        kernel_norm: The estimate of ‖K‖_F.
        errors: In the store's order of dtypes.
        exact_dtype: What the exact kernel was computed in: float64, or where the network cannot be run in that its own
            dtype, float32. Its rounding is then a part of the errors.
        num_pair_outputs: Outputs of each sample of a pair whose entries were compared; None: all.
        seconds: What it took. For printing alone: neither compared nor kept, so that equal runs give equal bytes.

    A certificate that was read is written with the same values, so that a store of another version keeps its bytes:
    keys that this version does not know stay, and keys that it has added are not invented.
    """

    num_probes: int
    num_pairs: int
    seed: int
    kernel_norm: float
    errors: tuple[StoredError, ...]
    exact_dtype: str = "float64"
    num_pair_outputs: int | None = None
    seconds: float = dataclasses.field(default=0.0, compare=False)
    # The values that it was read from; not copied by `dataclasses.replace`, which makes another certificate.
    _read_from: Mapping[str, Any] | None = dataclasses.field(default=None, init=False, compare=False, repr=False)

    @property
    def is_good(self) -> bool:
        """Whether rounding explains the errors of all dtypes."""
        return all(error.is_good for error in self.errors)

    @property
    def bad_pairs_below(self) -> float:
        """Bound the fraction of pairs with a larger error than the sampled ones have; see `bad_fraction`.

        Where outputs were sampled too, that is of pairs with an error among those.
        """
        return bad_fraction(self.num_pairs)

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values: dictionaries, lists, strings, and numbers of three digits."""
        if self._read_from is not None:
            return dict(self._read_from)
        names = ("num_probes", "num_pairs", "seed", "exact_dtype", "num_pair_outputs")
        kept = {name: getattr(self, name) for name in names}
        errors = [{name: _plain(name, value) for name, value in vars(error).items()} for error in self.errors]
        return {**kept, "kernel_norm": rounded(self.kernel_norm), "errors": errors}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], precision: str = "float32") -> "Certificate":
        """Read back what `to_json` wrote, also that of earlier versions, which did not say what error is allowed.

        Args:
            values: The plain values.
            precision: The policy of the kernel, which says what is allowed where the values do not.
        """
        made = _read(cls, {**values, "errors": tuple(_read_error(error, precision) for error in values["errors"])})
        object.__setattr__(made, "_read_from", dict(values))
        return made


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
    """Round to three significant digits, so that equal runs give equal bytes whatever the last bits are.

    >>> rounded(0.0123449), rounded(0.0)
    (0.0123, 0.0)
    """
    return float(f"{value:.3g}")


def rounded_up(value: float) -> float:
    """Round a bound to three significant digits, and never below what it is.

    >>> rounded_up(0.0123449), rounded_up(0.0124), rounded_up(0.0)
    (0.0124, 0.0124, 0.0)
    """
    nearest = rounded(value)
    return nearest if nearest >= value else rounded(nearest + 10.0 ** (math.floor(math.log10(value)) - 2))


def _read(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """Make a value of what is known of it; what a later version adds is left out."""
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    found: dict[str, Any] = {name: _frozen(value) for name, value in values.items() if name in known}
    return kind(**found)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def tiles_to_check(grid: TileGrid, suspicious: Iterable[int]) -> list[Tile]:
    """List the tiles with rows of suspicious blocks; of a symmetric kernel also with their columns.

    A block's error does not say which of its columns are wrong. But where one triangle is stored, a wrong tile is used
    for its rows and mirrored for its columns: those of two suspicious blocks come first.

    >>> tiles_to_check(TileGrid(3, 1, 1), [0, 1])[:3]
    [Tile(row=0, col=0), Tile(row=0, col=1), Tile(row=1, col=1)]
    """
    wrong = set(suspicious)
    if not grid.is_symmetric:
        return [tile for tile in grid.tiles() if tile.row in wrong]
    touched = [tile for tile in grid.tiles() if {tile.row, tile.col} & wrong]
    return sorted(touched, key=lambda tile: not {tile.row, tile.col} <= wrong)


def upper_bound(estimate: float, num_probes: int) -> float:
    """Turn an estimate of ‖E‖_F into an upper bound with 95 % confidence, times √(s / χ²_s(5 %)).

    With σ_k the singular values of E, ‖E V‖²_F = Σ_k σ_k² c_k, where the c_k are independent and χ²-distributed with s
    degrees of freedom. For an E of rank one the confidence is 95 % exactly; several singular values average, the sum
    falls so far short of its mean more rarely, and the bound is conservative.

    References:
        Roosta-Khorasani, Székely (2015), arXiv:1601.04731: the tails of such sums order as their weights majorise.

    >>> round(upper_bound(1.0, 10), 2), round(upper_bound(1.0, 100), 2)
    (1.59, 1.13)
    """
    from scipy.stats import chi2

    return estimate * float(np.sqrt(num_probes / chi2.ppf(1 - CONFIDENCE, num_probes)))


def bad_fraction(num_pairs: int) -> float:
    """Bound the fraction of bad pairs of which p sampled ones had none, with 95 % confidence: 1 − 0.05^(1/p).

    If a larger fraction were bad, p good pairs would be drawn in fewer than 5 % of all samplings.

    >>> round(bad_fraction(299), 4), round(bad_fraction(16), 2), bad_fraction(0)
    (0.01, 0.17, 1.0)
    """
    return 1 - (1 - CONFIDENCE) ** (1 / num_pairs) if num_pairs else 1.0
