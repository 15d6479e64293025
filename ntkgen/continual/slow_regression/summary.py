"""What became of each algorithm in a run of slowly changing regression: means over seeds, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.continual.metrics.spread import Spread

if TYPE_CHECKING:
    import xarray

# The last bins, over which the final error is averaged.
LAST_BINS = 3
# The measures of a run in the table, each at its end.
FINAL = ("dead_units", "weight_magnitude")


@dataclass(frozen=True)
class Outcome:
    """What became of one algorithm.

    Attributes:
        algorithm: Its name.
        first: Error in the first bin; None if it is the only one.
        last: Error averaged over the last `LAST_BINS` bins, without the first one.
        increase: Paired by seed, the last error minus the smallest error of any bin: the loss of plasticity. None if
            there is one bin.
        dead_units: Dead hidden units in the last bin.
        weight_magnitude: Mean magnitude of the parameters at the end.
    """

    algorithm: str
    first: Spread | None
    last: Spread
    increase: Spread | None
    dead_units: Spread
    weight_magnitude: Spread

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {name: value.to_json() if isinstance(value, Spread) else value for name, value in vars(self).items()}


def outcomes(bins: "xarray.Dataset") -> list[Outcome]:
    """Summarise the bins of a run; see `ntkgen.continual.slow_regression.record.read_bins`."""
    found = []
    for algorithm in bins.algorithm.values.tolist():
        own = bins.sel(algorithm=algorithm)
        error = np.asarray(own.error.transpose("bin", "seed").values)
        last = error[-min(LAST_BINS, max(1, len(error) - 1)) :].mean(0)
        final = {name: _spread(np.asarray(own[name].isel(bin=-1).values, np.float64)) for name in FINAL}
        first, increase = (_spread(error[0]), _spread(last - error.min(0))) if len(error) > 1 else (None, None)
        found.append(Outcome(algorithm, first, _spread(last), increase, **final))
    return found


def page(bins: "xarray.Dataset") -> list[str]:
    """Write the outcomes as a table, with means and standard deviations over seeds."""
    samples, seeds = int(bins.samples.values[-1]), bins.sizes["seed"]
    is_one = bins.sizes["bin"] == 1
    of_bin = " in one bin" * is_one
    titles = {"last": "error"} if is_one else {"first": "first error", "last": "last error"}
    titles |= {"dead_units": "dead units", "weight_magnitude": "mean |weight|"}
    lines = [f"{samples:,} samples{of_bin}, {seeds} seed{'s' * (seeds > 1)}; mean ± standard deviation over seeds"]
    lines.append(f"  {'':<20}" + "".join(f"{title:>18}" for title in titles.values()))
    for each in outcomes(bins):
        cells = "".join(f"{getattr(each, name)!s:>18}" for name in titles)
        lines.append(f"  {each.algorithm:<20}{cells}")
    return lines


def _spread(values: Sequence[float] | Any) -> Spread:
    found = Spread.of(values)
    assert found is not None
    return found
