"""What is to be learned of the rows of a kernel, and how well the kernel is aligned with that, in one pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.matrix import FloatArray, Matrix, require_memory
from ntkgen.analysis.passes import Arrays, fold
from ntkgen.analysis.results import remembered
from ntkgen.engine.cluster import shared
from ntkgen.errors import FingerprintError, InputError, StoreError
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, Step, counter, ignore_report, ignore_step
from ntkgen.store.opening import open_store
from ntkgen.store.store import KernelStore
from ntkgen.store.view import Place, SymmetricArray

if TYPE_CHECKING:
    from distributed import Client

IntArray = npt.NDArray[np.int64]

EPSILON = float(np.finfo(np.float64).eps)
OFFSETS = ("zero", "logits")
# Logits of one network on one sample differ by rounding, of two by much more; relative, in the norm of all.
SAME_LOGITS = 1e-2


def contrasts(num_logits: int) -> FloatArray:  # (num_logits - 1, num_logits)
    """Build the orthonormal contrasts of Helmert, as `ntkgen.jacobian.outputs` does with torch.

    >>> contrasts(2).round(4)
    array([[ 0.7071, -0.7071]])
    """
    rows = np.zeros((num_logits - 1, num_logits))
    for row in range(1, num_logits):
        rows[row - 1, :row] = 1 / math.sqrt(row * (row + 1))
        rows[row - 1, row] = -row / math.sqrt(row * (row + 1))
    return rows


# what the rows are to be ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readout:
    """How scores, one per class, and the rows of a kernel belong together: the output map A, and what follows from it.

    A row of the output map `full`, `centered` or `index:K` is one output of one sample, and what belongs to the rows is
    one column. A row of `trace`, and of a matrix of `diagonal`, is a sample: the kernel of the trace, divided by the
    number m of outputs, stands for each output by itself, so that what belongs to its rows has m columns.
    """

    name: str  # of the output map
    num_logits: int  # classes, m
    plane: int | None  # which matrix of `diagonal`
    place: str  # of the store, as errors name it

    @classmethod
    def of(cls, store: KernelStore, plane: int | None = None) -> "Readout":
        """Find out what the rows of a kernel are.

        Raises:
            InputError: If they are sums over outputs, which no label says anything of.
        """
        name = store.manifest.identity.get("output", "full")
        if name == "sum":
            raise InputError(
                f"The kernel at {store.name} is of Σ f, the sum of all outputs: expected rows for which a label says "
                "what they are to be, found the one-hot targets' sum, which is 1 whatever the label. Was the trace "
                "meant, which is as small? Compute it with --output trace."
            )
        return cls(name, store.num_logits or store.grid.num_outputs, plane, store.name)

    @property
    def scale(self) -> float:
        """What the stored kernel is multiplied with: 1 / m for the trace."""
        return 1 / self.num_logits if self.name == "trace" else 1.0

    @property
    def one_class(self) -> int | None:
        """Which class alone the rows tell from the rest."""
        return int(self.name.removeprefix("index:")) if self.name.startswith("index:") else self.plane

    @property
    def names(self) -> list[str]:
        """Name what the rows of a sample are, or the columns of what belongs to them."""
        if self.one_class is not None:
            return [f"output {self.one_class}"]
        if self.name == "centered":
            return [f"contrast {row}" for row in range(self.num_logits - 1)]
        return [f"output {output}" for output in range(self.num_logits)]

    @property
    def columns(self) -> int:
        """Columns of what belongs to the rows."""
        return self.num_logits if self.name == "trace" else 1

    def mapped(
        self,
        scores: FloatArray,  # (samples, classes)
    ) -> FloatArray:  # (rows, columns)
        """See scores through the output map, A s, sample-major."""
        if self.name == "trace":
            return scores
        if self.name == "centered":
            scores = scores @ contrasts(self.num_logits).T
        elif self.one_class is not None:
            scores = scores[:, [self.one_class]]
        return scores.reshape(-1, 1)

    def scores(
        self,
        rows: FloatArray,  # (rows, columns)
    ) -> FloatArray:  # (samples, classes); of one class (samples, 1)
        """Turn what belongs to the rows into scores, Aᵀ A s: those of `centered` without their mean."""
        if self.name == "trace":
            return rows
        if self.name == "centered":
            scores: FloatArray = rows.reshape(-1, self.num_logits - 1) @ contrasts(self.num_logits)
            return scores
        return rows.reshape(-1, 1 if self.one_class is not None else self.num_logits)

    def accuracy(self, rows: FloatArray, labels: IntArray) -> float:
        """Say how often the largest score is that of the label; of one class alone, how often ½ is the right limit."""
        scores = self.scores(rows)
        if self.one_class is not None:
            return float(np.mean((scores[:, 0] > 0.5) == (labels == self.one_class)))
        return float(np.mean(scores.argmax(1) == labels))

    def targets(self, labels: IntArray) -> FloatArray:  # (rows, columns)
        """Make one-hot rows of labels, seen through the output map.

        Raises:
            InputError: If a label is no class.
        """
        if (labels >= self.num_logits).any():
            raise InputError(
                f"The labels of {self.place} do not fit its outputs: expected 0 to {self.num_logits - 1}, one per "
                f"output, found {int(labels.max())}. Is the network a regression, or of fewer classes than the data "
                "set? Only kernels with an output per class have targets."
            )
        return self.mapped(np.eye(self.num_logits)[labels])


# what is learned ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What is fitted: y on the rows of the kernel K, from f₀ on; K is divided by m where it is of the trace."""

    matrix: Matrix
    readout: Readout
    targets: FloatArray  # (rows, columns), y
    offset: FloatArray  # (rows, columns), f₀

    @classmethod
    def of(cls, matrix: Matrix, offset: str) -> "Problem":
        """Take targets from the labels, and f₀ from the logits, or zero.

        Raises:
            InputError: If there are none.
        """
        readout = Readout.of(matrix.store, matrix.output)
        targets = readout.targets(matrix.labels)
        return cls(matrix, readout, targets, offset_of(readout, matrix.store, offset, "logits")[: len(targets)])

    @property
    def residual(self) -> FloatArray:  # (rows, columns)
        """What is to be learned, y − f₀."""
        return self.targets - self.offset

    def dense(self, report: Report) -> FloatArray:  # (rows, rows), in Fortran's order
        """Read the whole kernel."""
        values = self.matrix.dense(step=counter(report, "matrix", 0, self.matrix.num_tiles))
        values *= self.readout.scale
        return values


