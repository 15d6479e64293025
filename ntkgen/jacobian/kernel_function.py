"""The kernel of fixed samples as a function of a network's parameters: `ntkgen.KernelFunction`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.blocks import Block
from ntkgen.errors import RuleError
from ntkgen.jacobian.batches import ArrayLike, checked_batches
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.compute import empty_factors, fill_factors
from ntkgen.jacobian.contract import fill_kernel, fill_kernels
from ntkgen.jacobian.cost import USUAL_RATES, JacobianPlan
from ntkgen.jacobian.dense import Request, plan_ntk
from ntkgen.jacobian.factors import BlockFactors
from ntkgen.jacobian.network import Network, more_excluded
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.jacobian.reals import count_real_numbers
from ntkgen.jacobian.reference import trainable
from ntkgen.jacobian.state import StateLoader

# Maximum number of samples per forward pass.
BATCH_SIZE = 256
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
    the constructor, or if outputs are not finite. If the parameters decide how a sample is treated, as in a network
    that routes samples to experts, call the function with ``prove=True``. The block sizes and the order of
    multiplication depend only on the sizes of the network. Equal parameters therefore give equal bits in every process
    on one machine.

    Args:
        model: The network. It must map (samples, …) to (samples, outputs) and treat samples one by one.
        x1: The samples of the rows.
        x2: The samples of the columns. By default these are the samples of the rows.
        output: The output map, as for `ntkgen.ntk`.
        precision: The precision of the computation, as for `ntkgen.ntk`.
        per_layer: Whether a call returns a dictionary with one kernel per module that has parameters. Their sum is the
            kernel.

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

    def __init__(
        self,
        model: nn.Module,
        x1: ArrayLike,  # (n₁, …)
        x2: ArrayLike | None = None,  # (n₂, …)
        *,
        output: str = "full",
        precision: str = "float32",
        per_layer: bool = False,
    ) -> None:
        rows, columns = checked_batches(x1, x2)
        asked = Request(output, precision)
        while True:
            self._plan = plan_ntk(model, rows, columns, asked, rates=USUAL_RATES, batch_size=BATCH_SIZE)
            self._kept: dict[Block, BlockFactors] = {}
            network = self._plan.network
            self._logits = torch.empty(
                len(self._plan.x), self.num_logits, dtype=network.precision.compute_dtype, device=network.device
            )
            try:
                self._prove()
                break
            except RuleError as error:
                asked = dataclasses.replace(asked, excluded=more_excluded(asked.excluded, error))
        self._loader = StateLoader(self._plan.network.module)
        self._groups = parameter_groups(self._plan.network, self._plan.jacobian) if per_layer else None

    def __repr__(self) -> str:
        """Say the size and the precision."""
        rows, columns = (blocks[-1].stop - blocks[0].start for blocks in (self._plan.rows, self._plan.columns))
        return f"<KernelFunction of {rows} × {columns} samples, {self._plan.jacobian.precision}>"

    @property
    def num_logits(self) -> int:
        """Number of outputs of the network."""
        return self._plan.network.profile.num_logits

    @property
    def logits(self) -> Tensor:  # (n₁, logits)
        """Outputs of the network on the samples of the rows in the last call, f(x1)."""
        return self._logits[: self._plan.rows[-1].stop].clone()

    @property
    def layers(self) -> list[str]:
        """Names of the modules in the dictionary of a call, in the same order; empty without ``per_layer``."""
        return [group.name for group in self._groups or ()]

    def __call__(
        self, state: nn.Module | Mapping[str, Any], *, prove: bool = False
    ) -> Tensor | dict[str, Tensor]:  # each (n₁ m, n₂ m), (n₁, n₂) for the output trace, (m, n₁, n₂) for diagonal
        """Compute the kernel for the parameters and buffers of a module or of a state dict.

        Args:
            state: A network of the same architecture, or its state dict.
            prove: Whether every batch is compared with autograd again.

        Returns:
            The kernel. With ``per_layer``, a dictionary with the kernel of each module that has trainable parameters.

        Raises:
            InputError: If the state is that of another architecture.
            ShapeError: If a tensor has another shape.
            DivergedError: If outputs of the network are not finite.
            RuleError: If a layer is called in another way than in the constructor, or if ``prove`` finds that the rule
                of a layer is wrong.
        """
        plan = self._plan
        with exact_arithmetic(plan.network.device):
            self._loader.load(state)
            factors = BlockCache(lambda block: self._factors(block, prove=prove), NUM_BLOCKS_HELD)
            if self._groups is None:
                return fill_kernel(plan.rows, plan.columns, factors, plan.jacobian)
            parts = [group.of for group in self._groups]
            kernels = fill_kernels(plan.rows, plan.columns, factors, plan.jacobian, parts)
        return {group.name: kernel for group, kernel in zip(self._groups, kernels, strict=True)}

    def _prove(self) -> None:
        with exact_arithmetic(self._plan.network.device):
            for block in dict.fromkeys([*self._plan.rows, *self._plan.columns]):
                self._factors(block, prove=True)

    def _factors(self, block: Block, *, prove: bool) -> BlockFactors:
        """Compute the factors of a block, in the memory of the last call where all blocks fit."""
        plan = self._plan
        factors = self._kept.get(block)
        if factors is None:
            factors = empty_factors(plan.network, plan.jacobian, len(block))
            if len({*plan.rows, *plan.columns}) <= NUM_BLOCKS_HELD:
                self._kept[block] = factors
        fill_factors(factors, plan.network, plan.jacobian, plan.x[block.start : block.stop], prove=prove)
        self._logits[block.start : block.stop] = factors.logits
        return factors


@dataclass(frozen=True)
class ParameterGroup:
    """The trainable parameters of one module, and the positions of their factors among the factors of a block.

    Attributes:
        name: Path of the module, empty for the network itself.
        columns: Numbers of the kept Jacobian rows that belong to these parameters.
    """

    name: str
    columns: tuple[slice, ...]

    def of(self, block: BlockFactors) -> BlockFactors:
        """Take this group's factors of a block."""
        parts = [block.rows[..., part] for part in self.columns]
        rows = parts[0] if len(parts) == 1 else torch.cat([block.rows[..., :0], *parts], dim=-1)
        return BlockFactors(block.logits, rows, tuple(p for p in block.pairs if p.plan.shape.name == self.name))


def parameter_groups(network: Network, plan: JacobianPlan) -> list[ParameterGroup]:
    """Divide the trainable parameters among their modules, in the order in which rows are kept."""
    in_pairs = {layer.shape.name for layer in plan.layers if not layer.keeps_rows}
    own, columns, start = trainable(network.module), dict[str, list[slice]](), 0

    def add(module: str, numbers: int) -> None:
        nonlocal start
        columns.setdefault(module, []).append(slice(start, start + numbers))
        start += numbers

    for layer in network.layers:
        matrix = layer.rule.matrix if layer.name in in_pairs else None
        add(layer.name, sum(own[layer.full_name(name)].numel() for name in layer.params() if name != matrix))
    for name in network.fallback:
        add(name.rpartition(".")[0], count_real_numbers([own[name]]))
    return [ParameterGroup(name, tuple(parts)) for name, parts in columns.items()]
