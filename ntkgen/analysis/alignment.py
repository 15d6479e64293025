"""How well a kernel is aligned with its labels, in one pass over the stored tiles."""

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
    """How alignment is asked for: there is nothing to choose but the memory."""


@dataclass(frozen=True, kw_only=True)
class AlignAnswer(Answer):
    """How well a kernel is aligned with its labels, from −1 to 1; None where a norm is zero.

    Attributes:
        alignment: Of the whole kernel.
        centered_alignment: Of the whole kernel, centred over all rows.
        output_names: What each of the following is about.
        output_alignment: Of each output by itself.
        output_centered_alignment: Of each output, centred over its samples.
        output: The output map of the kernel.
        samples: Samples of the kernel.
        passes: Passes over the stored tiles.
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
class Seen:
    """A kernel K on the rows of one target Y, as far as alignment needs it."""

    Y: FloatArray  # (rows, columns)
    KY: FloatArray  # (rows, columns)
    row_sums: FloatArray  # (rows,), K 1
    square: float  # ‖K‖²

    @property
    def plain(self) -> float | None:
        """⟨K, Y Yᵀ⟩ / (‖K‖ ‖Y Yᵀ‖); None where one of them is zero."""
        return ratio(float(np.vdot(self.Y, self.KY)), self.square, _square(self.Y.T @ self.Y))

    @property
    def centered(self) -> float | None:
        """The same of H K H and H Y Yᵀ H with H = I − 1 1ᵀ / rows; None where one of them is rounding alone."""
        rows, means, row_means = len(self.Y), self.Y.mean(0), self.row_sums / len(self.Y)
        Y = self.Y - means
        square = centered_product(self.square, row_means, row_means)
        is_flat = square <= 4 * rows * EPSILON * self.square
        inner = float(np.vdot(Y, self.KY - np.outer(self.row_sums, means)))
        return ratio(inner, 0.0 if is_flat else square, _square(Y.T @ Y))


def centered_product(inner: float, row_means: FloatArray, other_row_means: FloatArray) -> float:
    """Turn ⟨K, L⟩ into ⟨H K H, H L H⟩ = ⟨K, L⟩ − 2 N r·s + N² r̄ s̄ for symmetric K, L with the row means r, s.

    H = I − 1 1ᵀ / N takes a common shift from the N features. What is lost where K is nearly constant: the digits by
    which ‖K‖² exceeds ‖H K H‖².
    """
    rows = len(row_means)
    mean, other_mean = float(row_means.mean()), float(other_row_means.mean())
    return inner - 2 * rows * float(row_means @ other_row_means) + rows**2 * mean * other_mean


def ratio(inner: float, square: float, other_square: float) -> float | None:
    """Divide an inner product by both norms; None where one is zero."""
    if square <= 0 or other_square <= 0:
        return None
    return inner / (math.sqrt(square) * math.sqrt(other_square))


def _square(values: FloatArray) -> float:
    return float(np.vdot(values, values))


def align(matrix: Matrix, settings: AlignSettings | None = None, *, report: Report = ignore_report) -> AlignAnswer:
    """Measure how well a kernel is aligned with its labels, in one pass over the stored tiles.

    The alignment of K with the target kernel y yᵀ of the one-hot labels y is

        A = yᵀ K y / (‖K‖_F ‖y‖²),

    the centered one that of H K H and H y yᵀ H with H = I − 1 1ᵀ / N, which a constant added to the kernel does not
    change. The whole kernel has one row per sample and output, and y as many entries; output a by itself is the n × n
    kernel of this output with its column of the one-hot labels. A trace kernel stands for each output; as a whole it is
    compared with Y Yᵀ, which is 1 for two samples of one class. None where a norm is zero.

    Costs 4 · rows² · m FLOPs, and holds four tiles.

    References:
        Cristianini, Shawe-Taylor, Elisseeff, Kandola (2001), On kernel-target alignment.
        Cortes, Mohri, Rostamizadeh (2012), arXiv:1203.0550, definition 4.

    Raises:
        InputError: If there are no labels, or they do not fit the outputs.
        BudgetError: If the memory is too small for the tiles.
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
    whole, each = _looked_at(matrix, Y, report)
    return AlignAnswer(
        alignment=whole.plain,
        centered_alignment=whole.centered,
        output_names=readout.names,
        output_alignment=[seen.plain for seen in each],
        output_centered_alignment=[seen.centered for seen in each],
        output=readout.name,
        samples=matrix.num_samples,
        passes=round(matrix.passes, 3),
    )


def _looked_at(matrix: Matrix, Y: FloatArray, report: Report) -> tuple[Seen, list[Seen]]:
    """See the whole kernel on its targets, and each output by itself, in one pass."""
    m, (rows, columns) = matrix.num_outputs, Y.shape
    indicators = np.tile(np.eye(m), (matrix.num_samples, 1))  # (rows, m): of the output of each row
    products, squares, square = _sweep(matrix, np.hstack([Y * indicators if m > 1 else Y, indicators]), report)
    KY, sums = products[:, :-m], products[:, -m:]
    if m == 1:
        each = [Seen(Y[:, [a]], KY[:, [a]], sums[:, 0], square) for a in range(columns)]
        return Seen(Y, KY, sums[:, 0], square), each
    each = [Seen(Y[a::m], KY[a::m, [a]], sums[a::m, a], float(squares[a])) for a in range(m)]
    return Seen(Y, KY.sum(1).reshape(rows, 1), sums.sum(1), square), each


def _sweep(
    matrix: Matrix,
    V: FloatArray,  # (rows, vectors)
    report: Report,
) -> tuple[FloatArray, FloatArray, float]:
    """Find K V, ‖Kᵃᵃ‖² of each output a with itself, and ‖K‖², in one pass."""
    step = counter(report, "aligned", 0, matrix.num_tiles)
    products, squares = matrix.fold(_swept, V, step=step)
    return products, squares[1:], float(squares[0])


def _swept(matrix: Matrix, V: FloatArray, tiles: Sequence[Tile], step: Step) -> Arrays:
    """Do so for some tiles: the product, and the squares, of the whole first."""
    m, products = matrix.num_outputs, np.zeros_like(V)
    squares = np.zeros(1 + m)
    for rows, cols, tile in matrix.tiles(tiles, step=step):
        products[rows] += tile @ V[cols]
        if rows != cols:
            products[cols] += tile.T @ V[rows]
        parts = [tile, *(np.ascontiguousarray(tile[a::m, a::m]) for a in range(m))]
        squares += [(1 if rows == cols else 2) * _square(part) for part in parts]
    return products, squares
