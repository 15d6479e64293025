"""What is known of each time and each row of recorded kernels; no torch."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ntkgen.continual.series import FixedArray, GrowingArray

# The time axis.
TIME = "time"
# The attribute of the group that says what the kernels are of, and the version of its format.
ATTRIBUTE = "ntkgen_snapshots"
FORMAT_VERSION = 1
# What is known of each row.
NOTES = {
    "sample": "position of the sample in the probe",
    "output": "output of the network, after the output map",
    "label": "label of the sample",
    "task": "task of the sample",
    "sample_id": "position of the sample in its data set",
}
# What is known of each time.
TIMES = {
    "iteration": "iterations of training so far",
    "epoch": "epochs of training so far",
    "task": "task in training",
    "step_size": "learning rate",
    "num_outputs": "outputs of the network",
}


def kernel_array(name: str, dtype: str, shape: tuple[int, ...], dims: tuple[str, ...]) -> GrowingArray:
    """Describe an array of kernels over time."""
    named = " ".join([*TIMES, *(f"{axis}_{note}" for axis in ("row", "col") for note in NOTES)])
    note = {"long_name": "empirical neural tangent kernel, J Jᵀ", "units": "1", "coordinates": named}
    return GrowingArray(name, dtype, shape, (TIME, *dims), note)


def time_arrays() -> list[GrowingArray]:
    """Describe the coordinates of the times."""
    real = {"epoch", "step_size"}
    return [
        GrowingArray(name, "float64" if name in real else "int64", (), (TIME,), {"long_name": meaning})
        for name, meaning in TIMES.items()
    ]


def row_arrays(values: Mapping[str, npt.NDArray[np.int64]]) -> list[FixedArray]:
    """List the coordinates of rows and columns, given those of `NOTES` for each row."""
    return [
        FixedArray(f"{axis}_{name}", values[name].astype(np.int64), (axis,), {"long_name": meaning})
        for axis in ("row", "col")
        for name, meaning in NOTES.items()
    ]
