"""The kernel as a linear operator that is never formed, K V = J₁ (J₂ᵀ V): `NTKOperator`."""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkgen.errors import InputError, ShapeError, UnknownNameError
from ntkgen.jacobian.batches import ArrayLike, checked_batches, checked_vectors
from ntkgen.jacobian.capture import weighted_sum
from ntkgen.jacobian.evaluation import as_input, outputs_of, require_plain_module, without_kept_graphs
from ntkgen.jacobian.independence import has_own_gradients
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.jacobian.probe import in_turns
from ntkgen.jacobian.reals import real_numbers

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

BATCH_SIZE = 32
PRECISIONS = ("float32", "float64")
# So many bytes of Jᵀ V, a column of which has as many numbers as the network parameters, are held at a time.
DIRECTION_BYTES = 1 << 30

# How far products in other modes may be from those in reverse mode, relative to their norm.
COVERAGE_TOLERANCE = {torch.float32: 3e-3, torch.float64: 1e-9}

# One tensor per trainable parameter, (columns, *parameter): several vectors in the space of parameters.
Directions = list[Tensor]
# Called after each batch with the batches done and those there are.
Report = Callable[[int, int], None]


def ignore_report(done: int, total: int) -> None:
    """Report nothing."""


# Jᵀ V and J U of one batch --------------------------------------------------------------------------------------------


def _real_rows(
    part: Tensor,  # (columns, *parameter)
) -> Tensor:  # (columns, numbers)
    """Lay the columns of a parameter out as rows of real numbers: ⟨u, v⟩ is then Σ Re u Re v + Im u Im v."""
    return real_numbers(part).reshape(len(part), -1)


def _params(module: nn.Module) -> list[Tensor]:
    return [param for param in module.parameters() if param.requires_grad]


def _places(module: nn.Module) -> dict[str, int]:
    """Find where each trainable parameter is kept: a tied one in several places, a shared module's once.

    `functional_call` would tie the names itself, but to both names of a shared module, and leave that without its
    parameters.
    """
    index = {id(param): position for position, param in enumerate(_params(module))}
    places = {}
    for prefix, child in module.named_modules():
        for name, param in child.named_parameters(recurse=False, remove_duplicate=False):
            if id(param) in index:
                places[f"{prefix}.{name}" if prefix else name] = index[id(param)]
    return places


def add_pullback(
    module: nn.Module,
    batch: Tensor,  # (samples, …)
    cotangents: Tensor,  # (columns, samples, outputs)
    total: Directions,
) -> None:
    """Add Jᵀ V of one batch to a running total: one forward pass, and one backward pass per column."""
    outputs = outputs_of(module, batch)
    if not outputs.requires_grad:
        return
    for column, cotangent in enumerate(cotangents):
        retain = column + 1 < len(cotangents)
        target = weighted_sum(outputs, cotangent)
        grads = torch.autograd.grad(target, _params(module), retain_graph=retain, allow_unused=True)
        for part, grad in zip(total, grads, strict=True):
            if grad is not None:
                part[column] += grad


def push_forward(
    module: nn.Module,
    batch: Tensor,  # (samples, …)
    directions: Directions,
) -> Tensor:  # (columns, samples, outputs)
    """Compute J U of one batch in forward mode, one pass per column."""
    places = _places(module)

    def outputs(values: list[Tensor]) -> Tensor:
        by_name = {name: values[index] for name, index in places.items()}
        result: Tensor = functional_call(module, by_name, (batch.clone(),), tie_weights=False)
        return result

    params = [param.detach() for param in _params(module)]
    with torch.no_grad():  # `jvp` needs no graph for a backward pass
        return torch.stack([jvp(outputs, (params,), (list(column),))[1] for column in zip(*directions, strict=True)])


def push_double_backward(
    module: nn.Module,
    batch: Tensor,  # (samples, …)
    directions: Directions,
) -> Tensor:  # (columns, samples, outputs)
    """Compute J U of one batch by differentiating ⟨Jᵀ V, U⟩, which is linear in V, with respect to V.

    Costs up to three times as much as forward mode, and needs each backward formula to be differentiable itself.
    """
    outputs = outputs_of(module, batch)
    cotangents = torch.zeros_like(outputs).requires_grad_()
    if not outputs.requires_grad:
        return cotangents.new_zeros(len(directions[0]), *outputs.shape)
    target = weighted_sum(outputs, cotangents)
    grads = torch.autograd.grad(target, _params(module), create_graph=True, allow_unused=True)
    used = [index for index, grad in enumerate(grads) if grad is not None and grad.requires_grad]
    columns = []
    for column in range(len(directions[0])):
        along = [directions[index][column] for index in used]
        columns.append(torch.autograd.grad([grads[i] for i in used], cotangents, along, retain_graph=True)[0])
    return torch.stack(columns)


