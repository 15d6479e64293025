"""The kernel of two batches as a tensor: `ntkgen.ntk`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ntkgen.errors import InputError, ShapeError, UnknownNameError
from ntkgen.jacobian.contract import fill_kernel
from ntkgen.jacobian.cost import ORDERS, Order, plan_jacobian
from ntkgen.jacobian.factors import FactorCache
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.kernel.tiles import Block

# Blocks of this many bytes of factors, and intermediates of this many numbers, keep any batch in bounded memory.
BLOCK_BYTES = 1 << 30
WORKSPACE_NUMBERS = 1 << 22
BATCH_SIZE = 32


def ntk(
    model: nn.Module,
    x1: Tensor,  # (n₁, …)
    x2: Tensor | None = None,  # (n₂, …)
    *,
    precision: str = "float32",
    orders: Sequence[Order] = (),
) -> Tensor:  # (n₁ m, n₂ m)
    """Compute the empirical neural tangent kernel of two batches, K = J₁ J₂ᵀ, exactly up to rounding.

    Rows and columns are sample-major: ``row = sample · m + output``. Without ``x2`` the kernel of ``x1`` with itself is
    computed once per pair, and is exactly symmetric. The module is copied and never changed; the copy is in evaluation
    mode. The result lies on the module's device.

    Args:
        model: Any module that maps (samples, …) to (samples, outputs) and treats samples one by one.
        x1: The samples of the rows.
        x2: The samples of the columns; those of the rows where it is left out.
        precision: ``float32`` or ``float64``: the dtype of network, factors and products.
        orders: One order of multiplication per layer with a weight matrix, instead of the cheapest.

    References:
        Jacot, Gabriel, Hongler (2018), arXiv:1806.07572, §4; Novak, Sohl-Dickstein, Schoenholz (2022),
        arXiv:2206.08720, for the structure of the factors.

    Raises:
        InputError: If a batch is empty.
        ShapeError: If the batches hold samples of different shapes.
        ModelError: If the kernel of this network is not defined.
        UnknownNameError: If there is no such precision.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> ntk(torch.nn.Linear(2, 1), x)  # J = [x, 1]
    tensor([[ 6.,  7.],
            [ 7., 10.]])
    """
    _check_batches(x1, x2)
    _check_orders(orders)
    x = x1 if x2 is None else torch.cat([x1, x2])
    network = prepare(model, x, policy(precision))
    batch_size = min(BATCH_SIZE, len(x))
    plan = plan_jacobian(
        network.profile,
        block_samples=len(x),
        batch_size=batch_size,
        workspace_numbers=WORKSPACE_NUMBERS,
        orders=orders,
    )
    per_batch = plan.factor_numbers * network.precision.compute_dtype.itemsize * batch_size
    size = max(1, BLOCK_BYTES // per_batch) * batch_size
    rows = Block(0, len(x1)).pieces(size)
    columns = rows if x2 is None else Block(len(x1), len(x)).pieces(size)
    with exact_arithmetic(network.device):
        return fill_kernel(rows, columns, FactorCache(network, plan, x, capacity=2), plan)


def _check_orders(orders: Sequence[str]) -> None:
    for order in orders:
        if order not in ORDERS:
            raise UnknownNameError("order", order, ORDERS)


def _check_batches(x1: Tensor, x2: Tensor | None) -> None:
    for x in (x1, x2):
        if not isinstance(x, Tensor | None):
            raise InputError(f"A batch must be a torch.Tensor, and is a {type(x).__name__}. Use torch.as_tensor(x).")
    if min(len(x1), len(x1 if x2 is None else x2)) == 0:
        raise InputError("A kernel needs samples: expected at least one, found an empty batch. Pass some.")
    if x2 is not None and x1.shape[1:] != x2.shape[1:]:
        raise ShapeError(
            f"The batches hold samples of different shapes, {tuple(x1.shape[1:])} and {tuple(x2.shape[1:])}, but one "
            "network is to take both. Were they prepared in the same way?"
        )
