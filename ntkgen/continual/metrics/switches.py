"""How the kernel of the first task moves at the switches between tasks, from one epoch to the next."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ntkgen.continual.metrics.kernels import distance

if TYPE_CHECKING:
    import xarray

FloatArray = npt.NDArray[np.float64]
# Two times in epochs are equal up to this number.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Switches:
    """The motion of a kernel K_e over the ends e of epochs, measured on one task.

    Attributes:
        norm_first: ‖K‖_F after the first epoch.
        norm_before: ‖K‖_F at the end of the first task.
        norm_after: ‖K‖_F after the first epoch of the second task.
        norm_last: ‖K‖_F in the end.
        distance_ratio: Mean kernel distance S(K_e, K_{e+1}) over the switches, divided by its mean within tasks.
        norm_ratio: Median of ‖K_{e+1}‖_F / ‖K_e‖_F over the switches.
    """

    norm_first: float
    norm_before: float
    norm_after: float
    norm_last: float
    distance_ratio: float
    norm_ratio: float

    @classmethod
    def of(
        cls,
        kernels: FloatArray,  # (epochs, N, N)
        trained_task: npt.NDArray[np.int64],  # (epochs,)
    ) -> "Switches":
        """Measure kernels at the ends of consecutive epochs, of two tasks or more, one of them with two epochs."""
        is_switch = trained_task[1:] != trained_task[:-1]
        norms = np.linalg.norm(kernels, axis=(1, 2))
        steps = np.array([distance(K, L) for K, L in itertools.pairwise(kernels)])
        first = int(np.flatnonzero(is_switch)[0])
        return cls(
            norm_first=float(norms[0]),
            norm_before=float(norms[first]),
            norm_after=float(norms[first + 1]),
            norm_last=float(norms[-1]),
            distance_ratio=float(steps[is_switch].mean() / steps[~is_switch].mean()),
            norm_ratio=float(np.median((norms[1:] / norms[:-1])[is_switch])),
        )


def switches_of(
    kernels: "xarray.Dataset", task: int = 0, samples: npt.NDArray[np.bool_] | None = None
) -> Switches | None:
    """Measure the block of a task at the end of each epoch.

    Args:
        kernels: The recorded kernels of a run.
        task: The task.
        samples: Which of the probe samples are used, (probe,); None for all.

    Returns:
        The measures; None if the kernels were not recorded after each epoch, if the head grows, or if there is no
        switch.
    """
    epochs = np.asarray(kernels.epoch.values)
    times = np.flatnonzero((epochs > TOLERANCE) & (abs(epochs - np.round(epochs)) < TOLERANCE))
    rows = np.asarray(kernels.row_task.values) == task
    if samples is not None:
        rows &= samples[kernels.row_sample.values]
    trained = np.asarray(kernels.task.values[times])
    is_switch = trained[1:] != trained[:-1]
    numbers = kernels.get("num_outputs")
    if numbers is not None and len(np.unique(numbers.values[times])) > 1:
        return None  # the head grows: kernels before and after a switch cannot be compared
    if not np.allclose(np.diff(epochs[times]), 1, atol=TOLERANCE) or is_switch.all() or not is_switch.any():
        return None
    found = kernels.kernel.isel(time=times, row=np.flatnonzero(rows), col=np.flatnonzero(rows)).values
    return Switches.of(np.asarray(found, np.float64), trained)