def offset_of(readout: Readout, store: KernelStore, offset: str, array: str) -> FloatArray:  # (rows, columns)
    """Say where the fit starts, f₀: at the network's logits, or at zero.

    Raises:
        InputError: If there are no logits.
    """
    if offset == "zero":
        samples = store.grid.num_samples if array == "logits" else store.grid.num_cols // store.grid.num_outputs
        return readout.mapped(np.zeros((samples, readout.num_logits)))
    if not store.num_logits:
        raise InputError(
            f"The store at {store.name} has no logits: expected those of its samples, to begin from, found none. Was "
            "it imported? Use --offset zero."
        )
    return readout.mapped(store.read(array))


@dataclass(frozen=True)
class TestSamples:
    """Samples that nothing was fitted to: the columns of a rectangular kernel, whose rows are the training samples."""

    __test__ = False  # pytest would take it for a test

    name: str  # where the store lies
    view: SymmetricArray  # (rows, columns of the store)
    readout: Readout
    labels: IntArray
    offset: FloatArray  # (test rows, columns), f₀
    client: "Client | None" = None  # of a cluster, whose workers share the pass over the tiles

    @classmethod
    def of(cls, store: KernelStore, problem: Problem, offset: str) -> "TestSamples":
        """Open the kernel of training samples with test samples.

        Raises:
            InputError: If it is none, or has no labels.
            StoreError: If tiles are missing.
            FingerprintError: If its rows are not those of the problem.
        """
        _require_rectangle(store)
        _require_same_rows(store, problem)
        labels: IntArray = store.read("col_label")[:: store.grid.num_outputs]
        if (labels < 0).any():
            raise InputError(
                f"The store at {store.name} has no labels of its columns: expected one for each test sample, found "
                "none. Was it made in Python? `ntkgen compute --against test` stores them."
            )
        readout, client = Readout.of(store, problem.matrix.output), problem.matrix.client
        seen = store if client is None else open_store(shared(store.folder))
        view = seen.kernel(output=problem.matrix.output)
        return cls(store.name, view, readout, labels, offset_of(readout, store, offset, "col_logits"), client)

    def predict(self, alphas: Sequence[FloatArray], report: Report) -> list[FloatArray]:  # of (test rows, columns)
        """Find f₀ + Kₓᵀ α for several α, in one pass."""
        stacked = np.zeros((self.view.shape[0], sum(alpha.shape[1] for alpha in alphas)))
        stacked[: len(alphas[0])] = np.hstack(alphas)  # of a part of the training samples: zero for the others
        places = self.view.places()
        step = counter(report, "predicted", 0, len(places))
        if self.client is None:
            (product,) = _predicted(places, self.view, stacked, step)
        else:
            (product,) = fold(self.client, _predicted, places, (self.view, stacked), step)
        product *= self.readout.scale
        return [self.offset + part for part in np.split(product, len(alphas), axis=1)]

    def measure(self, values: FloatArray) -> tuple[float, float]:
        """Say how often the right class is predicted, and the mean squared distance from the targets."""
        error = float(np.mean((self.readout.targets(self.labels) - values) ** 2))
        return self.readout.accuracy(values, self.labels), error


