"""The loader of .npz files with samples of any form: one array `x`, or the named inputs of a network."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ntkgen.data.npz import require_finite
from ntkgen.data.official import UNREADABLE, one_line
from ntkgen.errors import DataError

LABELS = "y"  # the name of labels or targets; all other arrays are inputs

Array = np.ndarray[Any, Any]
_HEADERS: dict[tuple[int, int], Any] = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def names_in(path: Path) -> dict[str, tuple[int, str]]:
    """List the arrays of a file, with their numbers of axes and kinds. List none if the file cannot be read."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    read = _HEADERS[npy.read_magic(file)]
                    shape, _, dtype = read(file)
                found[member.removesuffix(".npy")] = len(shape), dtype.kind
    except (*UNREADABLE, KeyError):
        return {}
    return found


def are_images(found: dict[str, tuple[int, str]]) -> bool:
    """Say whether a file holds images `x` with integer labels `y`, which a network can be trained on, or is damaged.

    >>> are_images({"x": (4, "f"), "y": (1, "i")}), are_images({"x": (2, "f"), "y": (1, "f")}), are_images({})
    (True, False, True)
    """
    return not found or (found.keys() == {"x", "y"} and found["x"][0] == 4 and found["y"][1] in "iu")


def load_arrays(path: Path) -> tuple[dict[str, Tensor], Tensor, int]:
    """Load the inputs, the labels (-1 where there are none), and the number of classes or targets.

    Raises:
        DataError: If the file holds no inputs, or arrays that do not fit each other.
    """
    arrays = _read(path)
    targets = arrays.pop(LABELS, None)
    if not arrays or any(name.startswith("arr_") for name in arrays):
        raise DataError(
            f"{path} has no named inputs: expected x, or the names of a network's arguments, found "
            f"{', '.join(arrays) or 'none'}. Were the arrays saved without names? Write the file with "
            "numpy.savez(path, input_ids=ids, attention_mask=mask)."
        )
    for name, array in arrays.items():
        _check(name, array, path)
    counts = {name: len(array) for name, array in arrays.items()}
    if targets is not None:
        counts[LABELS] = len(targets) if targets.ndim else 0
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise DataError(
            f"The arrays in {path} have different lengths: expected the same number of samples in each, found {found}. "
            "They may come from different splits, or one is the same for all samples. Save one row for each sample."
        )
    labels, num_classes = _labels(targets, next(iter(counts.values())))
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, labels, num_classes


def _read(path: Path) -> dict[str, Array]:
    """Read all arrays.

    Raises:
        DataError: If the file is not an archive of arrays.
    """
    try:
        with zipfile.ZipFile(path):  # numpy.load also accepts a file of a single array
            pass
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read: expected an .npz file of arrays, found the error {one_line(error)}. "
            "It may be of another format, be damaged, or hold Python objects. Write the file with "
            "numpy.savez(path, x=samples)."
        ) from error
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}


def _check(name: str, array: Array, path: Path) -> None:
    """Refuse an array that does not hold samples.

    Raises:
        DataError: If it has no samples, or no finite real numbers.
    """
    if array.ndim == 0 or array.size == 0 or array.dtype.kind not in "biuf" or array.dtype.byteorder == ">":
        raise DataError(
            f"{name} in {path} holds no samples: expected an array of real numbers whose first axis is that of the "
            f"samples, found {array.shape} of {array.dtype}. Is it empty, text, or of another machine? Save an array "
            "of numbers, such as array.astype('float32')."
        )
    require_finite(array, path, name)


def _labels(targets: Array | None, count: int) -> tuple[Tensor, int]:
    """Return class numbers and their count. Targets that are no class numbers are not kept: all labels are -1."""
    is_classes = targets is not None and targets.ndim == 1 and targets.dtype.kind in "iu" and int(targets.min()) >= 0
    if targets is None or not is_classes:
        width = 1 if targets is None or targets.ndim < 2 else targets.shape[1]
        return torch.full((count,), -1, dtype=torch.int64, device="cpu"), width
    return torch.from_numpy(targets.astype(np.int64)), int(targets.max()) + 1