def push_rows(
    module: nn.Module,
    batch: Tensor,  # (samples, …)
    directions: Directions,
) -> Tensor:  # (columns, samples, outputs)
    """Compute J U of one batch row by row of J, in reverse mode: one backward pass per sample and output."""
    samples = []
    for sample in batch:
        outputs = outputs_of(module, sample[None])[0]
        products = outputs.detach().new_zeros(len(directions[0]), len(outputs))
        for index in range(len(outputs) if outputs.requires_grad else 0):
            grads = torch.autograd.grad(outputs[index], _params(module), retain_graph=True, allow_unused=True)
            for part, grad in zip(directions, grads, strict=True):
                if grad is not None:
                    products[:, index] += _real_rows(part) @ real_numbers(grad.to_dense())
        samples.append(products)
    return torch.stack(samples, dim=1)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Use the one implementation of attention that has a forward mode, and a backward that can be differentiated."""
    mha: Any = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(before)


# The cheapest first; the last always works, and is what the others are checked against.
PUSHES: dict[str, Callable[[nn.Module, Tensor, Directions], Tensor]] = {
    "forward": push_forward,
    "double-backward": push_double_backward,
    "rows": push_rows,
}


def choose_push(module: nn.Module, sample: Tensor) -> str:
    """Name the cheapest way to J U that this network allows, by trying each on one sample and a random direction.

    Not every operation has a forward mode or a differentiable backward, and a wrong one of somebody's own operation
    would go unnoticed: the result is compared with that of plain reverse mode. What autograd does to the gradient of an
    embedding table depends on the tokens, of which one sample has not all: those are known.
    """
    candidates = ["forward", "double-backward"]
    for table in _tables(module):
        if table.scale_grad_by_freq:
            return "rows"
        if table.padding_idx is not None:
            candidates = ["double-backward"]
    generator = torch.Generator("cpu").manual_seed(0)
    directions = [_random_direction(param.detach(), generator) for param in _params(module)]
    expected = push_rows(module, sample, directions)
    for name in candidates:
        # an operation without this mode raises what its author liked; torch warns of itself where it first needs it
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            if _agree(PUSHES[name](module, sample, directions), expected):
                return name
    return "rows"


def _random_direction(param: Tensor, generator: torch.Generator) -> Tensor:  # (1, *parameter)
    dtype = torch.complex128 if param.is_complex() else torch.float64
    return torch.randn(1, *param.shape, generator=generator, dtype=dtype, device="cpu").to(param)


def _tables(module: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    return [child for child in module.modules() if isinstance(child, nn.Embedding | nn.EmbeddingBag)]


def _agree(found: Tensor, expected: Tensor) -> bool:
    assert found.shape == expected.shape
    return bool((found - expected).norm() <= COVERAGE_TOLERANCE[expected.dtype] * expected.norm())


# the operator ---------------------------------------------------------------------------------------------------------


class NTKOperator:
    """The empirical neural tangent kernel of two batches as a linear operator, K = J₁ J₂ᵀ, of (n₁ m, n₂ m).

    ``K V = J₁ (J₂ᵀ V)``: reverse mode sums J₂ᵀ V over the batches, forward mode multiplies it by J₁. For c columns and
    n = n₁ + n₂ samples this costs about c · n forward and as many backward passes, and holds c · P numbers, in groups
    of at most `DIRECTION_BYTES`; neither J nor K is ever there. The first product also tries every batch, which costs
    about three more forward and backward passes. Rows and columns are sample-major,
    ``row = sample · m + output``. The module is copied and never changed; the copy is in evaluation mode.

    Attributes:
        shape: Rows and columns, n₁ m and n₂ m.
        dtype: The dtype of network, vectors and products.
        device: Where the products are made, and lie: the module's device, or the CPU where that has no float64.
        push: How J U is computed: ``forward`` mode, or where an operation of the network has none
            ``double-backward``, or where that is not possible either ``rows``, one backward pass per row of J.

    References:
        Jacot, Gabriel, Hongler (2018), arXiv:1806.07572, §4; Novak, Sohl-Dickstein, Schoenholz (2022),
        arXiv:2206.08720, §3.3, for products of the kernel with vectors.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> NTKOperator(torch.nn.Linear(2, 1), x) @ torch.tensor([1.0, 0.0])  # J = [x, 1]
    tensor([6., 7.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        x1: ArrayLike,  # (n₁, …)
        x2: ArrayLike | None = None,  # (n₂, …)
        *,
        precision: str = "float64",
        batch_size: int = BATCH_SIZE,
        transform: Tensor | npt.NDArray[Any] | None = None,  # (outputs, logits)
    ) -> None:
        """Prepare a network, without computing anything of its kernel.

        Args:
            model: Any module that maps (samples, …) to (samples, logits) and treats samples one by one.
            x1: The samples of the rows.
            x2: The samples of the columns; those of the rows where it is left out.
            precision: ``float32`` or ``float64``: the dtype of network and products.
            batch_size: Samples in one pass.
            transform: A matrix A: the kernel is then that of A f(x), with as many outputs as A has rows.

        Raises:
            InputError: If a batch is empty or not real numbers, or the batch size is not positive.
            ShapeError: If the batches hold samples of different shapes, or the transform does not fit the network.
            ModelError: If the kernel of this network is not defined.
            UnknownNameError: If there is no such precision.
        """
        rows, columns = checked_batches(x1, x2)
        require_plain_module(model)
        if precision not in PRECISIONS:
            raise UnknownNameError("precision of an operator", precision, PRECISIONS)
        if batch_size < 1:
            raise InputError(f"The batch size must be at least 1, and is {batch_size}. Pass a positive number.")
        network = prepare(model, in_turns(rows, columns), policy(precision), _device(model, precision))
        self.dtype, self.device = network.precision.compute_dtype, network.device
        self._module, self._num_params = network.module, network.profile.num_params
        self._transform = None if transform is None else self._floats(transform)
        _check_transform(self._transform, network.profile.num_outputs)
        self.num_outputs = network.profile.num_outputs if self._transform is None else len(self._transform)
        # only alone is the gradient of a sample its own where it is scaled by how often a token occurs
        is_alone = any(table.scale_grad_by_freq for table in _tables(self._module))
        self._rows, self._columns = rows, rows if columns is None else columns
        self._batch_size = 1 if is_alone else batch_size
        self._proved: set[tuple[int, int]] = set()  # samples, and the batch size with which they were run
        with exact_arithmetic(self.device), plain_attention(), without_kept_graphs():
            self.push = choose_push(self._module, as_input(rows[:1], self.dtype, self.device))

    def __repr__(self) -> str:
        """Say the size and the precision."""
        return f"<NTKOperator {self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.push}>"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the kernel."""
        return len(self._rows) * self.num_outputs, len(self._columns) * self.num_outputs

    @property
    def T(self) -> "NTKOperator":  # noqa: N802
        """The transpose, J₂ J₁ᵀ; it shares the network."""
        other = copy.copy(self)
        other._rows, other._columns = self._columns, self._rows
        return other

    def matvec(
        self,
        v: Tensor | npt.NDArray[Any],  # (n₂ m,)
    ) -> Tensor:  # (n₁ m,)
        """Multiply the kernel with a vector, a tensor or a NumPy array; the product is a tensor.

        Raises:
            InputError: If it is neither, or complex.
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
        """Multiply the kernel with several vectors; cheaper than one by one, because forward passes are shared.

        Raises:
            InputError: If they are neither a tensor nor a NumPy array, or complex.
            ShapeError: If the vectors do not have as many entries as the kernel has columns.
            ModelError: If samples of a batch depend on each other, or a backward pass is not linear.
        """
        vectors = self._floats(V)
        if vectors.ndim != 2 or len(vectors) != self.shape[1]:
            raise self._shape_error(vectors)
        groups = vectors.split(self._columns_at_once, dim=1)
        if not vectors.shape[1]:
            return torch.zeros(self.shape[0], 0, dtype=self.dtype, device=self.device)
        count = _Count(len(groups) * (self._num_batches(self._rows) + self._num_batches(self._columns)), report)
        with exact_arithmetic(self.device), plain_attention(), without_kept_graphs():
            self._prove()
            return torch.cat([self._multiply(group, count) for group in groups], dim=1)

    def __matmul__(self, other: Tensor | npt.NDArray[Any]) -> Tensor:
        """Multiply with a vector or with the columns of a matrix."""
        return self.matvec(other) if np.ndim(other) == 1 else self.matmat(other)

    def to_scipy(self) -> "LinearOperator":
        """View as a `scipy.sparse.linalg.LinearOperator`, for `eigsh`, `svds`, `cg` and their like."""
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

    def _prove(self) -> None:
        """Try every batch once, before the first product; where gradients are not a sample's own, take them alone."""
        for samples in (self._columns, self._rows):
            while (id(samples), self._batch_size) not in self._proved:
                batches = (as_input(batch, self.dtype, self.device) for batch in samples.split(self._batch_size))
                if all(has_own_gradients(self._module, batch) for batch in batches) or self._batch_size == 1:
                    self._proved.add((id(samples), self._batch_size))
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
        count: "_Count",
    ) -> Tensor:  # (n₁ m, columns)
        """Multiply one group of columns, and once more, more slowly, if that was not symmetric.

        ⟨V, J (Jᵀ V)⟩ = ‖Jᵀ V‖² costs nothing to check where rows and columns are the same samples. It fails where one
        of the two does something else than the other to some of the samples, as somebody's own operation may.
        """
        U = self._pull(V, count)
        KV = self._push(U, count)
        if self._rows is not self._columns or _is_symmetric(V, U, KV) or not self._fall_back():
            return KV
        return self._multiply(V, count)

    def _fall_back(self) -> bool:
        """Choose the next slower way, in the end one sample at a time; say whether there was one."""
        ways = list(PUSHES)
        if self.push != ways[-1]:
            self.push = ways[ways.index(self.push) + 1]
            return True
        was_alone, self._batch_size = self._batch_size == 1, 1
        return not was_alone

    def _pull(
        self,
        V: Tensor,  # (n₂ m, columns)
        count: "_Count",
    ) -> Directions:
        """Compute J₂ᵀ V."""
        total = [torch.zeros(V.shape[1], *p.shape, dtype=p.dtype, device=p.device) for p in _params(self._module)]
        cotangents = V.T.reshape(V.shape[1], len(self._columns), self.num_outputs)
        if self._transform is not None:
            cotangents = cotangents @ self._transform
        pieces = cotangents.split(self._batch_size, dim=1)
        for batch, piece in zip(self._columns.split(self._batch_size), pieces, strict=True):
            add_pullback(self._module, as_input(batch, self.dtype, self.device), piece, total)
            count.step()
        return total

    def _push(
        self,
        directions: Directions,
        count: "_Count",
    ) -> Tensor:  # (n₁ m, columns)
        """Compute J₁ U."""
        products = []
        for batch in self._rows.split(self._batch_size):
            product = PUSHES[self.push](self._module, as_input(batch, self.dtype, self.device), directions)
            products.append(product.detach() if self._transform is None else product.detach() @ self._transform.T)
            count.step()
        return torch.cat(products, dim=1).flatten(1).T

    def _floats(self, values: Tensor | npt.NDArray[Any]) -> Tensor:
        return as_input(checked_vectors(values).to(self.dtype), self.dtype, self.device)

    def _shape_error(self, found: Tensor) -> ShapeError:
        return ShapeError(
            f"What is to be multiplied does not fit the kernel of {self.shape[0]} × {self.shape[1]}: expected "
            f"({self.shape[1]},) or ({self.shape[1]}, columns), found {tuple(found.shape)}. Was it made for other "
            f"samples, or for another number of outputs than {self.num_outputs}? Its rows are those of the second "
            "batch, sample · outputs + output; the transpose is operator.T."
        )


