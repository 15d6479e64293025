"""The whole exact kernel of a few samples, from the rows of the Jacobian of each sample alone.

K = J₁ J₂ᵀ is summed over groups of parameters, so that the rows of a large network fit into memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ntkgen.checks.rows import ExactRows
from ntkgen.jacobian.cost import Reduction
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.jacobian.reals import count_real_numbers
from ntkgen.jacobian.reference import MAX_JACOBIAN_BYTES, parameters_in_groups, trainable
from ntkgen.progress import Report, Step, counter, ignore_report

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WholeKernel:
    """An exact kernel as matrices: one, or one for each output of the map `diagonal`.

    Attributes:
        values: The matrices K.
        row_norms: √K_rr for each row r, the norm of its row of the Jacobian.
        col_norms: √K_cc for each column c.
    """

    values: FloatArray  # (planes, rows, cols)
    row_norms: FloatArray  # (planes, rows)
    col_norms: FloatArray  # (planes, cols)

    def max_error(self, stored: FloatArray) -> float:
        """Find the largest |K̃_rc − K_rc| / √(K_rr K_cc) of a stored kernel. Where the scale is zero, it is absolute."""
        scale = self.row_norms[:, :, None] * self.col_norms[:, None, :]
        return float((np.abs(stored - self.values) / np.where(scale > 0, scale, 1.0)).max())


def whole_kernel(exact: ExactRows, reduction: Reduction, report: Report = ignore_report) -> WholeKernel:
    """Compute the whole kernel, with one backward pass for each row of the Jacobian and group of parameters.

    Args:
        exact: Network, samples and output map.
        reduction: Reduction of the block of each pair of samples.
        report: Function that is called after each sample, with the stage ``exact rows``.

    Raises:
        ModelError: If outputs of a sample are others in a batch than for the sample alone.
    """
    exact.require_same_in_batches()
    m, num_samples = len(exact.matrix), sum(map(len, exact.distinct_sides))
    cut = parameters_in_groups(trainable(exact.module), MAX_JACOBIAN_BYTES // (8 * num_samples * m))
    groups = [[exact.params[name] for name in group] for group in cut]
    memory = exact.empty(num_samples * m * max(map(count_real_numbers, groups)))
    step = counter(report, "exact rows", 0, len(groups) * num_samples)
    kernel, squares = None, None
    for group in groups:
        planes = [_planes(rows, reduction) for rows in _filled(memory, exact, group, step)]
        with exact_arithmetic(memory.device):
            product = planes[0] @ planes[-1].mT
            norms = [torch.linalg.vector_norm(rows, dim=2).square() for rows in planes]
        kernel = product if kernel is None else kernel.add_(product)
        squares = norms if squares is None else [a + b for a, b in zip(squares, norms, strict=True)]
    assert kernel is not None
    assert squares is not None
    row_norms, col_norms = (squares[side].sqrt().cpu().numpy() for side in (0, -1))
    return WholeKernel(kernel.cpu().numpy(), row_norms, col_norms)


def _filled(
    memory: Tensor, exact: ExactRows, group: Sequence[Tensor], step: Step
) -> list[Tensor]:  # (samples, outputs, params) for each side
    """Compute the rows of all samples of all sides, with respect to a group of parameters."""
    m, width = len(exact.matrix), count_real_numbers(group)
    sides = exact.distinct_sides
    sizes = [len(samples) * m * width for samples in sides]
    filled = []
    for part, samples in zip(memory[: sum(sizes)].split(sizes), sides, strict=True):
        rows = part.view(len(samples), m, width)
        for place, sample in zip(rows, samples, strict=True):
            exact.fill(place, sample, range(m), group)
            step()
        filled.append(rows)
    return filled


def _planes(
    rows: Tensor,  # (samples, outputs, params)
    reduction: Reduction,
) -> Tensor:  # (planes, rows of the kernel, numbers)
    """Arrange rows so that one matrix product for each plane gives the kernel."""
    if reduction == "diagonal":
        return rows.transpose(0, 1)
    return rows.flatten(1)[None] if reduction == "trace" else rows.flatten(0, 1)[None]
