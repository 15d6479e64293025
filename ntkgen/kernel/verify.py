"""Every file of a store read, and those named that are missing, cut short or damaged."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from ntkgen.kernel.arrays import side_arrays, small_arrays
from ntkgen.kernel.report import first_few
from ntkgen.kernel.store import CHECKSUM_BYTES, UNDERFLOW, KernelStore

ZarrArray = zarr.Array[Any]
Key = tuple[int, ...]
# Called after each file with how many are read, and how many there are.
Report = Callable[[int, int], None]


def ignore_report(done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with one file of a store: it is ``missing``, ``cut short``, ``damaged`` or ``not finite``."""

    file: str  # below the store
    problem: str


def find_damage(store: KernelStore, report: Report = ignore_report) -> list[Damage]:
    """Read every array of a store, of every dtype, and compare each file with its checksum."""
    group = zarr.open_group(LocalStore(store.path, read_only=True), mode="r", use_consolidated=False)
    arrays, found = {}, []
    for name in _array_names(store):
        array = _open(group, name)
        if array is None:
            found.append(Damage(f"{name}/zarr.json", _state_of_metadata(store, name)))
        else:
            arrays[name] = array
    files = [(name, key) for name, array in arrays.items() for key in _keys(store, name, array)]
    for done, (name, key) in enumerate(files, start=1):
        if problem := _problem(store, arrays[name], name, key):
            found.append(Damage(f"{name}/c/{'/'.join(map(str, key))}", problem))
        report(done, len(files))
    return found


def _array_names(store: KernelStore) -> list[str]:
    sides = [name for pair in side_arrays(store.grid) for name in pair]
    kernels = [f"ntk_{dtype}" for dtype in store.manifest.dtypes]
    return [*small_arrays(store.grid), *sides, *kernels, *([UNDERFLOW] if "float16" in store.manifest.dtypes else [])]


def _open(group: zarr.Group, name: str) -> ZarrArray | None:
    try:
        array = group[name]
    except (ValueError, KeyError, TypeError):
        return None
    return array if isinstance(array, zarr.Array) else None


def _state_of_metadata(store: KernelStore, name: str) -> str:
    return "damaged" if (store.path / name / "zarr.json").exists() else "missing"


def _keys(store: KernelStore, name: str, array: ZarrArray) -> Iterator[Key]:
    """List the files that an array should have: of one stored triangle, and of counts per tile, no others."""
    counts = (math.ceil(length / chunk) for length, chunk in zip(array.shape, array.chunks, strict=True))
    keys = itertools.product(*map(range, counts))
    is_triangle = store.grid.is_symmetric and (name == UNDERFLOW or store.manifest.layout == "upper")
    if not is_triangle or not (name == UNDERFLOW or name.startswith("ntk_")):
        return keys
    first = 0 if name == UNDERFLOW else array.ndim - 2
    return (key for key in keys if key[first] <= key[first + 1])


def _problem(store: KernelStore, array: ZarrArray, name: str, key: Key) -> str | None:
    path = store.path.joinpath(name, "c", *map(str, key))
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None if _may_be_absent(store, name) else "missing"
    if size != math.prod(array.chunks) * array.dtype.itemsize + CHECKSUM_BYTES:
        return "cut short"
    region = tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(key, array.chunks, strict=True))
    try:
        values = np.asarray(array[region])
    except (ValueError, RuntimeError):
        return "damaged"
    return None if np.isfinite(values).all() else "not finite"


def _may_be_absent(store: KernelStore, name: str) -> bool:
    """Say whether an array needs no file: labels that were not given are -1, as nothing reads; data sets have some."""
    return name in {"row_label", "col_label"} and not store.manifest.provenance


def files_to_remove(store: KernelStore, found: list[Damage]) -> list[str]:
    """Name the files that must go so that `ntkgen compute` makes them anew: it reads none that has its exact size.

    The counts of a tile are written with the tile, which then must go too.
    """
    files: list[str] = []
    for name, problem in ((damage.file, damage.problem) for damage in found):
        is_tile, is_count = name.startswith("ntk_"), name.startswith(f"{UNDERFLOW}/c/")
        if problem == "not finite" or (is_tile and problem == "damaged") or (is_count and problem != "missing"):
            files.append(name)
        if is_count:
            plane = "0/" if store.grid.num_planes > 1 else ""
            files.append(f"ntk_float16/c/{plane}{name.removeprefix(f'{UNDERFLOW}/c/').removesuffix('/0')}")
    return list(dict.fromkeys(files))


def explain_damage(store: KernelStore, found: list[Damage]) -> str:
    """Say in one line what is wrong with a store, and what to do."""
    files = first_few(f"{damage.file} {damage.problem}" for damage in found)
    remove = files_to_remove(store, found)
    first = f"remove {first_few(remove)}, then " if remove else ""
    return (
        f"The store at {store.path} is not whole: expected every file with its exact size and its checksum, found "
        f"{len(found)} otherwise ({files}). An interrupted computation or copy, or a disk error? To mend it, {first}"
        "run the same `ntkgen compute` again: it makes what is missing anew."
    )