class _Count:
    """Batches done, of all there are."""

    def __init__(self, total: int, report: Report) -> None:
        self._done, self._total, self._report = 0, total, report

    def step(self) -> None:
        """Count one more."""
        self._done += 1
        self._report(min(self._done, self._total), self._total)  # more, if a product has to be repeated


def _is_symmetric(
    V: Tensor,  # (rows, columns)
    U: Directions,
    KV: Tensor,  # (rows, columns)
) -> bool:
    """Say whether ⟨v, K v⟩ = ‖Jᵀ v‖² for each column, relative to ‖v‖ ‖K v‖."""
    squares = torch.stack([_real_rows(part).square().sum(1) for part in U]).sum(0)
    difference = ((V * KV).sum(0) - squares).abs()
    return not bool((difference > COVERAGE_TOLERANCE[V.dtype] * V.norm(dim=0) * KV.norm(dim=0)).any())


def _in_numpy(product: Callable[[Tensor], Tensor], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Call a product of tensors on arrays."""
    array: npt.NDArray[Any] = product(checked_vectors(values)).cpu().numpy()
    return array


def _device(model: nn.Module, precision: str) -> torch.device:
    """Compute where the module is, but on the CPU where that has no float64."""
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "mps" and precision == "float64" else device


def _check_transform(transform: Tensor | None, num_logits: int) -> None:
    if transform is not None and (transform.ndim != 2 or transform.shape[1] != num_logits or not len(transform)):
        raise ShapeError(
            f"The transform does not fit the network: expected (outputs, {num_logits}), one column per logit, found "
            f"{tuple(transform.shape)}. Is it transposed, or made for a network of other classes?"
        )
