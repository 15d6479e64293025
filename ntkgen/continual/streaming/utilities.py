"""The scaled utilities of all weights at the end of a run, as one .npz file. This module does not import torch."""

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ntkgen.files.folder import Folder

UTILITIES = "utilities.npz"


def write_utilities(folder: Folder, utilities: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write the scaled utilities s of every parameter by name, (members, …)."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **utilities)
    folder.write(UTILITIES, buffer.getvalue())


def read_utilities(folder: Folder) -> dict[str, npt.NDArray[np.float32]] | None:
    """Read the scaled utilities of every parameter by name, (members, …); None if there are none."""
    data = folder.read(UTILITIES)
    if data is None:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}
