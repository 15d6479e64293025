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
        first: Error in the first bin.
        last: Error averaged over the last `LAST_BINS` bins.
        increase: Paired by seed, the last error minus the smallest error of any bin: the loss of plasticity.
        dead_units: Dead hidden units in the last bin.
        weight_magnitude: Mean magnitude of the parameters at the end.
    """

    algorithm: str
    first: Spread
    last: Spread
    increase: Spread
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
        last = error[-LAST_BINS:].mean(0)
        final = {name: _spread(np.asarray(own[name].isel(bin=-1).values, np.float64)) for name in FINAL}
        found.append(Outcome(algorithm, _spread(error[0]), _spread(last), _spread(last - error.min(0)), **final))
    return found


def page(bins: "xarray.Dataset") -> list[str]:
    """Write the outcomes as a table, with means and standard deviations over seeds."""
    samples, seeds = int(bins.samples.values[-1]), bins.sizes["seed"]
    lines = [
        f"{samples:,} samples, {seeds} seed{'s' * (seeds > 1)}; mean ± standard deviation over seeds",
        f"  {'':<20}{'first error':>18}{'last error':>18}{'dead units':>16}{'mean |weight|':>18}",
    ]
    for each in outcomes(bins):
        columns = (each.first, each.last, each.dead_units, each.weight_magnitude)
        widths = (18, 18, 16, 18)
        cells = "".join(f"{spread!s:>{width}}" for spread, width in zip(columns, widths, strict=True))
        lines.append(f"  {each.algorithm:<20}{cells}")
    return lines


def _spread(values: Sequence[float] | Any) -> Spread:
    found = Spread.of(values)
    assert found is not None
    return found
