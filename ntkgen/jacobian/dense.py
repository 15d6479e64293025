"""The kernel of two batches as a tensor: `ntkgen.ntk`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ntkgen.alone import alone
from ntkgen.blocks import Block, block_pairs
from ntkgen.errors import RuleError, UnknownNameError
from ntkgen.jacobian.adapter import Function, Given, Target
from ntkgen.jacobian.cache import BlockCache, count_samples
from ntkgen.jacobian.choice import plan_jacobian
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import fill_kernel, fill_kernels
from ntkgen.jacobian.cost import (
    ORDERS,
    JacobianPlan,
    NetworkProfile,
    Order,
    Reduction,
    factor_macs,
    product_macs,
    sizes_for,
)
from ntkgen.jacobian.factors import BlockFactors
from ntkgen.jacobian.groups import (
    GroupPatterns,
    ParameterGroup,
    PerLayer,
    as_groups,
    factor_groups,
    groups_of,
    keep_apart,
)
from ntkgen.jacobian.joint import BATCH_SIZE as JOINT_BATCH
from ntkgen.jacobian.joint import JointFactors, join_biases, plan_jointly
from ntkgen.jacobian.measure import rates_of
from ntkgen.jacobian.network import Network, more_excluded
from ntkgen.jacobian.outputs import output_map, prepare_mapped
from ntkgen.jacobian.precision import exact_arithmetic, precision_of
from ntkgen.jacobian.probe import in_turns
from ntkgen.jacobian.remembered import REMEMBERED
from ntkgen.jacobian.samples import Batch
from ntkgen.jacobian.selection import Select

# Maximum bytes of the factors of a block. Two blocks are in memory at a time.
BLOCK_BYTES = 4 << 30
# Number of samples per forward pass.
BATCH_SIZE = 32
# The same for a network whose graph keeps at most `SMALL_GRAPH` numbers per sample. Most of its time is the overhead of
# calls. For a LeNet and 128 samples, batches of 64 make the kernel and the proof of its batches quicker.
SMALL_BATCH_SIZE, SMALL_GRAPH = 64, 1 << 15
# Maximum number of numbers that the passes of a batch keep for all outputs, if these are differentiated at once.
JOINT_NUMBERS = 1 << 26
# Maximum number of samples of the rows of a product on a CPU. A symmetric kernel is computed from its diagonal on, so
# narrow panels save up to half of it.
PANEL_SAMPLES = 8


@overload
def ntk(
    model: nn.Module,
    x1: Batch,
    x2: Batch | None = None,
    *,
    function: Function | Sequence[Function] | None = None,
    select: Select | None = None,
    params: str | Sequence[str] | None = None,
    columns_function: Function | Sequence[Function] | None = None,
    output: str = "full",
    precision: str | None = None,
    per_layer: Literal[False] | None = None,
    orders: Sequence[Order] = (),
) -> Tensor: ...
@overload
def ntk(
    model: nn.Module,
    x1: Batch,
    x2: Batch | None = None,
    *,
    function: Function | Sequence[Function] | None = None,
    select: Select | None = None,
    params: str | Sequence[str] | None = None,
    columns_function: Function | Sequence[Function] | None = None,
    output: str = "full",
    precision: str | None = None,
    per_layer: Literal[True] | str | Sequence[str] | Mapping[str, str | Sequence[str]],
    orders: Sequence[Order] = (),
) -> dict[str, Tensor]: ...
def ntk(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
    model: nn.Module,
    x1: Batch,  # (n₁, …)
    x2: Batch | None = None,  # (n₂, …)
    *,
    function: Function | Sequence[Function] | None = None,
    select: Select | None = None,
    params: str | Sequence[str] | None = None,
    columns_function: Function | Sequence[Function] | None = None,
    output: str = "full",
    precision: str | None = None,
    per_layer: PerLayer | None = None,
    orders: Sequence[Order] = (),
) -> Tensor | dict[str, Tensor]:  # (n₁ m, n₂ m)
    """Compute the empirical neural tangent kernel of two batches, K = J₁ J₂ᵀ, exact up to rounding.

    Rows and columns are sample-major: ``row = sample · m + output``. Without ``x2`` the kernel is that of ``x1`` with
    itself. Each pair of samples is then computed once, and the result is exactly symmetric. The module is copied and
    never changed. The copy is in evaluation mode. The result is on the module's device.

    Args:
        model: Any module that treats samples one by one. Its outputs are a tensor with the samples as first axis, or
            have one that ``select`` takes.
        x1: The samples of the rows: a tensor, a NumPy array or nested lists of numbers. A tuple of tensors or arrays
            holds several positional arguments of the network, and a dictionary holds keyword arguments. The first axis
            of each is that of the samples. A list is always one tensor, and its items are the samples.
        x2: The samples of the columns. By default these are the samples of the rows.
        function: A function of the module and a batch, in place of the network's own outputs, such as the residual of
            a differential equation. The outputs of several functions are joined.
        select: The outputs: text such as ``logits`` or ``logits[:, -1, [5, 7]]``, or a function of the result.
        params: Patterns of names of parameters, such as ``head.*`` or ``!*embed*``. By default all trainable ones.
        columns_function: The function of the columns, if it is another one than that of the rows.
        output: The output map (`ntkgen.jacobian.outputs.output_map`). ``full``, ``sum``, ``centered`` (m - 1 contrasts)
            and ``index:K`` choose the outputs that are differentiated. ``trace`` and ``diagonal`` reduce each m × m
            block. The shape of the result is then (n₁, n₂) for ``trace`` and (m, n₁, n₂) for ``diagonal``.
        precision: The precision of the computation: ``float64``, ``float64-accumulate``, ``float32``, ``tf32`` or
            ``bfloat16``. By default it is float64 for a network of float64 parameters, and otherwise float32.
        per_layer: Groups of parameters whose kernels are returned in a dictionary: patterns by the name of the group,
            patterns alone, or True for one group per module. The sum of these kernels is the kernel.
        orders: One order of multiplication per layer with a weight matrix. By default the fastest order is chosen.

    References:
        Jacot, Gabriel, Hongler (2018), arXiv:1806.07572, §4; Novak, Sohl-Dickstein, Schoenholz (2022),
        arXiv:2206.08720, for the structure of the factors.

    Raises:
        InputError: If a batch is empty, or is not real numbers, or if patterns do not fit the parameters.
        ShapeError: If the batches hold samples of different shapes.
        ModelError: If the kernel of this network is not defined.
        UnknownNameError: If a precision, output or order has an unknown name.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> ntk(torch.nn.Linear(2, 1), x)  # J = [x, 1]
    tensor([[ 6.,  7.],
            [ 7., 10.]])
    """
    request = Request(output, precision_of(model, precision), _checked_orders(orders), groups=as_groups(per_layer))
    target = Target.of(function, select, params, columns_function)
    return Given.of(model, x1, x2, target).attempt(lambda given: _ntk(given, request))


def _ntk(given: Given, request: "Request") -> Tensor | dict[str, Tensor]:
    question = (request, given.target)
    network = REMEMBERED.find(given, question)
    if network is not None:
        try:
            return compute_ntk(_plan_prepared(network, given.rows, given.columns, request))
        except Exception:  # noqa: BLE001 - the network has changed in some way, or a new preparation explains the error
            REMEMBERED.forget(given)
    while True:
        network = _prepared(given.model, given.rows, given.columns, request)
        try:
            kernel = compute_ntk(_plan_prepared(network, given.rows, given.columns, request))
        except RuleError as error:  # a rule does not hold for some batch: begin again without this rule
            request = dataclasses.replace(request, excluded=more_excluded(request.excluded, error))
        else:
            REMEMBERED.keep(given, question, network)
            return kernel


@dataclass(frozen=True)
class Request:
    """A requested kernel: output, precision policy, orders of multiplication, parameters left to autograd, groups."""

    output: str = "full"
    precision: str = "float32"
    orders: tuple[Order, ...] = ()
    excluded: frozenset[str] = frozenset()
    groups: GroupPatterns | None = None


@dataclass(frozen=True)
class DensePlan:
    """A kernel in memory, prepared but not computed."""

    network: Network
    jacobian: JacobianPlan
    x: Tensor  # the samples of the rows, then the samples of the columns
    rows: list[Block]
    columns: list[Block]
    is_joint: bool  # whether the factors of all outputs are computed at once
    groups: tuple[ParameterGroup, ...] | None = None  # those that have a kernel each

    @property
    def macs(self) -> int:
        """Count all multiply-adds: those of the factors, including repeated ones, and those of the products."""
        pairs = list(block_pairs(self.rows, self.columns))
        computed = count_samples(2, [([], (block for pair in pairs for block in pair))])
        products = (product_macs(self.jacobian, len(i), len(j), is_diagonal=i == j) for i, j in pairs)
        return computed * factor_macs(self.network.profile, self.jacobian) + sum(products)


def plan_ntk(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    asked: Request = Request(),
) -> DensePlan:
    """Prepare a network, measure the device, and plan the kernel of two batches.

    Args:
        model: The network.
        x1: The samples of the rows.
        x2: The samples of the columns.
        asked: What is computed, and how.
    """
    return _plan_prepared(_prepared(model, x1, x2, asked), x1, x2, asked)


def _prepared(model: nn.Module, x1: Tensor, x2: Tensor | None, asked: Request) -> Network:
    network, _ = prepare_mapped(model, in_turns(x1, x2), asked.precision, asked.output, excluded=asked.excluded)
    return network


def _plan_prepared(network: Network, x1: Tensor, x2: Tensor | None, asked: Request) -> DensePlan:
    chosen = output_map(asked.output, network.profile.num_logits)
    x = x1 if x2 is None else torch.cat([x1, x2])
    network.warn_of_cost(len(x))
    longest = max(len(x1), len(x) - len(x1))
    is_joint = not asked.orders and is_small(network.profile, longest)
    groups = None if asked.groups is None else groups_of(network.module, asked.groups)
    network = keep_apart(network, groups or ())
    jointly = partial(plan_jointly, network, precision=asked.precision, reduction=chosen.reduction)
    jacobian = plan_blocks(jointly if is_joint else _planner(network, asked, chosen.reduction), longest)
    network = join_biases(network, jacobian) if is_joint else network
    size = jacobian.sizes.block_samples
    rows = Block(0, len(x1)).pieces(size)
    columns = rows if x2 is None else Block(len(x1), len(x)).pieces(size)
    return DensePlan(network, jacobian, x, rows, columns, is_joint=is_joint, groups=groups)


def _planner(network: Network, asked: Request, reduction: Reduction) -> Callable[[int], JacobianPlan]:
    """Return the function that plans for a number of samples per block, from the speed of the device."""
    with alone():  # other threads would disturb the measurement
        rates = rates_of(network.device, asked.precision)

    def planned(block: int) -> JacobianPlan:
        sizes = sizes_for(network.device.type, block, batch_size_for(network.profile.activation_numbers))
        if network.device.type == "cpu":
            sizes = dataclasses.replace(sizes, panel_samples=min(sizes.panel_samples, PANEL_SAMPLES))
        return plan_jacobian(
            network.profile,
            sizes,
            precision=asked.precision,
            rates=rates,
            reduction=reduction,
            orders=asked.orders,
        )

    return planned


def plan_blocks(planned: Callable[[int], JacobianPlan], longest: int) -> JacobianPlan:
    """Plan with the largest blocks of at most `BLOCK_BYTES`.

    Args:
        planned: Plans for a number of samples per block.
        longest: Number of samples of the rows or of the columns, whichever are more.
    """
    jacobian = planned(longest)
    if jacobian.factor_bytes * longest <= BLOCK_BYTES:
        return jacobian
    return planned(max(1, BLOCK_BYTES // jacobian.factor_bytes))


def compute_ntk(plan: DensePlan) -> Tensor | dict[str, Tensor]:
    """Compute a planned kernel, or one for each group of parameters."""

    def factors(block: Block) -> BlockFactors:
        x = plan.x[block.start : block.stop]
        if plan.is_joint:
            return JointFactors(plan.network, plan.jacobian, len(block))(x, prove=True)
        return compute_factors(plan.network, plan.jacobian, x)

    cache = BlockCache(factors, capacity=2)
    with exact_arithmetic(plan.network.device):
        if plan.groups is None:
            return fill_kernel(plan.rows, plan.columns, cache, plan.jacobian)
        parts = factor_groups(plan.network, plan.jacobian, plan.groups)
        kernels = fill_kernels(plan.rows, plan.columns, cache, plan.jacobian, parts)
    return {group.name: kernel for group, kernel in zip(plan.groups, kernels, strict=True)}


def is_small(profile: NetworkProfile, samples: int) -> bool:
    """Say whether the factors of all outputs are computed at once, which takes fewer calls and more memory."""
    per_sample = profile.num_outputs * profile.activation_numbers
    return per_sample * min(samples, JOINT_BATCH) <= JOINT_NUMBERS


def batch_size_for(activation_numbers: int) -> int:
    """Choose the number of samples per forward pass.

    Args:
        activation_numbers: Numbers that the graph of one sample keeps for its backward passes.
    """
    return SMALL_BATCH_SIZE if activation_numbers <= SMALL_GRAPH else BATCH_SIZE


def _checked_orders(orders: Sequence[Order]) -> tuple[Order, ...]:
    for order in orders:
        if order not in ORDERS:
            raise UnknownNameError("order", order, ORDERS)
    return tuple(orders)
