"""How the kernels and outputs of a probe are placed in the arrays of `Snapshots`, and what is known of each row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ntkgen.continual.axes import TIME, kernel_array, row_arrays, time_arrays
from ntkgen.continual.series import FixedArray, GrowingArray
from ntkgen.errors import InputError, ShapeError
from ntkgen.fingerprints import array_fingerprint
from ntkgen.jacobian.batches import ArrayLike, checked_labels
from ntkgen.jacobian.outputs import output_map
from ntkgen.jacobian.precision import policy

SEEN = "seen"


@dataclass(frozen=True)
class Layout:
    """How a kernel is placed in the arrays.

    Attributes:
        output: The output map.
        num_samples: Probe samples, n.
        num_outputs: Outputs of the network in the end, M.
        rows_per_sample: Rows of the kernel per sample.
    """

    output: str
    num_samples: int
    num_outputs: int
    rows_per_sample: int

    @classmethod
    def of(cls, output: str, num_samples: int, num_outputs: int) -> "Layout":
        """Lay out the kernels of an output map.

        Raises:
            UnknownNameError: If the output has an unknown name.
            InputError: If there is no such output.
        """
        if output in {"full", SEEN}:
            return cls(output, num_samples, num_outputs, num_outputs)
        chosen = output_map(output, num_outputs)
        rows = 1 if chosen.reduction != "none" or chosen.matrix is None else len(chosen.matrix)
        return cls(output, num_samples, num_outputs, rows)

    @property
    def num_rows(self) -> int:
        """Rows of the kernel."""
        return self.num_samples * self.rows_per_sample

    @property
    def dims(self) -> tuple[str, ...]:
        """Axes of one kernel."""
        return ("output", "row", "col") if self.output == "diagonal" else ("row", "col")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one kernel."""
        square = (self.num_rows, self.num_rows)
        return (self.num_outputs, *square) if self.output == "diagonal" else square

    def growing(self, precision: str, layers: Sequence[str], measures: Mapping[str, str]) -> list[GrowingArray]:
        """List the arrays that grow along time; of `measures`, there is one number for each time."""
        dtype = str(policy(precision).accumulate_dtype).removeprefix("torch.")
        logits = str(policy(precision).compute_dtype).removeprefix("torch.")
        meaning = {"long_name": "outputs of the network on the probe samples", "units": "1", "coordinates": "iteration"}
        arrays = [
            kernel_array("kernel", dtype, self.shape, self.dims),
            GrowingArray("logits", logits, (self.num_samples, self.num_outputs), (TIME, "sample", "output"), meaning),
        ]
        if layers:
            shape = (len(layers), *self.shape)
            arrays.append(kernel_array("kernel_by_layer", dtype, shape, ("layer", *self.dims)))
        numbers = [
            GrowingArray(name, "float64", (), (TIME,), {"long_name": long_name, "units": "1"})
            for name, long_name in measures.items()
        ]
        return [*arrays, *time_arrays(), *numbers]

    def placed(self, kernel: Tensor, num_outputs: int, num_seen: int | None) -> Tensor:
        """Place the kernel of a network with fewer outputs than in the end; the others are NaN.

        Raises:
            ShapeError: If it has more.
            InputError: If the output is `seen`, and it is not said how many are.
        """
        if num_outputs > self.num_outputs:
            raise ShapeError(
                f"The network has {num_outputs} outputs: expected {self.num_outputs} for the output {self.output!r}. "
                "Has its head grown? Give `num_outputs` the number that it has in the end."
            )
        kept = num_outputs
        if self.output == SEEN:
            if num_seen is None or not 1 <= num_seen <= num_outputs:
                raise InputError(
                    f"The output 'seen' needs the number of classes seen so far: expected 1 to {num_outputs}, found "
                    f"{num_seen}. Pass `num_seen`."
                )
            kept = num_seen
        if kept == self.num_outputs or self.output not in {"full", SEEN, "diagonal", "centered"}:
            return kernel
        placed = kernel.new_full(self.shape, float("nan"))
        if self.output == "diagonal":
            placed[:kept] = kernel
            return placed
        n, m = self.num_samples, self.rows_per_sample
        if self.output == "centered":  # the contrasts of fewer outputs are the first of those of more
            kept -= 1
        blocks = kernel.view(n, len(kernel) // n, n, len(kernel) // n)[:, :kept, :, :kept]
        placed.view(n, m, n, m)[:, :kept, :, :kept] = blocks
        return placed

    def placed_logits(self, logits: Tensor) -> Tensor:
        """Add outputs that do not exist yet, as NaN."""
        placed = logits.new_full((self.num_samples, self.num_outputs), float("nan"))
        placed[:, : logits.shape[1]] = logits
        return placed


@dataclass(frozen=True, eq=False)
class Notes:
    """Labels, tasks and positions of the probe samples; -1 for unknown ones."""

    labels: npt.NDArray[np.int64]
    tasks: npt.NDArray[np.int64]
    sample_ids: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        num_samples: int,
        labels: ArrayLike | None,
        tasks: Sequence[int] | npt.NDArray[np.int64] | None,
        sample_ids: Sequence[int] | npt.NDArray[np.int64] | None,
    ) -> "Notes":
        """Check what a caller says of the samples.

        Raises:
            InputError: If there is not one integer for each.
        """
        unknown = np.full(num_samples, -1, dtype=np.int64)
        return cls(
            checked_labels(labels, num_samples),
            _integers(tasks, "tasks", unknown),
            _integers(sample_ids, "sample_ids", unknown),
        )

    def fingerprint(self) -> str:
        """Hash all of it."""
        return array_fingerprint(torch.from_numpy(np.stack([self.labels, self.tasks, self.sample_ids])))

    def rows(self, layout: Layout) -> list[FixedArray]:
        """List the coordinates of rows and columns."""
        m = layout.rows_per_sample
        values = {
            "sample": np.repeat(np.arange(layout.num_samples), m),
            "output": np.tile(np.arange(m), layout.num_samples),
            "label": np.repeat(self.labels, m),
            "task": np.repeat(self.tasks, m),
            "sample_id": np.repeat(self.sample_ids, m),
        }
        return row_arrays(values)


def _integers(values: Any, name: str, unknown: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if values is None:
        return unknown
    array = np.asarray(values)
    if array.shape != unknown.shape or array.dtype.kind not in "iu":
        raise InputError(
            f"`{name}` must have one integer for each of the {len(unknown)} probe samples, and is {array.dtype} of "
            f"shape {array.shape}. Does it belong to another probe? Pass one for each sample."
        )
    return array.astype(np.int64)
