"""What is kept of a block of samples: dense Jacobian rows, or (inputs, cotangents), per layer."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkgen.jacobian.capture import cotangents, record
from ntkgen.jacobian.cost import JacobianPlan, LayerPlan
from ntkgen.jacobian.network import Network, param_rows
from ntkgen.jacobian.reference import jacobian_rows, trainable
from ntkgen.kernel.tiles import Block


@dataclass(frozen=True)
class PairFactor:
    """The inputs and cotangents of one layer."""

    plan: LayerPlan
    inputs: Tensor  # (samples, groups, positions, k)
    cotangents: Tensor  # (samples, outputs, groups, positions, c)


@dataclass(frozen=True)
class BlockFactors:
    """Everything that is kept of a block of samples: what its products with other blocks are made of."""

    logits: Tensor  # (samples, outputs)
    rows: Tensor  # (samples, outputs, row parameters)
    pairs: tuple[PairFactor, ...]

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.logits)


class FactorCache:
    """The factors of the blocks used last. A product uses two blocks, so two is the least that serves several."""

    def __init__(self, network: Network, plan: JacobianPlan, x: Tensor, capacity: int) -> None:
        assert capacity >= 1
        self._network, self._plan, self._x, self._capacity = network, plan, x, capacity
        self._held: OrderedDict[Block, BlockFactors] = OrderedDict()

    def __call__(self, block: Block) -> BlockFactors:
        """Look up a block's factors, or compute them, dropping the block that was used longest ago first."""
        if block not in self._held:
            if len(self._held) >= self._capacity:
                self._held.popitem(last=False)
            self._held[block] = compute_factors(self._network, self._plan, self._x[block.start : block.stop])
        self._held.move_to_end(block)
        return self._held[block]


def compute_factors(
    network: Network,
    plan: JacobianPlan,
    x: Tensor,  # (samples, …)
) -> BlockFactors:
    """Compute the factors of a block of samples, batch by batch.

    A ragged batch is padded with its last sample, so that every pass has the same shape and a sample's factors have the
    same bits whichever tile asks for them.
    """
    block = _empty_factors(network, plan, len(x))
    for batch in Block(0, len(x)).pieces(plan.batch_size):
        _fill_batch(block, network, plan, slice(batch.start, batch.stop), network.input(x[batch.start : batch.stop]))
    return block


def _empty_factors(network: Network, plan: JacobianPlan, samples: int) -> BlockFactors:
    m = plan.num_outputs

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=network.precision.compute_dtype, device=network.device)

    pairs = []
    for layer in plan.layers:
        if not layer.keeps_rows:
            q, t = layer.shape.groups, layer.shape.positions
            inputs, grads = empty(samples, q, t, layer.shape.inputs), empty(samples, m, q, t, layer.shape.channels)
            pairs.append(PairFactor(layer, inputs, grads))
    return BlockFactors(empty(samples, m), empty(samples, m, plan.row_numbers // m), tuple(pairs))


def _fill_batch(block: BlockFactors, network: Network, plan: JacobianPlan, batch: slice, samples: Tensor) -> None:
    """Run one batch, padded, and write its factors to their place in the block."""
    padding = samples[-1:].expand(plan.batch_size - len(samples), *samples.shape[1:])
    recording = record(network.module, network.layer_modules, torch.cat([samples, padding]), len(samples))
    block.logits[batch] = recording.outputs[: recording.count].detach()
    pairs = {pair.plan.shape.name: pair for pair in block.pairs}
    for layer in network.layers:
        if layer.name in pairs:
            parts = [layer.rule.inputs(layer.module, use.x) for use in recording.uses[layer.name]]
            pairs[layer.name].inputs[batch] = torch.cat(parts, dim=2)
    for output, grads in enumerate(cotangents(recording)):
        column = 0
        for layer in network.layers:
            for param in layer.params():
                if param == layer.rule.matrix and layer.name in pairs:
                    parts = [layer.rule.cotangents(layer.module, grad) for grad in grads[layer.name]]
                    pairs[layer.name].cotangents[batch, output] = torch.cat(parts, dim=2)
                    continue
                rows = param_rows(layer, param, recording.uses[layer.name], grads[layer.name])
                block.rows[batch, output, column : column + rows.shape[1]] = rows
                column += rows.shape[1]
    if network.fallback:
        params = {name: value for name, value in trainable(network.module).items() if name in network.fallback}
        for index, sample in zip(range(batch.start, batch.stop), samples, strict=True):  # one sample's rows at a time
            block.rows[index, :, column:] = jacobian_rows(network.module, params, sample[None])[0]
