"""Data sets of several runs as one, with a dimension of seeds and, if there are several, one of widths."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

# The width and the seed of a run. A width of None is the default width of the network.
Key = tuple[int | None, int]


def joined(runs: Mapping[Key, xarray.Dataset], time: str | None = None, task: str = "") -> xarray.Dataset:
    """Join data sets of runs that differ in nothing but their seeds and widths.

    Times are joined by their position if the runs have trained on the same task at each position. The coordinates of
    time, such as the iteration, then stay one-dimensional if they are equal in all runs. Otherwise, the times with the
    same iteration are joined. A run that lacks a time has NaN there.

    Args:
        runs: The data sets.
        time: The time axis; None if there is none.
        task: The coordinate of time with the task in training.

    Returns:
        The variables with the additional first dimensions ``width``, if there is more than one width, and ``seed``.
    """
    where: dict[str, Any] = {}
    if time is not None:
        runs, where = _aligned(runs, time, task)
    widths, seeds = sorted({width or 0 for width, _ in runs}), sorted({seed for _, seed in runs})
    rows = []
    for width in widths:
        found = {seed: data for (of, seed), data in runs.items() if (of or 0) == width}
        own = sorted(found)
        rows.append(_concatenated([found[seed] for seed in own], "seed", own).reindex(seed=seeds))
    result = rows[0] if len(widths) == 1 else _concatenated(rows, "width", widths)
    if time is not None:
        result = result.drop_vars(time)
    ordered: xarray.Dataset = result.transpose(*[dim for dim in ("width", "seed") if dim in result.dims], ...)
    return ordered.assign_coords(where)


def _concatenated(parts: list[xarray.Dataset], dim: str, values: list[int]) -> xarray.Dataset:
    return xarray.concat(
        parts,
        xarray.DataArray(values, dims=dim, name=dim),
        data_vars="all",
        coords="different",
        compat="equals",
        join="outer",
        combine_attrs="drop_conflicts",
    )


def _aligned(
    runs: Mapping[Key, xarray.Dataset], time: str, task: str
) -> tuple[dict[Key, xarray.Dataset], dict[str, Any]]:
    """Give each time an index that means the same in all runs, and take out the coordinates that all runs share."""
    longest = max(runs.values(), key=lambda data: data.sizes[time])
    if not all(_begins(longest[task].values, data[task].values) for data in runs.values()):
        return {key: data.assign_coords({time: data.iteration.values}) for key, data in runs.items()}, {}
    own = [str(name) for name, values in longest.coords.items() if values.dims == (time,)]
    shared = {
        name: longest[name].variable
        for name in own
        if all(_begins(longest[name].values, data[name].values) for data in runs.values())
    }
    indexed = {
        key: data.drop_vars(list(shared)).assign_coords({time: np.arange(data.sizes[time])})
        for key, data in runs.items()
    }
    return indexed, shared


def _begins(whole: npt.NDArray[Any], part: npt.NDArray[Any]) -> bool:
    return bool(np.array_equal(whole[: len(part)], part, equal_nan=whole.dtype.kind == "f"))
