"""Mean and spread over the seeds of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray

if TYPE_CHECKING:
    from ntkgen.continual.reading import RunCollection

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a number over independent runs.

    Attributes:
        mean: The mean x̄ of the n values.
        deviation: The standard deviation s = √(Σ (x − x̄)² / (n − 1)); None for one value.
        interval: The interval of the mean at the level of 95 %, x̄ ± t s / √n, where t is the 0.975 quantile of
            Student's distribution with n − 1 degrees of freedom; None for one value. It assumes normal values.
        n: Number of values.
    """

    mean: float
    deviation: float | None
    interval: tuple[float, float] | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float] | npt.NDArray[np.float64]) -> "Spread | None":
        """Compute mean and spread of the values that are not NaN; None if there are none.

        >>> Spread.of([1.0, 3.0]).interval
        (-10.706204736174694, 14.706204736174694)
        """
        numbers = np.asarray(values, np.float64)
        numbers = numbers[~np.isnan(numbers)]
        n = len(numbers)
        if n < 2:
            return cls(float(numbers[0]), None, None, 1) if n else None
        from scipy.special import stdtrit

        mean, deviation = float(numbers.mean()), float(numbers.std(ddof=1))
        half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * deviation / n**0.5
        return cls(mean, deviation, (mean - half, mean + half), n)

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean, s / √n; None for one value.

        >>> Spread.of([1.0, 3.0]).standard_error
        1.0
        """
        return None if self.deviation is None else self.deviation / self.n**0.5

    def __str__(self) -> str:
        """Write the mean, and the standard deviation after ±."""
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "mean": self.mean,
            "standard_deviation": self.deviation,
            "interval_95": None if self.interval is None else list(self.interval),
            "n": self.n,
        }


def spreads(metrics: xarray.Dataset) -> dict[str, Any]:
    """Compute mean and spread over seeds of every metric of runs of one width.

    Args:
        metrics: What `RunCollection.metrics` has computed, for one width.

    Returns:
        For each kind of scores and each metric a `Spread`; a metric without any value is left out.
    """
    names = [str(name) for name, values in metrics.data_vars.items() if set(values.dims) == {"seed", "scores"}]
    result: dict[str, Any] = {}
    for kind in metrics.scores.values.tolist():
        found = {name: Spread.of(metrics[name].sel(scores=kind).values) for name in names}
        result[kind] = {name: spread for name, spread in found.items() if spread is not None}
    return result


def spreads_by_width(runs: "RunCollection") -> list[tuple[int | None, list[int], dict[str, Any]]]:
    """List the widths with the seeds of the complete runs, and the `spreads` over these seeds."""
    metrics = runs.metrics()
    result = []
    for width in runs.widths:
        seeds = [seed for of, seed in runs.complete if of == width]
        if seeds:
            own = metrics.sel(width=width) if "width" in metrics.dims else metrics
            result.append((width, seeds, spreads(own)))
    return result
