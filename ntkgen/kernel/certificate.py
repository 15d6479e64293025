"""What is known of the accuracy of a finished store, as a value: the certificate and its statistics."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkgen.errors import InputError
from ntkgen.kernel.tiles import Tile, TileGrid

CONFIDENCE = 0.95


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


def usual_sampling(output: str) -> Sampling:
    """Choose how much is sampled of the kernel of an output map where nobody says."""
    return REDUCED_SAMPLING if output in {"trace", "diagonal"} else USUAL_SAMPLING


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
        max_pair_error: The largest |E_rc| / √(K_rr K_cc) of the sampled pairs of samples.
        block_errors: The estimate of ‖E_b‖_F for the rows of each block of samples; their squares add up to `error`².
        suspicious: The blocks whose error rounding does not explain; see `suspicious_blocks` for the rule.
    """

    dtype: str
    error: float
    bound: float
    relative_error: float
    relative_bound: float
    max_pair_error: float
    block_errors: tuple[float, ...]
    suspicious: tuple[int, ...]


@dataclass(frozen=True)
class Certificate:
    """What was sampled, and the error of each store dtype.

    `seconds`, what it took, is for printing alone: neither compared nor kept, so that equal runs give equal bytes.
    """

    num_probes: int
    num_pairs: int
    seed: int
    kernel_norm: float  # the estimate of ‖K‖_F
    errors: tuple[StoredError, ...]  # in the store's order of dtypes
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @property
    def bad_pairs_below(self) -> float:
        """Bound the fraction of pairs with a larger error than the sampled ones have; see `bad_fraction`."""
        return bad_fraction(self.num_pairs)

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values: dictionaries, lists, strings, and numbers of three digits."""
        kept = {name: getattr(self, name) for name in ("num_probes", "num_pairs", "seed")}
        errors = [{name: _plain(name, value) for name, value in vars(error).items()} for error in self.errors]
        return {**kept, "kernel_norm": rounded(self.kernel_norm), "errors": errors}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Certificate":
        """Read back what `to_json` wrote."""
        errors = tuple(
            StoredError(**{name: _frozen(value) for name, value in error.items()}) for error in values["errors"]
        )
        return cls(**{**values, "errors": errors})


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

    If a larger fraction were bad, so many good pairs would be drawn in fewer than 5 % of all samplings.

    >>> round(bad_fraction(299), 4), round(bad_fraction(16), 2), bad_fraction(0)
    (0.01, 0.17, 1.0)
    """
    return 1 - (1 - CONFIDENCE) ** (1 / num_pairs) if num_pairs else 1.0
