"""Targets of regression and gradient flow: the labels on the rows of a kernel, and test samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.linalg import helmert

from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.analysis.passes import Arrays, fold
from ntkgen.engine.cluster import shared
from ntkgen.errors import FingerprintError, InputError, StoreError, UnknownNameError
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, Step, counter, ignore_step
from ntkgen.store.opening import open_store
from ntkgen.store.remedy import Remedy
from ntkgen.store.store import KernelStore
from ntkgen.store.view import SymmetricArray

if TYPE_CHECKING:
    from distributed import Client

IntArray = npt.NDArray[np.int64]

OFFSETS = ("zero", "logits")
# Maximum relative difference of the logits of two stores that are taken to be of one network. Rounding is far below.
SAME_LOGITS = 1e-2


def contrasts(num_logits: int) -> FloatArray:  # (num_logits - 1, num_logits)
    """Build Helmert's orthonormal contrasts, which are those of `ntkgen.jacobian.outputs`.

    >>> contrasts(2).round(4)
    array([[ 0.7071, -0.7071]])
    """
    rows: FloatArray = helmert(num_logits)
    return rows


# targets of the rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readout:
    """The output map A of a kernel, which maps scores (one per class) to the values on the kernel's rows.

    With the output maps ``full``, ``centered`` and ``index:K`` each row is one output of one sample, and the values are
    one column. With ``trace`` each row is one sample. A trace kernel, divided by the number m of outputs, serves for
    each output separately, so that its values have m columns. With ``diagonal`` each row of each matrix is one sample,
    and the values are one column.
    """

    name: str  # name of the output map
    num_logits: int  # number of classes, m
    plane: int | None  # index of the matrix of ``diagonal``
    place: str  # path of the store in error messages

    @classmethod
    def of(cls, store: KernelStore, plane: int | None = None) -> "Readout":
        """Read the output map of a store.

        Raises:
            InputError: If the rows are sums over the outputs, for which labels give no targets.
        """
        name = store.manifest.output
        if name == "sum":
            raise InputError(
                f"The kernel at {store.name} is of Σ f, the sum of all outputs: expected rows for which a label says "
                "what they are to be, found the one-hot targets' sum, which is 1 whatever the label. Was the trace "
                "meant, which is as small? Compute it with `ntkgen compute --output trace`."
            )
        return cls(name, store.num_logits or store.grid.num_outputs, plane, store.name)

    @property
    def scale(self) -> float:
        """Factor by which the stored kernel is multiplied: 1 / m for the trace."""
        return 1 / self.num_logits if self.name == "trace" else 1.0

    @property
    def one_class(self) -> int | None:
        """The only class whose score the rows contain; None if they contain all classes."""
        return int(self.name.removeprefix("index:")) if self.name.startswith("index:") else self.plane

    @property
    def names(self) -> list[str]:
        """Names of the rows of a sample, or of the columns of the values of a trace kernel."""
        if self.one_class is not None:
            return [f"output {self.one_class}"]
        if self.name == "centered":
            return [f"contrast {row}" for row in range(self.num_logits - 1)]
        return [f"output {output}" for output in range(self.num_logits)]

    @property
    def columns(self) -> int:
        """Number of columns of the values on the rows."""
        return self.num_logits if self.name == "trace" else 1

    def mapped(
        self,
        scores: FloatArray,  # (samples, classes)
    ) -> FloatArray:  # (rows, columns)
        """Apply the output map to scores, A s, in sample-major order."""
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
        """Turn values on the rows into scores, Aᵀ A s; with ``centered`` the scores lack their mean."""
        if self.name == "trace":
            return rows
        if self.name == "centered":
            scores: FloatArray = rows.reshape(-1, self.num_logits - 1) @ contrasts(self.num_logits)
            return scores
        return rows.reshape(-1, 1 if self.one_class is not None else self.num_logits)

    def accuracy(self, rows: FloatArray, labels: IntArray) -> float:
        """Return the fraction of the samples whose largest score is that of their label.

        If the rows contain one class only, a sample is assigned to it when its score exceeds ½.
        """
        scores = self.scores(rows)
        if self.one_class is not None:
            return float(np.mean((scores[:, 0] > 0.5) == (labels == self.one_class)))
        return float(np.mean(scores.argmax(1) == labels))

    def targets(self, labels: IntArray) -> FloatArray:  # (rows, columns)
        """Apply the output map to one-hot labels.

        Raises:
            InputError: If a label is not the index of an output.
        """
        if (labels >= self.num_logits).any():
            raise InputError(
                f"The labels of {self.place} do not fit its outputs: expected 0 to {self.num_logits - 1}, one per "
                f"output, found {int(labels.max())}. Is it a regression network, or a network with fewer outputs than "
                "the data set has classes? Use a kernel with one output per class."
            )
        return self.mapped(np.eye(self.num_logits)[labels])


# problem --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The targets y on the rows of the kernel K, and the outputs f₀ at the start; a trace kernel is divided by m."""

    matrix: Matrix
    readout: Readout
    targets: FloatArray  # (rows, columns), y
    offset: FloatArray  # (rows, columns), f₀

    @classmethod
    def of(cls, matrix: Matrix, offset: str) -> "Problem":
        """Take the targets from the labels of a store, and f₀ from its logits or as zero.

        Raises:
            InputError: If the store lacks the labels or the logits.
        """
        readout = Readout.of(matrix.store, matrix.output)
        targets = readout.targets(matrix.labels)
        return cls(matrix, readout, targets, offset_of(readout, matrix.store, offset, "logits")[: len(targets)])

    @property
    def residual(self) -> FloatArray:  # (rows, columns)
        """The residual at the start, y − f₀."""
        return self.targets - self.offset

    def dense(self, report: Report) -> FloatArray:  # (rows, rows), in Fortran order
        """Read the whole kernel, scaled by the factor of the output map."""
        values = self.matrix.dense(step=counter(report, "matrix", 0, self.matrix.num_tiles))
        values *= self.readout.scale
        return values


