"""What the rows of a kernel are to be: targets from the labels, and test samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.linalg import helmert

from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.analysis.passes import Arrays, fold
from ntkgen.engine.cluster import shared
from ntkgen.errors import FingerprintError, InputError, StoreError
from ntkgen.progress import Report, Step, counter, ignore_step
from ntkgen.store.opening import open_store
from ntkgen.store.store import KernelStore
from ntkgen.store.view import Place, SymmetricArray

if TYPE_CHECKING:
    from distributed import Client

IntArray = npt.NDArray[np.int64]

OFFSETS = ("zero", "logits")
# Logits of one network on one sample differ by rounding, of two by much more; relative, in the norm of all.
SAME_LOGITS = 1e-2


def contrasts(num_logits: int) -> FloatArray:  # (num_logits - 1, num_logits)
    """Build the orthonormal contrasts of Helmert, as `ntkgen.jacobian.outputs` does with torch.

    >>> contrasts(2).round(4)
    array([[ 0.7071, -0.7071]])
    """
    rows: FloatArray = helmert(num_logits)
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
