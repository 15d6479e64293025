"""The factors of a block of samples, computed and checked batch by batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkgen.blocks import Block
from ntkgen.jacobian.batch_check import has_true_factors, require_planned_uses, require_same_in_other_batches
from ntkgen.jacobian.capture import cotangents, record
from ntkgen.jacobian.cost import JacobianPlan, LayerPlan
from ntkgen.jacobian.evaluation import without_kept_graphs
from ntkgen.jacobian.factors import BlockFactors, PairFactor
from ntkgen.jacobian.fallback import fallback_rows
from ntkgen.jacobian.following import pulled_rows
from ntkgen.jacobian.independence import require_same_alone
from ntkgen.jacobian.layers import Layer, sum_over_uses
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.products import rows_of
from ntkgen.jacobian.recording import Recording
from ntkgen.jacobian.windows import pixels_of


def compute_factors(
    network: Network,
    plan: JacobianPlan,
    x: Tensor,  # (samples, …)
) -> BlockFactors:
    """Compute the factors of a block of samples, batch by batch.

    An incomplete last batch is padded with its last sample, so that every pass has the same shape. The bits of a
    sample's factors then do not depend on the tile that uses them.
    """
    block = empty_factors(network, plan, len(x))
    fill_factors(block, network, plan, x)
    return block


def fill_factors(
    block: BlockFactors,
    network: Network,
    plan: JacobianPlan,
    x: Tensor,  # (samples, …)
    *,
    prove: bool = True,
) -> None:
    """Compute the factors of as many samples as a block has room for, batch by batch.

    Args:
        block: What is written.
        network: The network.
        plan: The plan.
        x: The samples.
        prove: Whether each batch is compared with autograd and with other batches. Without it a batch is still refused
            in which a layer is called otherwise than planned.
    """
    with without_kept_graphs():
        for batch in Block(0, len(x)).pieces(plan.batch_size):
            part = slice(batch.start, batch.stop)
            samples = network.input(x[part])
            recording = _fill_batch(block, network, plan, part, samples)
            fill_fallback(block, network, plan, part, samples)
            if prove and not has_true_factors(network, plan, recording, block, part):
                fill_fallback(block, network, plan.one_by_one, part, samples)
            del recording  # and with it the graph
        if prove:
            require_same_in_other_batches(network, x, block.logits, plan.batch_size)
            require_same_alone(network, x, block, plan.batch_size)


def empty_factors(network: Network, plan: JacobianPlan, samples: int) -> BlockFactors:
    """Allocate the factors of some samples."""
    m = plan.num_outputs

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=network.precision.factor_dtype, device=network.device)

    pairs = []
    for layer in plan.layers:
        if not layer.keeps_rows:
            shape = layer.shape
            inputs = empty(samples, shape.groups, *_kept_inputs(layer))
            grads = empty(samples, m, shape.groups, shape.channels, shape.positions)
            windows = network.windows[shape.name] if layer.uses_pixels else None
            pairs.append(PairFactor(layer, inputs, grads, windows))
    logits = torch.empty(
        samples, network.profile.num_logits, dtype=network.precision.compute_dtype, device=network.device
    )
    return BlockFactors(logits, empty(samples, m, plan.row_numbers // m), tuple(pairs))


def _kept_inputs(layer: LayerPlan) -> tuple[int, int]:
    shape = layer.shape
    if layer.uses_pixels:
        return shape.pixels, shape.inputs // shape.taps
    return (shape.inputs, shape.positions) if layer.order == "explicit" else (shape.positions, shape.inputs)


def pad_batch(samples: Tensor, batch_size: int) -> Tensor:
    """Pad an incomplete batch with its last sample."""
    return torch.cat([samples, samples[-1:].expand(batch_size - len(samples), *samples.shape[1:])])


def _fill_batch(block: BlockFactors, network: Network, plan: JacobianPlan, batch: slice, samples: Tensor) -> Recording:
    """Run one padded batch, and write the factors of its layers into the block."""
    padded = pad_batch(samples, plan.batch_size)
    recording = record(network.module, network.layer_modules, padded, len(samples), network.following.recording)
    block.logits[batch] = recording.outputs[: recording.count].detach()
    require_planned_uses(network, recording)
    recording.outputs = network.mapped(recording.outputs)
    pairs = {pair.plan.shape.name: pair for pair in block.pairs}
    inputs: dict[str, list[Tensor]] = {}  # of the layers whose rows are kept, in the dtype of the sums
    wide = network.precision.accumulate_dtype
    for layer in network.layers:
        if not layer.has_matrix:
            continue
        if layer.name in pairs:
            _fill_inputs(pairs[layer.name], layer, recording, batch)
        else:
            inputs[layer.name] = [_positions_last(layer, use.x).to(wide) for use in recording.uses[layer.name]]
    for output, grads in enumerate(cotangents(recording)):
        column, pulled = 0, pulled_rows(recording.uses, grads)
        for layer in network.layers:
            g = grads[layer.name]
            if layer.name in pairs:
                parts = [layer.rule.cotangents(layer.module, grad).mT for grad in g]
                pairs[layer.name].cotangents[batch, output] = _joined(parts, 3)
            found = (
                [pulled[layer.name]]
                if layer.name in pulled
                else _layer_rows(layer, recording, g, inputs.get(layer.name, ()), plan.rates.route)
            )
            for rows in found:
                block.rows[batch, output, column : column + rows.shape[1]] = rows
                column += rows.shape[1]
    return recording


def fill_fallback(block: BlockFactors, network: Network, plan: JacobianPlan, batch: slice, samples: Tensor) -> None:
    """Form the rows of the parameters without a rule. They are the last of the kept rows."""
    if not network.fallback:
        return
    start = batch.start
    for part in samples.split(plan.fallback_samples):
        rows = fallback_rows(network.module, network.fallback, part, network.transform, plan.fallback_way)
        block.rows[start : start + len(part), :, block.rows.shape[2] - rows.shape[2] :] = rows
        start += len(part)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _positions_last(layer: Layer, x: Tensor) -> Tensor:  # (samples, groups, k, T)
    return layer.rule.inputs(layer.module, x).mT.contiguous()


def _fill_inputs(pair: PairFactor, layer: Layer, recording: Recording, batch: slice) -> None:
    uses = recording.uses[layer.name]
    if pair.plan.uses_pixels:
        pair.inputs[batch] = pixels_of(layer.module, uses[0].x)
        return
    parts = _joined([layer.rule.inputs(layer.module, use.x) for use in uses], 2)
    pair.inputs[batch] = parts.mT if pair.plan.order == "explicit" else parts


def _layer_rows(
    layer: Layer, recording: Recording, grads: list[Tensor], inputs: Sequence[Tensor], route: str
) -> list[Tensor]:  # each (samples, parameter)
    """Form the rows of a layer for one output, summed over its uses. Without inputs the matrix is left out."""
    rows = []
    if inputs:
        rows.append(
            sum_over_uses(
                rows_of(layer.rule.cotangents(layer.module, grad).mT.to(a.dtype), a, route).flatten(1)
                for grad, a in zip(grads, inputs, strict=True)
            )
        )
    for vector in layer.vectors:
        rule = layer.rule.vectors[vector]
        uses = recording.uses[layer.name]
        rows.append(sum_over_uses(rule(layer.module, use.x, grad) for use, grad in zip(uses, grads, strict=True)))
    return rows
