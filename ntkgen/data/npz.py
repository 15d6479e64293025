"""The loader of .npz files with images and labels. It checks shapes, dtypes and values."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ntkgen.data.catalog import DATASETS
from ntkgen.data.official import UNREADABLE, one_line
from ntkgen.errors import DataError
from ntkgen.files.paths import expanded

# Maximum number of classes of a small data set. A larger data set may have as many classes as samples. Larger labels
# are identifiers or mistakes.
MAX_CLASSES = 10_000


def load_npz(
    name: str,
) -> tuple[Tensor, Tensor]:  # images (samples, channels, height, width), uint8 or float32; labels (samples,), int64
    """Load images and labels from a user's file.

    Raises:
        DataError: If the file is missing or not valid.
    """
    path = expanded(name)
    if not path.is_file():
        raise DataError(
            f"Data file {path} is missing: expected a file, found none in {Path.cwd()}. The path may be misspelt, or "
            f"relative to another directory. Give the path of a file, or the name of a data set: {', '.join(DATASETS)}."
        )
    x, y = _read_arrays(path)
    _check_images(x, path)
    _check_targets(y, path)
    if len(x) != len(y):
        raise DataError(
            f"x and y in {path} have different lengths: expected one label for each sample, found {len(x)} samples and "
            f"{len(y)} labels. They may come from different splits. Save samples and labels of the same split."
        )
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64))


def _read_arrays(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Read the arrays x and y.

    Raises:
        DataError: If the file is not an archive of arrays, or x or y is missing.
    """
    advice = "Write the file with numpy.savez(path, x=images, y=labels)."
    try:
        with zipfile.ZipFile(path):  # numpy.load also accepts a file of a single array
            pass
        with np.load(path, allow_pickle=False) as archive:
            found = list(archive.files)
            arrays = {name: archive[name] for name in ("x", "y") if name in found}
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read: expected an .npz file of arrays, found the error {one_line(error)}. "
            f"It may be of another format, be damaged, or hold Python objects. {advice}"
        ) from error
    missing = [name for name in ("x", "y") if not isinstance(arrays.get(name), np.ndarray)]
    if missing:
        raise DataError(
            f"{path} has no array {' and no array '.join(missing)}: expected x (images) and y (labels), found "
            f"{', '.join(map(repr, found)) or 'nothing'}. The arrays may have been saved under other names. {advice}"
        )
    return arrays["x"], arrays["y"]


def _check_images(x: np.ndarray[Any, Any], path: Path) -> None:
    """Refuse an array that does not hold images.

    Raises:
        DataError: If the shape, the dtype or the values are wrong.
    """
    if x.ndim != 4 or x.size == 0:
        raise DataError(
            f"x in {path} has the wrong shape: expected (samples, channels, height, width), all at least 1, found "
            f"{x.shape}. Grey images may lack the axis of channels, or there are no samples. "
            "Reshape it. For grey images, x[:, None] adds this axis."
        )
    if x.dtype not in {np.dtype(np.float32), np.dtype(np.uint8)}:
        raise DataError(
            f"x in {path} has the wrong dtype: expected float32 or uint8, found {x.dtype}. The default dtype of "
            "NumPy is float64. Save x.astype('float32'), or uint8 images of 0 to 255."
        )
    require_finite(x, path, "x")


def _check_targets(y: np.ndarray[Any, Any], path: Path) -> None:
    """Refuse an array that does not hold class labels.

    Raises:
        DataError: If the shape, the dtype or the values are wrong.
    """
    if y.ndim != 1 or y.size == 0:
        raise DataError(
            f"y in {path} has the wrong shape: expected (samples,), at least one, found {y.shape}. "
            "It may be one-hot. Save one integer for each sample, such as y.argmax(axis=1)."
        )
    if y.dtype.kind not in "iu":
        raise DataError(
            f"y in {path} has the wrong dtype: expected integers, found {y.dtype}. Targets of a regression are not "
            "labels. Save y.astype('int64') if they are classes."
        )
    least, largest = int(y.min()), int(y.max())
    if least < 0 or largest >= np.iinfo(np.int64).max:
        raise DataError(
            f"y in {path} has labels out of range: expected 0 to the number of classes minus 1, found {least} to "
            f"{largest}. -1 may stand for a missing label. Remove those samples, or number the classes from 0."
        )
    if largest >= max(MAX_CLASSES, len(y)):
        raise DataError(
            f"y in {path} has labels that are not class numbers: expected at most {max(MAX_CLASSES, len(y))} classes, "
            f"found the label {largest}. The labels may be identifiers. Number the classes from 0."
        )


def require_finite(array: npt.NDArray[Any], path: object, name: str) -> None:
    """Refuse an array with infinity or NaN.

    Raises:
        DataError: If a value is not finite.
    """
    finite = np.isfinite(array)
    if not finite.all():
        raise DataError(
            f"{name} in {path} has values that are not finite: expected none, found {int((~finite).sum())}, the first "
            f"in sample {int(np.argwhere(~finite)[0, 0])}. A division by zero or an overflow may have made them. "
            "Remove those samples, or repair them."
        )
