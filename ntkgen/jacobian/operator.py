"""`NTKOperator`: products with the kernel, K V = J₁ (J₂ᵀ V), without forming the kernel."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ntkgen.errors import InputError, ShapeError, UnknownNameError
from ntkgen.jacobian.adapter import Function, Given, Target
from ntkgen.jacobian.batches import checked_vectors
from ntkgen.jacobian.evaluation import as_input, require_plain_module, without_kept_graphs
from ntkgen.jacobian.independence import has_own_gradients
from ntkgen.jacobian.modes import (
    PUSHES,
    Directions,
    add_pullback,
    choose_push,
    embedding_tables,
    is_symmetric,
    trainable_parameters,
)
from ntkgen.jacobian.network import Network, prepare
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.jacobian.probe import in_turns
from ntkgen.jacobian.samples import Batch
from ntkgen.jacobian.selection import Select
from ntkgen.progress import Report, Step, counter, ignore_report

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

BATCH_SIZE = 32
PRECISIONS = ("float32", "float64")
# Maximum bytes of Jᵀ V in memory. A column of it has one number per parameter of the network.
DIRECTION_BYTES = 1 << 30


class NTKOperator:
    """The empirical neural tangent kernel of two batches, K = J₁ J₂ᵀ, as a linear operator of shape (n₁ m, n₂ m).

    ``K V = J₁ (J₂ᵀ V)``: reverse mode computes J₂ᵀ V, summed over the batches, and forward mode multiplies it by J₁.
    For c columns and n = n₁ + n₂ samples this costs about c · n forward passes and c · n backward passes. It needs
    memory for c numbers per parameter. Columns are processed in groups of at most `DIRECTION_BYTES`, and neither J nor
    K is formed. The first product also checks every batch, which costs about three more forward and backward passes.
    Rows and columns are sample-major, ``row = sample · m + output``. The module is copied and never changed. The copy
    is in evaluation mode.

    Attributes:
        shape: Rows and columns, n₁ m and n₂ m.
        dtype: The dtype of network, vectors and products.
        device: The device of the products: the module's device, or the CPU if that device has no float64.
        push: The way in which J₁ U is computed for U = J₂ᵀ V. ``forward`` mode is used if all operations support it.
            Otherwise ``double-backward`` is used if it is possible. If not, ``rows`` is used, which takes one backward
            pass per row of J.

    References:
        Jacot, Gabriel, Hongler (2018), arXiv:1806.07572, §4; Novak, Sohl-Dickstein, Schoenholz (2022),
        arXiv:2206.08720, §3.3, for products of the kernel with vectors.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> NTKOperator(torch.nn.Linear(2, 1), x) @ torch.tensor([1.0, 0.0])  # J = [x, 1]
    tensor([6., 7.], dtype=torch.float64)
    """

    def __init__(  # noqa: PLR0913 - the keywords of `ntkgen.ntk`
        self,
        model: nn.Module,
        x1: Batch,  # (n₁, …)
        x2: Batch | None = None,  # (n₂, …)
        *,
        function: Function | Sequence[Function] | None = None,
        select: Select | None = None,
        params: str | Sequence[str] | None = None,
        columns_function: Function | Sequence[Function] | None = None,
        precision: str = "float64",
        batch_size: int = BATCH_SIZE,
        transform: Tensor | npt.NDArray[Any] | None = None,  # (outputs, logits)
    ) -> None:
        """Prepare a network. No entry of its kernel is computed.

        Args:
            model: Any module that treats samples one by one.
            x1: The samples of the rows, as for `ntkgen.ntk`. They are copied.
            x2: The samples of the columns. By default these are the samples of the rows.
            function: A function of the module and a batch, or several, as for `ntkgen.ntk`.
            select: The outputs, as for `ntkgen.ntk`.
            params: Patterns of names of parameters, as for `ntkgen.ntk`.
            columns_function: The function of the columns, as for `ntkgen.ntk`.
            precision: The dtype of network and products, ``float32`` or ``float64``.
            batch_size: Samples in one pass.
            transform: A matrix A. The kernel is then that of A f(x), with one output per row of A.

        Raises:
            InputError: If a batch is empty or not real numbers, or the batch size is not positive.
            ShapeError: If the batches hold samples of different shapes, or the transform does not fit the network.
            ModelError: If the kernel of this network is not defined.
            UnknownNameError: If the precision has an unknown name.
        """
        given = Given.kept(model, x1, x2, Target.of(function, select, params, columns_function))
        require_plain_module(model)
        if precision not in PRECISIONS:
            raise UnknownNameError("precision of an operator", precision, PRECISIONS)
        if batch_size < 1:
            raise InputError(f"The batch size must be at least 1, and is {batch_size}. Pass a positive number.")
        network, given = given.attempt(lambda given: (_prepared(given, precision), given))
        rows, columns = given.rows, given.columns
        self.dtype, self.device = network.precision.compute_dtype, network.device
        self._module, self._num_params = network.module, network.profile.num_params
        self._transform = None if transform is None else self._floats(transform)
        require_fitting(self._transform, network.profile.num_outputs)
        self.num_outputs = network.profile.num_outputs if self._transform is None else len(self._transform)
        # gradients that are scaled by the frequency of a token are correct only for batches of one sample
        is_alone = any(table.scale_grad_by_freq for table in embedding_tables(self._module))
        self._rows, self._columns = rows, rows if columns is None else columns
        self._batch_size = 1 if is_alone else batch_size
        self._checked: set[tuple[int, int]] = set()  # samples, by id, and their batch size
        with exact_arithmetic(self.device), without_kept_graphs():
            self.push = choose_push(self._module, as_input(rows[:1], self.dtype, self.device))

    def __repr__(self) -> str:
        """Show shape, dtype and the way in which J U is computed."""
        return f"<NTKOperator {self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.push}>"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the kernel."""
        return len(self._rows) * self.num_outputs, len(self._columns) * self.num_outputs

    @property
    def T(self) -> "NTKOperator":  # noqa: N802
        """The transpose, J₂ J₁ᵀ. It shares the network with this operator."""
        other = copy.copy(self)
        other._rows, other._columns = self._columns, self._rows
        return other

    def matvec(
        self,
        v: Tensor | npt.NDArray[Any],  # (n₂ m,)
    ) -> Tensor:  # (n₁ m,)
        """Multiply the kernel with a vector, which is a tensor or a NumPy array. The product is a tensor.

        Raises:
            InputError: If the vector is complex, or neither a tensor nor a NumPy array.
            ShapeError: If the vector does not have as many entries as the kernel has columns.
            ModelError: If samples of a batch depend on each other, or a backward pass is not linear.
        """
        vector = checked_vectors(v)
        if vector.shape != self.shape[1:]:
            raise self._shape_error(vector)
        return self.matmat(vector[:, None])[:, 0]

    def matmat(
        self,
        V: Tensor | npt.NDArray[Any],  # (n₂ m, columns)
        report: Report = ignore_report,
    ) -> Tensor:  # (n₁ m, columns)
        """Multiply the kernel with several vectors.

        The vectors share forward passes. This is faster than one product per vector.

        Args:
            V: The vectors, one per column.
            report: Called after each batch, with the stage ``exact product``.

        Raises:
            InputError: If the vectors are complex, or neither a tensor nor a NumPy array.
            ShapeError: If the vectors do not have as many entries as the kernel has columns.
            ModelError: If samples of a batch depend on each other, or a backward pass is not linear.
        """
        vectors = self._floats(V)
        if vectors.ndim != 2 or len(vectors) != self.shape[1]:
            raise self._shape_error(vectors)
        groups = vectors.split(self._columns_at_once, dim=1)
        if not vectors.shape[1]:
            return torch.zeros(self.shape[0], 0, dtype=self.dtype, device=self.device)
        num_batches = self._num_batches(self._rows) + self._num_batches(self._columns)
        step = counter(report, "exact product", 0, len(groups) * num_batches)
        with exact_arithmetic(self.device), without_kept_graphs():
            self._check_batches()
            return torch.cat([self._multiply(group, step) for group in groups], dim=1)

    def __matmul__(self, other: Tensor | npt.NDArray[Any]) -> Tensor:
        """Multiply with a vector or with the columns of a matrix."""
        return self.matvec(other) if np.ndim(other) == 1 else self.matmat(other)

    def to_scipy(self) -> "LinearOperator":
        """Return a `scipy.sparse.linalg.LinearOperator`, for example for `eigsh`, `svds` or `cg`."""
        from scipy.sparse.linalg import LinearOperator

        transpose = self.T
        dtype = np.dtype(str(self.dtype).removeprefix("torch."))
        return LinearOperator(
            shape=self.shape,
            dtype=dtype,
            matvec=lambda v: _in_numpy(self.matvec, v.ravel()),
            matmat=lambda V: _in_numpy(self.matmat, V),
            rmatvec=lambda v: _in_numpy(transpose.matvec, v.ravel()),
            rmatmat=lambda V: _in_numpy(transpose.matmat, V),
        )

    def _check_batches(self) -> None:
        """Check every batch once. If gradients depend on the other samples of a batch, use batches of one sample."""
        for samples in (self._columns, self._rows):
            while (id(samples), self._batch_size) not in self._checked:
                batches = (as_input(batch, self.dtype, self.device) for batch in samples.split(self._batch_size))
                if all(has_own_gradients(self._module, batch) for batch in batches) or self._batch_size == 1:
                    self._checked.add((id(samples), self._batch_size))
                else:
                    self._batch_size = 1

    @property
    def _columns_at_once(self) -> int:
        return max(1, DIRECTION_BYTES // (self._num_params * self.dtype.itemsize))

    def _num_batches(self, x: Tensor) -> int:
        return math.ceil(len(x) / self._batch_size)

    def _multiply(
        self,
        V: Tensor,  # (n₂ m, columns)
        step: Step,
    ) -> Tensor:  # (n₁ m, columns)
        """Multiply one group of columns. If the product is not symmetric, multiply again in a slower way.

        If rows and columns are the same samples, ⟨V, J (Jᵀ V)⟩ = ‖Jᵀ V‖² is checked at no cost. The check fails if the
        products with J and with Jᵀ are inconsistent for some samples, which a custom operation may cause.
        """
        U = self._pull(V, step)
        KV = self._push(U, step)
        if self._rows is not self._columns or is_symmetric(V, U, KV) or not self._fall_back():
            return KV
        return self._multiply(V, step)

    def _fall_back(self) -> bool:
        """Choose the next slower way to compute J U, then batches of one sample. Return whether one was left."""
        ways = list(PUSHES)
        if self.push != ways[-1]:
            self.push = ways[ways.index(self.push) + 1]
            return True
        was_alone, self._batch_size = self._batch_size == 1, 1
        return not was_alone

    def _pull(
        self,
        V: Tensor,  # (n₂ m, columns)
        step: Step,
    ) -> Directions:
        """Compute J₂ᵀ V."""
        params = trainable_parameters(self._module)
        total = [torch.zeros(V.shape[1], *p.shape, dtype=p.dtype, device=p.device) for p in params]
        cotangents = V.T.reshape(V.shape[1], len(self._columns), self.num_outputs)
        if self._transform is not None:
            cotangents = cotangents @ self._transform
        pieces = cotangents.split(self._batch_size, dim=1)
        for batch, piece in zip(self._columns.split(self._batch_size), pieces, strict=True):
            add_pullback(self._module, as_input(batch, self.dtype, self.device), piece, total)
            step()
        return total

    def _push(
        self,
        directions: Directions,
        step: Step,
    ) -> Tensor:  # (n₁ m, columns)
        """Compute J₁ U."""
        products = []
        for batch in self._rows.split(self._batch_size):
            product = PUSHES[self.push](self._module, as_input(batch, self.dtype, self.device), directions)
            products.append(product.detach() if self._transform is None else product.detach() @ self._transform.T)
            step()
        return torch.cat(products, dim=1).flatten(1).T

    def _floats(self, values: Tensor | npt.NDArray[Any]) -> Tensor:
        return as_input(checked_vectors(values).to(self.dtype), self.dtype, self.device)

    def _shape_error(self, vectors: Tensor) -> ShapeError:
        return ShapeError(
            f"The vectors do not fit the kernel of {self.shape[0]} × {self.shape[1]}: expected ({self.shape[1]},) or "
            f"({self.shape[1]}, columns), found {tuple(vectors.shape)}. Were they made for other samples, or for "
            f"another number of outputs than {self.num_outputs}? Row sample · outputs + output belongs to a sample of "
            "the second batch. Pass vectors of this length, or use the transpose, operator.T."
        )


def _in_numpy(product: Callable[[Tensor], Tensor], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Apply a product of tensors to an array."""
    array: npt.NDArray[Any] = product(checked_vectors(values)).cpu().numpy()
    return array


def _prepared(given: Given, precision: str) -> Network:
    samples = in_turns(given.rows, given.columns)
    return prepare(given.model, samples, policy(precision), device_for(given.model, precision))


def device_for(model: nn.Module, precision: str) -> torch.device:
    """Choose the device of the module, or the CPU if the precision is float64 and that device has none."""
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "mps" and precision == "float64" else device


def require_fitting(transform: Tensor | None, num_logits: int) -> None:
    """Refuse a matrix A of outputs A f that does not fit the network.

    Raises:
        ShapeError: If it is not (outputs, logits).
    """
    if transform is not None and (transform.ndim != 2 or transform.shape[1] != num_logits or not len(transform)):
        raise ShapeError(
            f"The transform does not fit the network: expected (outputs, {num_logits}), one column per logit, found "
            f"{tuple(transform.shape)}. Is it transposed, or made for a network with other classes? Pass a matrix of "
            "the expected shape."
        )
