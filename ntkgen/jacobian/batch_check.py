"""The check of one batch: its factors agree with autograd, and its samples do not depend on each other.

The trial of a network (`probe.py`) uses a few samples only. A network may route, sort or replace samples by their
content, and then a later batch behaves differently. Every batch is therefore checked by value. The check costs one
forward pass and one backward pass.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ntkgen.errors import DivergedError, RuleError
from ntkgen.jacobian.cost import JacobianPlan
from ntkgen.jacobian.coverage import TOLERANCES, Claim, Claims, draw_weights, hold_against_autograd, rows_product
from ntkgen.jacobian.evaluation import outputs_of
from ntkgen.jacobian.factors import BlockFactors, PairFactor
from ntkgen.jacobian.layers import Layer
from ntkgen.jacobian.network import Network, use_shapes
from ntkgen.jacobian.probe import is_one_by_one, require_form, require_same_outputs
from ntkgen.jacobian.reals import count_real_numbers
from ntkgen.jacobian.recording import Recording


def require_planned_uses(network: Network, recording: Recording) -> None:
    """Refuse a batch in which the outputs, or the calls of a layer, differ from the plan in number, samples or shapes.

    Raises:
        DivergedError: If the outputs are not finite.
        ModelError: If the outputs have another shape or dtype.
        RuleError: If the calls of a layer differ. The error names its parameters.
    """
    require_form(recording.outputs, network.profile.num_logits, network.precision.compute_dtype)
    require_finite(recording.outputs)
    batch_size = len(recording.outputs)
    deviating = [
        layer
        for layer in network.layers
        if not is_one_by_one(recording.uses.get(layer.name, []), batch_size)
        or use_shapes(recording, layer) != network.use_shapes[layer.name]
    ]
    if deviating:
        raise RuleError(layer.full_name(param) for layer in deviating for param in layer.params())


def require_finite(outputs: Tensor) -> None:
    """Refuse outputs that are not finite.

    Raises:
        DivergedError: If an output is infinite or NaN.
    """
    if not outputs.isfinite().all():
        raise DivergedError(
            "The network's outputs are not finite: expected numbers, found infinity or NaN in some batch. Has its "
            "training diverged, or do some samples have values that are not finite? Use parameters from before, or "
            "leave these samples out."
        )


def has_true_factors(
    network: Network, plan: JacobianPlan, recording: Recording, block: BlockFactors, batch: slice
) -> bool:
    """Compare the stored factors of a batch with autograd, and free the graph.

    Returns:
        Whether the rows that are left to autograd are right too, if they were computed for several samples at once.

    Raises:
        RuleError: If some factors differ by more than rounding explains. The error names the parameters.
    """
    together = () if plan.fallback_way == "one by one" else network.fallback
    if not network.layers and not together:
        return True
    weights = draw_weights(recording.outputs, recording.count)
    claims = kept_claims(network, block, batch, weights[: recording.count], together)
    known = network.params
    params = {name: known[name] for layer in network.layers for name in _names(layer, layer.params())}
    params |= {name: known[name] for name in together}
    tolerance = max(TOLERANCES[network.precision.compute_dtype], TOLERANCES[network.precision.factor_dtype])
    findings = hold_against_autograd(recording.outputs, weights, params, claims, tolerance)
    if wrong := findings.disproved.difference(together):
        raise RuleError(name for name in params if name in wrong)
    return not findings.disproved


def require_same_in_other_batches(
    network: Network,
    x: Tensor,  # (samples, …), a block
    logits: Tensor,  # (samples, logits), computed in the batches of the plan
    batch_size: int,
) -> None:
    """Refuse a network whose outputs change when the samples are batched differently.

    The samples are run again in random order, in batches that are a third larger. Larger batches take less time than
    smaller ones. A block that fits into one batch is run again in two halves.

    Raises:
        ModelError: If outputs differ by more than rounding explains.
    """
    if batch_size == 1:
        return
    order = torch.randperm(len(x), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    size = batch_size + -(-batch_size // 3) if len(x) > batch_size else max(1, len(x) // 2)
    with torch.no_grad():
        for part in order.split(size):
            outputs = outputs_of(network.module, network.input(x[part.to(x.device)]))
            require_same_outputs(logits[part.to(logits.device)], outputs, batch_size)


def _names(layer: Layer, params: Iterable[str]) -> list[str]:
    return [layer.full_name(param) for param in params]


def kept_claims(
    network: Network,
    block: BlockFactors,
    batch: slice,
    weights: Tensor,  # (samples, outputs)
    together: Sequence[str],
) -> Claims:
    """Compute the weighted gradient from the stored factors of a batch, parameter by parameter."""
    sizes = {name: count_real_numbers([param]) for name, param in network.params.items()}
    pairs = {pair.plan.shape.name: pair for pair in block.pairs}
    rows = _weighted(block.rows[batch], weights).sum(0)  # (row parameters,)
    claims: dict[str, list[Claim]] = {}
    column = 0

    def add(names: Iterable[str], found: Iterable[Claim]) -> None:
        for name, claim in zip(names, found, strict=False):
            claims.setdefault(name, []).append(claim)

    for layer in network.layers:
        if layer.name in pairs:
            found = _pair_claims(pairs[layer.name], batch, weights, network.directions[layer.name])
            found[0] = dataclasses.replace(found[0], positions=layer.positions)
            add(_names(layer, layer.of_matrix), found)
            own = _names(layer, layer.vectors)
        elif layer.joined is not None:
            matrix, bias = _names(layer, layer.of_matrix)
            size = sizes[matrix] + sizes[bias]
            with_bias = rows[column : column + size].view(sizes[bias], -1)
            of_matrix = Claim(with_bias[:, :-1].flatten(), positions=layer.positions)
            add([matrix, bias], [of_matrix, Claim(with_bias[:, -1])])
            column += size
            own = _names(layer, layer.vectors)
        else:
            own = _names(layer, layer.vectors)
            if layer.has_matrix:
                (matrix,) = _names(layer, layer.of_matrix)
                size = sizes[matrix] if layer.positions is None else len(layer.positions)
                add([matrix], [Claim(rows[column : column + size], positions=layer.positions)])
                column += size
        for name in own:
            add([name], [Claim(rows[column : column + sizes[name]])])
            column += sizes[name]
    for name in together:
        add([name], [Claim(rows[column : column + sizes[name]])])
        column += sizes[name]
    return claims


def _pair_claims(pair: PairFactor, batch: slice, weights: Tensor, directions: Tensor) -> list[Claim]:
    """Compute the claims for the matrix, and for a bias that is joined to it."""
    inputs, cotangents = pair.inputs[batch].to(weights.dtype), _weighted(pair.cotangents[batch], weights)
    if pair.windows is not None:
        return [Claim(rows_product(cotangents, pair.windows.project(inputs, directions)), directions)]
    positions_first = inputs.mT if pair.plan.order == "explicit" else inputs  # (samples, groups, positions, k)
    matrix, bias = positions_first.tensor_split([directions.shape[1]], dim=-1)
    claims = [Claim(rows_product(cotangents, matrix @ directions), directions)]
    return [*claims, Claim(rows_product(cotangents, bias).flatten())] if bias.shape[-1] else claims


def _weighted(
    values: Tensor,  # (samples, outputs, …)
    weights: Tensor,  # (samples, outputs)
) -> Tensor:  # (samples, …)
    """Sum over the outputs with a weight for each sample and output."""
    if values.dtype == weights.dtype:
        return (weights.unsqueeze(1) @ values.flatten(2)).view(len(values), *values.shape[2:])
    total = weights.new_zeros(len(values), *values.shape[2:])
    ones = [1] * (values.ndim - 2)
    for output in range(values.shape[1]):  # to process all outputs at once would need a copy of the factors
        total += weights[:, output].view(-1, *ones) * values[:, output]
    return total
