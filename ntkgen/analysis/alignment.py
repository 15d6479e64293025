"""Kernel–target alignment: how well a kernel agrees with the labels, in one pass over the stored tiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.linalg.krylov import EPSILON
from ntkgen.analysis.matrix import FloatArray, Matrix, require_memory
from ntkgen.analysis.passes import Arrays
from ntkgen.analysis.results import recall_or_compute
from ntkgen.analysis.targets import Readout
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, Step, counter, ignore_report


@dataclass(frozen=True, kw_only=True)
class AlignSettings(Settings):
    """Settings of `align`: only the memory limit."""


@dataclass(frozen=True, kw_only=True)
class AlignAnswer(Answer):
    """Alignments of a kernel with its labels, each from −1 to 1, or None if a norm is zero.

    Attributes:
        alignment: Alignment of the whole kernel with the labels.
        centered_alignment: Alignment of the whole kernel after centring over all rows.
        output_names: Names of the outputs, in the order of the two lists that follow.
        output_alignment: Alignment of each output's own kernel with the labels of that output.
        output_centered_alignment: Alignment of each output's own kernel after centring over the samples.
        output: Name of the output map that the kernel was computed with.
        samples: Number of samples in the kernel.
        passes: Number of passes over the stored tiles.
    """

    alignment: float | None
    centered_alignment: float | None
    output_names: Sequence[str]
    output_alignment: Sequence[float | None]
    output_centered_alignment: Sequence[float | None]
    output: str
    samples: int
    passes: float

    QUESTION: ClassVar[str] = "align"


@dataclass(frozen=True)
class TargetProducts:
    """Products of a kernel K with a target Y, from which the alignments follow."""

    Y: FloatArray  # (rows, columns)
    KY: FloatArray  # (rows, columns)
    row_sums: FloatArray  # (rows,), K 1
    square: float  # ‖K‖²

    @property
    def plain(self) -> float | None:
        """⟨K, Y Yᵀ⟩ / (‖K‖ ‖Y Yᵀ‖); None where one of the norms is zero."""
        return ratio(float(np.vdot(self.Y, self.KY)), self.square, _square(self.Y.T @ self.Y))

    @property
    def centered(self) -> float | None:
        """The same for H K H and H Y Yᵀ H with H = I − 1 1ᵀ / rows; None where a norm is zero up to rounding."""
        rows, means, row_means = len(self.Y), self.Y.mean(0), self.row_sums / len(self.Y)
        Y = self.Y - means
        square = centered_product(self.square, row_means, row_means)
        is_flat = square <= 4 * rows * EPSILON * self.square
        inner = float(np.vdot(Y, self.KY - np.outer(self.row_sums, means)))
        return ratio(inner, 0.0 if is_flat else square, _square(Y.T @ Y))


def centered_product(inner: float, row_means: FloatArray, other_row_means: FloatArray) -> float:
    """Turn ⟨K, L⟩ into ⟨H K H, H L H⟩ = ⟨K, L⟩ − 2 N r·s + N² r̄ s̄ for symmetric K, L with the row means r, s.

    H = I − 1 1ᵀ / N subtracts the mean of the N feature vectors. Where K is nearly constant, the differences cancel:
    the relative rounding error grows by the factor ‖K‖² / ‖H K H‖².
    """
    rows = len(row_means)
    mean, other_mean = float(row_means.mean()), float(other_row_means.mean())
    return inner - 2 * rows * float(row_means @ other_row_means) + rows**2 * mean * other_mean


def ratio(inner: float, square: float, other_square: float) -> float | None:
    """Divide an inner product by both norms, which are given squared; return None where one of them is zero."""
    if square <= 0 or other_square <= 0:
        return None
    return inner / (math.sqrt(square) * math.sqrt(other_square))


def _square(values: FloatArray) -> float:
    return float(np.vdot(values, values))


def align(matrix: Matrix, settings: AlignSettings | None = None, *, report: Report = ignore_report) -> AlignAnswer:
    """Measure how well a kernel is aligned with its labels, in one pass over the stored tiles.

    The alignment of K with the target kernel y yᵀ of the one-hot labels y is

        A = yᵀ K y / (‖K‖_F ‖y‖²).

    The centred alignment is that of H K H and H y yᵀ H with H = I − 1 1ᵀ / N. Adding a constant to all entries of the
    kernel does not change it. The whole kernel has one row per sample and output, and y has one entry per row. The
    alignment of output a is that of its own n × n kernel with column a of the one-hot labels.

    A trace kernel has one row per sample and is used for every output. Its alignment as a whole is the alignment with Y
    Yᵀ. The entries of Y Yᵀ are 1 for two samples of the same class and 0 otherwise. An alignment is None if a norm is
    zero.

    The computation costs 4 · rows² · m FLOPs and holds four tiles in memory.

    References:
        Cristianini, Shawe-Taylor, Elisseeff, Kandola (2001), On kernel-target alignment.
        Cortes, Mohri, Rostamizadeh (2012), arXiv:1203.0550, definition 4.

    Raises:
        InputError: If the store has no labels, or its labels do not fit the outputs.
        BudgetError: If the memory limit is too small for the tiles.
    """
    settings = settings or AlignSettings()
    readout = Readout.of(matrix.store, matrix.output)
    Y = readout.targets(matrix.labels)

    def compute() -> AlignAnswer:
        vectors = 6 * (matrix.num_outputs + Y.shape[1])
        require_memory("tiles and vectors", 8 * (4 * matrix.side**2 + vectors * matrix.num_rows), settings.memory_bytes)
        return _aligned(matrix, readout, Y, report)

    return recall_or_compute(matrix, AlignAnswer, {}, compute)


def _aligned(matrix: Matrix, readout: Readout, Y: FloatArray, report: Report) -> AlignAnswer:
    whole, outputs = _measured(matrix, Y, report)
    return AlignAnswer(
        alignment=whole.plain,
        centered_alignment=whole.centered,
        output_names=readout.names,
        output_alignment=[output.plain for output in outputs],
        output_centered_alignment=[output.centered for output in outputs],
        output=readout.name,
        samples=matrix.num_samples,
        passes=round(matrix.passes, 3),
    )


def _measured(matrix: Matrix, Y: FloatArray, report: Report) -> tuple[TargetProducts, list[TargetProducts]]:
    """Multiply the whole kernel, and the kernel of each output, with their targets in one pass."""
    m, (rows, columns) = matrix.num_outputs, Y.shape
    indicators = np.tile(np.eye(m), (matrix.num_samples, 1))  # (rows, m), 1 in the column of the row's output
    products, squares, square = _sweep(matrix, np.hstack([Y * indicators if m > 1 else Y, indicators]), report)
    KY, sums = products[:, :-m], products[:, -m:]
    if m == 1:
        outputs = [TargetProducts(Y[:, [a]], KY[:, [a]], sums[:, 0], square) for a in range(columns)]
        return TargetProducts(Y, KY, sums[:, 0], square), outputs
    outputs = [TargetProducts(Y[a::m], KY[a::m, [a]], sums[a::m, a], float(squares[a])) for a in range(m)]
    return TargetProducts(Y, KY.sum(1).reshape(rows, 1), sums.sum(1), square), outputs


def _sweep(
    matrix: Matrix,
    V: FloatArray,  # (rows, vectors)
    report: Report,
) -> tuple[FloatArray, FloatArray, float]:
    """Compute K V, the squared norm ‖Kᵃᵃ‖² of each output's own kernel, and ‖K‖², in one pass."""
    step = counter(report, "aligned", 0, matrix.num_tiles)
    products, squares = matrix.fold(_sweep_tiles, V, step=step)
    return products, squares[1:], float(squares[0])


def _sweep_tiles(matrix: Matrix, V: FloatArray, tiles: Sequence[Tile], step: Step) -> Arrays:
    """Compute what some tiles add to K V and to the squared norms, which are ‖K‖² followed by ‖Kᵃᵃ‖² of each output."""
    m, products = matrix.num_outputs, np.zeros_like(V)
    squares = np.zeros(1 + m)
    for rows, cols, tile in matrix.tiles(tiles, step=step):
        products[rows] += tile @ V[cols]
        if rows != cols:
            products[cols] += tile.T @ V[rows]
        parts = [tile, *(np.ascontiguousarray(tile[a::m, a::m]) for a in range(m))]
        squares += [(1 if rows == cols else 2) * _square(part) for part in parts]
    return products, squares