def offset_of(readout: Readout, store: KernelStore, offset: str, array: str) -> FloatArray:  # (rows, columns)
    """Return the outputs f₀ at the start: the logits of the network, or zero.

    Raises:
        InputError: If the store has no logits.
        UnknownNameError: If the name of the offset is unknown.
    """
    if offset not in OFFSETS:
        raise UnknownNameError("offset", offset, OFFSETS)
    if offset == "zero":
        samples = store.grid.num_samples if array == "logits" else store.grid.num_cols // store.grid.num_outputs
        return readout.mapped(np.zeros((samples, readout.num_logits)))
    if not store.num_logits:
        raise InputError(
            f"The store at {store.name} has no logits: expected those of its samples, to begin from, found none. Was "
            "it imported? Use `offset` zero."
        )
    return readout.mapped(store.read(array))


@dataclass(frozen=True)
class TestSamples:
    """Test samples: the columns of a rectangular kernel, whose rows are the training samples."""

    __test__ = False  # otherwise pytest collects the class as a test

    name: str  # path of the store
    view: SymmetricArray  # (rows, columns of the store)
    readout: Readout
    labels: IntArray
    offset: FloatArray  # (test rows, columns), f₀
    client: "Client | None" = None  # client of a cluster, whose workers share the pass over the tiles

    @classmethod
    def of(cls, store: KernelStore, problem: Problem, offset: str) -> "TestSamples":
        """Open the kernel of training samples with test samples.

        Raises:
            InputError: If the kernel is symmetric, or its columns have no labels.
            StoreError: If tiles are missing.
            FingerprintError: If the rows of the kernel are not those of the problem.
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
        """Compute f₀ + Kₓᵀ α for several α in one pass; Kₓ is the kernel of training samples with test samples."""
        stacked = np.zeros((self.view.shape[0], sum(alpha.shape[1] for alpha in alphas)))
        stacked[: len(alphas[0])] = np.hstack(alphas)  # samples outside a partial training kernel have α = 0
        tiles = self.view.tiles()
        step = counter(report, "predicted", 0, len(tiles))
        if self.client is None:
            (product,) = _predicted(tiles, self.view, stacked, step)
        else:
            (product,) = fold(self.client, _predicted, tiles, (self.view, stacked), step)
        product *= self.readout.scale
        return [self.offset + part for part in np.split(product, len(alphas), axis=1)]

    def measure(self, values: FloatArray) -> tuple[float, float]:
        """Return the accuracy on the test samples and the mean squared error."""
        error = float(np.mean((self.readout.targets(self.labels) - values) ** 2))
        return self.readout.accuracy(values, self.labels), error


def _predicted(tiles: Sequence[Tile], view: SymmetricArray, V: FloatArray, step: Step = ignore_step) -> Arrays:
    """Multiply the transposes of some tiles with vectors."""
    return (view.matmat(V, transposed=True, tiles=tiles, step=step),)


def _require_rectangle(store: KernelStore) -> None:
    if store.grid.is_symmetric:
        raise InputError(
            f"The kernel at {store.name} is of samples with themselves: expected one of training samples with test "
            "samples as `test`. Was it made without columns of other samples? `ntkgen compute --against test` makes "
            "them."
        )
    if missing := store.missing_tiles():
        command = Remedy.of(store.name, store.manifest).command
        raise StoreError(
            f"The kernel at {store.name} is not complete: expected {store.grid.num_tiles:,} tiles, {len(missing):,} "
            f"are missing. Is it still being computed? Run the same `{command}` again to finish it."
        )


def _require_same_rows(store: KernelStore, problem: Problem) -> None:
    """Refuse a test kernel whose rows are not those of the training kernel.

    Raises:
        FingerprintError: If the rows differ.
    """
    train = problem.matrix.store
    if differing := _differing_rows(train, store):
        raise FingerprintError(
            f"The rows of {store.name} are not those of {train.name}: expected the same {differing[0]}, found others. "
            "Were they computed of two networks, subsamples or orders? Compute both with the same settings, one of "
            "them with columns of test samples."
        )


def _differing_rows(train: KernelStore, other: KernelStore) -> list[str]:
    """List the properties in which the rows of two stores differ; logits may differ by rounding."""
    identities = train.manifest.identity, other.manifest.identity
    differing = [name for name in ("parameters", "output") if identities[0].get(name) != identities[1].get(name)]
    names = ("sample_index", "row_label", "row_output")
    differing += [name for name in names if not np.array_equal(train.read(name), other.read(name))]
    if train.num_logits and other.num_logits and not differing:
        logits = train.read("logits")
        if np.linalg.norm(logits - other.read("logits")) > SAME_LOGITS * np.linalg.norm(logits):
            differing.append("logits")
    return differing
