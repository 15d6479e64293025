"""The scaled utilities of all weights at the end of a run, as one .npz file. This module does not import torch."""

import io
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ntkgen.errors import StoreError
from ntkgen.files.folder import Folder

UTILITIES = "utilities.npz"


def write_utilities(folder: Folder, utilities: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write the scaled utilities s of every parameter by name, (members, …)."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **utilities)
    folder.write(UTILITIES, buffer.getvalue())


def read_utilities(folder: Folder) -> dict[str, npt.NDArray[np.float32]] | None:
    """Read the scaled utilities of every parameter by name, (members, …); None if there are none.

    Raises:
        StoreError: If the file is damaged.
    """
    data = folder.read(UTILITIES)
    if data is None:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, AttributeError) as error:
        raise StoreError(
            f"The utilities of the run at {folder} cannot be read ({type(error).__name__}): expected {UTILITIES} as "
            f"ntkgen writes it, found {len(data):,} bytes of something else. A disk error, or a copy of a part? Run "
            "the same command of the run again, which writes this file anew."
        ) from error
