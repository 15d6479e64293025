"""The proof of one batch: its factors are what autograd gives, and its samples do not depend on each other.

What holds for the few samples that a network was tried on need not hold for the next batch: a network may route, sort
or replace samples by their content. So every batch is checked by value, at the cost of a forward pass and a backward
pass.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ntkgen.errors import DivergedError, RuleError
from ntkgen.jacobian.capture import Recording
from ntkgen.jacobian.coverage import TOLERANCES, Claim, draw_weights, hold_against_autograd, rows_product
from ntkgen.jacobian.evaluation import outputs_of
from ntkgen.jacobian.factors import BlockFactors, PairFactor
from ntkgen.jacobian.layers import Layer
from ntkgen.jacobian.network import Network, use_shapes
from ntkgen.jacobian.probe import is_one_by_one, require_same_outputs


def require_planned_uses(network: Network, recording: Recording) -> None:
    """Refuse a batch in which a layer is not called as it was planned: as often, with all samples, in these shapes.

    Raises:
        DivergedError: If the outputs are not finite.
        RuleError: If a layer is called otherwise; it names the parameters.
    """
    require_finite(recording.outputs)
    batch_size = len(recording.outputs)
    otherwise = [
        layer
        for layer in network.layers
        if not is_one_by_one(recording.uses.get(layer.name, []), batch_size)
        or use_shapes(recording, layer) != network.use_shapes[layer.name]
    ]
    if otherwise:
        raise RuleError(layer.full_name(param) for layer in otherwise for param in layer.params())


def require_finite(outputs: Tensor) -> None:
    """Refuse outputs that are not finite.

    Raises:
        DivergedError: If there are such.
    """
    if not outputs.isfinite().all():
        raise DivergedError(
            "The network's outputs are not finite: expected numbers, found infinity or NaN in some batch. Do some "
            "samples have values that are not finite, or are they far from those that it was trained on? Leave them "
            "out, or repair them."
        )


def require_true_factors(network: Network, recording: Recording, block: BlockFactors, batch: slice) -> None:
    """Compare the factors of a batch, as they are kept, with autograd; frees the graph.

    Raises:
        RuleError: If some of them differ by more than rounding explains; it names the parameters.
    """
    if not network.layers:
        return
    weights = draw_weights(recording.outputs, recording.count)
    claims = _kept_claims(network, block, batch, weights[: recording.count])
    params = {name: param for layer in network.layers for name, param in _params(layer)}
    tolerance = max(TOLERANCES[network.precision.compute_dtype], TOLERANCES[network.precision.factor_dtype])
    found = hold_against_autograd(recording.outputs, weights, params, claims, tolerance)
    if found.disproved:
        raise RuleError(name for name in params if name in found.disproved)


def require_same_in_other_batches(
    network: Network,
    x: Tensor,  # (samples, …), a block
    logits: Tensor,  # (samples, logits), as they were in its batches
    batch_size: int,
) -> None:
    """Refuse a network whose outputs are others in other batches: of another size, in random order.

    The other batches are a third larger, which takes less time than smaller ones, or halves of a block that is one
    batch.

    Raises:
        ModelError: If outputs differ by more than rounding explains.
    """
    if batch_size == 1:
        return
    order = torch.randperm(len(x), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    size = batch_size + -(-batch_size // 3) if len(x) > batch_size else max(1, len(x) // 2)
    with torch.no_grad():
        for part in order.split(size):
            otherwise = outputs_of(network.module, network.input(x[part.to(x.device)]))
            require_same_outputs(logits[part.to(logits.device)], otherwise, batch_size)


def _params(layer: Layer) -> list[tuple[str, nn.Parameter]]:
    return [(layer.full_name(param), getattr(layer.module, param)) for param in layer.params()]


def _kept_claims(
    network: Network,
    block: BlockFactors,
    batch: slice,
    weights: Tensor,  # (samples, outputs)
) -> Mapping[str, Claim]:
    """Collect what the kept factors of a batch say of the weighted gradient, in the order in which rows are kept."""
    pairs = {pair.plan.shape.name: pair for pair in block.pairs}
    rows = _weighted(block.rows[batch], weights).sum(0)  # (row parameters,)
    claims, column = {}, 0
    for layer in network.layers:
        for name, param in _params(layer):
            if layer.name in pairs and param is getattr(layer.module, layer.rule.matrix or "", None):
                claims[name] = _pair_claim(pairs[layer.name], batch, weights, network.directions[layer.name])
            else:
                claims[name] = Claim(rows[column : column + param.numel()])
                column += param.numel()
    return claims


def _pair_claim(pair: PairFactor, batch: slice, weights: Tensor, directions: Tensor) -> Claim:
    inputs, cotangents = pair.inputs[batch].to(weights.dtype), _weighted(pair.cotangents[batch], weights)
    if pair.windows is not None:
        projected = pair.windows.project(inputs, directions)
    else:
        positions_first = inputs.mT if pair.plan.order == "explicit" else inputs  # (samples, groups, positions, k)
        projected = positions_first @ directions
    return Claim(rows_product(cotangents, projected), directions)


def _weighted(
    values: Tensor,  # (samples, outputs, …)
    weights: Tensor,  # (samples, outputs)
) -> Tensor:  # (samples, …)
    """Sum over the outputs with a weight for each sample and output."""
    if values.dtype == weights.dtype:
        return (weights.unsqueeze(1) @ values.flatten(2)).view(len(values), *values.shape[2:])
    total = weights.new_zeros(len(values), *values.shape[2:])
    ones = [1] * (values.ndim - 2)
    for output in range(values.shape[1]):  # all outputs at once would need a copy of the factors
        total += weights[:, output].view(-1, *ones) * values[:, output]
    return total
