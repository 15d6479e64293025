"""The kernel of fixed samples as a function of a network's parameters: `ntkgen.KernelFunction`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.blocks import Block
from ntkgen.errors import InputError, PreparedRuleError, RuleError
from ntkgen.jacobian.adapter import Function, Given, Target
from ntkgen.jacobian.attributes import attributes_of, changed_by_forward, first_difference, without
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.contract import fill_kernel, fill_kernels
from ntkgen.jacobian.cost import JacobianPlan
from ntkgen.jacobian.dense import Request, plan_blocks
from ntkgen.jacobian.factors import BlockFactors
from ntkgen.jacobian.groups import PerLayer, as_groups, factor_groups, groups_of, keep_apart
from ntkgen.jacobian.joint import JointFactors, join_biases, plan_jointly
from ntkgen.jacobian.network import more_excluded
from ntkgen.jacobian.outputs import prepare_mapped
from ntkgen.jacobian.precision import exact_arithmetic, precision_of
from ntkgen.jacobian.probe import in_turns
from ntkgen.jacobian.samples import Batch
from ntkgen.jacobian.selection import Select
from ntkgen.jacobian.state import StateLoader

# Maximum number of blocks whose factors are held at a time. A kernel with no more blocks reuses their memory.
NUM_BLOCKS_HELD = 2


class KernelFunction:
    """The empirical neural tangent kernel of fixed samples, for one network whose parameters change.

    ``function(model)`` returns the same kernel as ``ntkgen.ntk(model, x1, x2)``. The model must have the architecture
    of the network given to the constructor. Its parameters and buffers may have other values. The constructor copies
    the network, runs it on a few samples and chooses the order of multiplication. It also compares the gradients of
    every batch with autograd. A call copies the parameters and buffers of the given network into this copy, runs it and
    computes the kernel. The given network, its mode, its gradients and all random states are not changed.

    A call does not repeat the comparison with autograd. It raises an error if a layer is called in another way than in
    the constructor, if outputs are not finite, or if ties, hooks, the class or an attribute of a module have changed,
    such as the number of the head in use. Attributes are compared by content: numbers, text, tensors, arrays,
    containers, functions with the values that they hold, dataclasses, namespaces, and other objects that hold plain
    values only. A call does not see a change inside any other object, in a global variable, or in what a forward pass
    itself changes. For a state dict, only parameters, buffers and extra state are compared and loaded. If the
    parameters decide how a sample is treated, as in a network that routes samples to experts, call the function with
    ``prove=True``. The block sizes and the order of multiplication depend only on the sizes of the network. Equal
    parameters therefore give equal bits in every process on one machine.

    Args:
        model: The network. It must treat samples one by one.
        x1: The samples of the rows, as for `ntkgen.ntk`. They are copied.
        x2: The samples of the columns. By default these are the samples of the rows.
        function: A function of the module and a batch, or several, as for `ntkgen.ntk`.
        select: The outputs, as for `ntkgen.ntk`.
        params: Patterns of names of parameters, as for `ntkgen.ntk`.
        columns_function: The function of the columns, as for `ntkgen.ntk`.
        output: The output map, as for `ntkgen.ntk`.
        precision: The precision of the computation, as for `ntkgen.ntk`.
        per_layer: Whether a call returns a dictionary with one kernel per module that has parameters, or the groups of
            parameters that have a kernel each, as for `ntkgen.ntk`. The sum of these kernels is the kernel.

    Raises:
        InputError: If a batch is empty, or not real numbers.
        ShapeError: If the batches hold samples of different shapes.
        ModelError: If the kernel of this network is not defined.
        UnknownNameError: If the precision or the output has an unknown name.

    >>> import torch
    >>> net = torch.nn.Linear(2, 1)
    >>> function = KernelFunction(net, [[1.0, 2.0], [0.0, 3.0]])
    >>> function(net)  # J = [x, 1]
    tensor([[ 6.,  7.],
            [ 7., 10.]])
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
        output: str = "full",
        precision: str | None = None,
        per_layer: PerLayer | None = None,
    ) -> None:
        target = Target.of(function, select, params, columns_function)
        given = Given.kept(model, x1, x2, target)
        before = attributes_of(model)
        asked = Request(output, precision_of(model, precision), groups=as_groups(per_layer))
        given.attempt(lambda given: self._try_all(given, asked))
        self._loader = StateLoader(self._network.module, model, target.params)
        # What a forward pass itself changes, such as a counter, is no part of the architecture.
        self._changing = changed_by_forward(before, attributes_of(self._network.module))
        self._attributes = without(before, self._changing)

    def _try_all(self, given: Given, asked: Request) -> None:
        """Prepare the network, and compare the gradients of every batch with autograd."""
        while True:
            self._prepare(given.model, given.rows, given.columns, asked)
            try:
                with exact_arithmetic(self._network.device):
                    for block in dict.fromkeys([*self._rows, *self._columns]):
                        self._factors(block, prove=True)
                break
            except RuleError as error:
                asked = dataclasses.replace(asked, excluded=more_excluded(asked.excluded, error))

    def _prepare(self, model: nn.Module, x1: Tensor, x2: Tensor | None, asked: Request) -> None:
        """Copy the network, and plan with the largest blocks."""
        network, chosen = prepare_mapped(
            model, in_turns(x1, x2), asked.precision, asked.output, excluded=asked.excluded
        )
        groups = None if asked.groups is None else groups_of(network.module, asked.groups)
        network = keep_apart(network, groups or ())

        def planned(block: int) -> JacobianPlan:
            return plan_jointly(network, block, asked.precision, chosen.reduction)

        x = x1 if x2 is None else torch.cat([x1, x2])
        self._x = network.input(x)
        self._plan = plan_blocks(planned, max(len(x1), len(x) - len(x1)))
        self._network = join_biases(network, self._plan)
        self._groups = groups
        self._factor_groups = factor_groups(self._network, self._plan, groups or ())
        size = self._plan.sizes.block_samples
        self._rows = Block(0, len(x1)).pieces(size)
        self._columns = self._rows if x2 is None else Block(len(x1), len(x)).pieces(size)
        self._kept: dict[int, JointFactors] = {}
        self._logits = torch.empty(
            len(x), self.num_logits, dtype=network.precision.compute_dtype, device=network.device
        )

    def __repr__(self) -> str:
        """Say the size and the precision."""
        rows, columns = (blocks[-1].stop - blocks[0].start for blocks in (self._rows, self._columns))
        return f"<KernelFunction of {rows} × {columns} samples, {self._plan.precision}>"

    @property
    def num_logits(self) -> int:
        """Number of outputs of the network."""
        return self._network.profile.num_logits

    @property
    def logits(self) -> Tensor:  # (n₁, logits)
        """Outputs of the network on the samples of the rows in the last call, f(x1)."""
        return self._logits[: self._rows[-1].stop].clone()

    @property
    def layers(self) -> list[str]:
        """Names of the groups in the dictionary of a call, in the same order; empty without ``per_layer``."""
        return [group.name for group in self._groups or ()]

    def __call__(
        self, state: nn.Module | Mapping[str, Any], *, prove: bool = False
    ) -> Tensor | dict[str, Tensor]:  # each (n₁ m, n₂ m), (n₁, n₂) for the output trace, (m, n₁, n₂) for diagonal
        """Compute the kernel for the parameters and buffers of a module or of a state dict.

        Args:
            state: A network of the same architecture, or its state dict.
            prove: Whether every batch is compared with autograd again.

        Returns:
            The kernel. With ``per_layer``, a dictionary with the kernel of each group of trainable parameters.

        Raises:
            InputError: If the state is that of another architecture, or ties, hooks or an attribute of a module have
                changed.
            ShapeError: If a tensor has another shape.
            DivergedError: If outputs of the network are not finite.
            PreparedRuleError: If a layer is called in another way than in the constructor, or if ``prove`` finds that
                the rule of a layer is wrong.
        """
        with exact_arithmetic(self._network.device):
            self._loader.load(state)
            if isinstance(state, nn.Module):
                self._require_same_attributes(state)
            factors = BlockCache(lambda block: self._factors(block, prove=prove), NUM_BLOCKS_HELD)
            try:
                if self._groups is None:
                    return fill_kernel(self._rows, self._columns, factors, self._plan)
                kernels = fill_kernels(self._rows, self._columns, factors, self._plan, self._factor_groups)
            except RuleError as error:
                raise PreparedRuleError(error.params) from error
        return {group.name: kernel for group, kernel in zip(self._groups, kernels, strict=True)}

    def _require_same_attributes(self, model: nn.Module) -> None:
        """Refuse a network whose forward pass may be another one than that of our copy.

        Raises:
            InputError: If the class or an attribute of a module differs.
        """
        known, now = self._attributes, without(attributes_of(model), self._changing)
        if self._loader.has_extra_state:  # which may hold attributes, and is loaded
            ours = attributes_of(self._network.module)
            known = {key: ours[key] for key in [*known, *now] if key in ours}
        found = first_difference(known, now)
        if found is not None:
            name, expected, other = found
            raise InputError(
                f"The network is another one than this kernel function was prepared with: expected {name} {expected}, "
                f"found {other}. The forward pass may depend on it, and the kernel would be that of the old one. Was "
                "another head or another mode chosen? Prepare a new KernelFunction. If it is only a counter, pass "
                "model.state_dict(), which has no attributes."
            )

    def _factors(self, block: Block, *, prove: bool) -> BlockFactors:
        """Compute the factors of a block, in the memory of the last call where all blocks fit."""
        joint = self._kept.get(block.start)
        if joint is None:
            joint = JointFactors(self._network, self._plan, len(block))
            if len({*self._rows, *self._columns}) <= NUM_BLOCKS_HELD:
                self._kept[block.start] = joint
        factors = joint(self._x[block.start : block.stop], prove=prove)
        self._logits[block.start : block.stop] = factors.logits
        return factors