def _predicted(places: Sequence[Place], view: SymmetricArray, V: FloatArray, step: Step = ignore_step) -> Arrays:
    """Multiply the transpose of some tiles with vectors."""
    return (view.matmat(V, transposed=True, places=places, step=step),)


def _require_rectangle(store: KernelStore) -> None:
    if store.grid.is_symmetric:
        raise InputError(
            f"The kernel at {store.name} is of samples with themselves: expected one of training samples with test "
            "samples for --test. Was it made without --against test?"
        )
    if missing := store.missing_tiles():
        raise StoreError(
            f"The kernel at {store.name} is not complete: expected {store.grid.num_tiles:,} tiles, {len(missing):,} "
            f"are missing. Is it still being computed? Run the same `{store.command}` again to finish it."
        )


def _require_same_rows(store: KernelStore, problem: Problem) -> None:
    """Refuse test kernels whose rows are not those of the training kernel.

    Raises:
        FingerprintError: If they are not.
    """
    train = problem.matrix.store
    if differing := _differing_rows(train, store):
        raise FingerprintError(
            f"The rows of {store.name} are not those of {train.name}: expected the same {differing[0]}, found others. "
            "Were they computed of two networks, subsamples or orders? Compute both with the same options but for "
            "--against test."
        )


def _differing_rows(train: KernelStore, other: KernelStore) -> list[str]:
    """Name what the rows of two stores do not share; logits may differ by rounding."""
    identities = train.manifest.identity, other.manifest.identity
    differing = [name for name in ("parameters", "output") if identities[0].get(name) != identities[1].get(name)]
    names = ("sample_index", "row_label", "row_output")
    differing += [name for name in names if not np.array_equal(train.read(name), other.read(name))]
    if train.num_logits and other.num_logits and not differing:
        logits = train.read("logits")
        if np.linalg.norm(logits - other.read("logits")) > SAME_LOGITS * np.linalg.norm(logits):
            differing.append("logits")
    return differing


# alignment ------------------------------------------------------------------------------------------------------------


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


def align(matrix: Matrix, memory_bytes: int | None = None, report: Report = ignore_report) -> dict[str, Any]:
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
    readout = Readout.of(matrix.store, matrix.output)
    Y = readout.targets(matrix.labels)

    def compute() -> dict[str, Any]:
        vectors = 6 * (matrix.num_outputs + Y.shape[1])
        require_memory("tiles and vectors", 8 * (4 * matrix.side**2 + vectors * matrix.num_rows), memory_bytes)
        return _aligned(matrix, readout, Y, report)

    return remembered(matrix, "align", {}, compute)


def _aligned(matrix: Matrix, readout: Readout, Y: FloatArray, report: Report) -> dict[str, Any]:
    whole, each = _looked_at(matrix, Y, report)
    return {
        "alignment": whole.plain,
        "centered_alignment": whole.centered,
        "output_names": readout.names,
        "output_alignment": [seen.plain for seen in each],
        "output_centered_alignment": [seen.centered for seen in each],
        "output": readout.name,
        "samples": matrix.num_samples,
        "passes": round(matrix.passes, 3),
    }


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
