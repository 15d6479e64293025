"""The factors of a block for all outputs at once, in memory that is kept: for kernels that are computed repeatedly.

`compute.py` treats one output after the other, which takes the least memory for a large network. Here the work per
call is small, because a small network spends most of its time on calls:

- A network of vectors has one backward pass for all outputs, by `torch.vmap` over the cotangents of the outputs.
- The Jacobian rows of a layer are built for all outputs in one product.
- The bias of a layer is the last column of its weight matrix, for an additional input of one.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ntkgen.blocks import Block
from ntkgen.jacobian.batch_check import has_true_factors, require_planned_uses, require_same_in_other_batches
from ntkgen.jacobian.capture import cotangents, record
from ntkgen.jacobian.choice import candidates, order_nanoseconds
from ntkgen.jacobian.compute import empty_factors, fill_fallback
from ntkgen.jacobian.cost import (
    KEPT_PARAMS,
    USUAL_RATES,
    JacobianPlan,
    LayerPlan,
    LayerShape,
    Reduction,
    sizes_for,
)
from ntkgen.jacobian.evaluation import without_kept_graphs
from ntkgen.jacobian.factors import BlockFactors
from ntkgen.jacobian.following import Part, pulled_rows
from ntkgen.jacobian.independence import require_same_alone
from ntkgen.jacobian.layers import CONVOLUTION, Convolution, Layer, sum_over_uses, windows_first
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.products import rows_of, usual_route
from ntkgen.jacobian.recording import Recording
from ntkgen.jacobian.together import pull_together, zeros_for
from ntkgen.jacobian.windows import pixels_of

# Maximum number of samples per forward pass.
BATCH_SIZE = 256
# Maximum number of numbers that a batch holds for the layers whose rows are kept.
BATCH_NUMBERS = 1 << 26
# Time of the calls of the order `ordered`, per pair of samples. It has one product per sample and panel.
ORDERED_CALLS = 2_500
# Rows of a product that are computed together. A symmetric kernel is computed from its diagonal on.
PANEL_ROWS = 64
# Maximum number of numbers in the rows that are built for a product. They should fit into a cache.
BUILT_NUMBERS = 1 << 20

# The gradients of some outputs with respect to the uses of each layer, each (outputs, samples, …).
Gradients = dict[str, list[Tensor]]


def plan_jointly(network: Network, block: int, precision: str, reduction: Reduction) -> JacobianPlan:
    """Choose the order of each layer by its sizes, with a joined bias where the order permits it.

    Args:
        network: The network.
        block: Number of samples of a block.
        precision: Name of the precision policy.
        reduction: How the m × m blocks of the kernel are reduced.
    """
    profile, m = network.profile, network.profile.num_outputs
    joined = {layer.name for layer in network.layers if layer.with_joined_bias().joined is not None}
    layers = tuple(_choose(s, m, block, reduction, has_bias=s.name in joined) for s in profile.layers)
    biases = sum(plan.shape.num_params - s.num_params for plan, s in zip(layers, profile.layers, strict=True))
    rows = m if reduction == "none" else 1
    sizes = sizes_for(network.device.type, block, BATCH_SIZE)
    sizes = dataclasses.replace(
        sizes,
        panel_samples=min(block, max(1, PANEL_ROWS // rows)),
        rows_numbers=max(BUILT_NUMBERS, 2 * KEPT_PARAMS * block * m),
    )
    return JacobianPlan(
        precision=precision,
        num_outputs=m,
        layers=layers,
        dense_params=profile.dense_params - biases,
        fallback=profile.fallback,
        sizes=sizes,
        rates=dataclasses.replace(USUAL_RATES, route=usual_route(network.device)),
        fallback_way=profile.fallback_way,
        fallback_samples=profile.fallback_samples,
        reduction=reduction,
    )


def join_biases(network: Network, plan: JacobianPlan) -> Network:
    """Join the biases to the matrices that have an additional input in the plan."""
    planned = {layer.shape.name: layer.shape.inputs for layer in plan.layers}
    before = {shape.name: shape.inputs for shape in network.profile.layers}
    layers = (
        layer.with_joined_bias() if planned.get(layer.name) != before.get(layer.name) else layer
        for layer in network.layers
    )
    return dataclasses.replace(network, layers=tuple(layers))


def _choose(shape: LayerShape, m: int, samples: int, reduction: Reduction, *, has_bias: bool) -> LayerPlan:
    plans = list(candidates(shape, m, reduction))
    if has_bias:
        with_bias = dataclasses.replace(shape, inputs=shape.inputs + 1)
        plans = [plan for plan in plans if plan.uses_pixels]
        plans += [plan for plan in candidates(with_bias, m, reduction) if not plan.uses_pixels]

    def nanoseconds(plan: LayerPlan) -> int:
        calls = ORDERED_CALLS if plan.order == "ordered" else 0
        return calls + order_nanoseconds(plan, m, samples, USUAL_RATES, reduction)

    return min(plans, key=nanoseconds)


class JointFactors:
    """Computes the factors of a block of samples. Each call writes into the memory of the last one.

    Args:
        network: The network, with joined biases.
        plan: The plan.
        samples: Number of samples of the block.
    """

    def __init__(self, network: Network, plan: JacobianPlan, samples: int) -> None:
        self._network, self._plan = network, plan
        self._block = empty_factors(network, plan, samples)
        kept = [layer for layer in plan.layers if layer.keeps_rows]
        sizes = [(_input_sizes(layer.shape), _cotangent_sizes(layer.shape, plan.num_outputs)) for layer in kept]
        numbers = sum(math.prod(inputs) + math.prod(cotangents) for inputs, cotangents in sizes)
        limit = max(1, min(BATCH_SIZE, BATCH_NUMBERS // max(1, numbers)))
        self._batches = Block(0, samples).pieces(-(-samples // -(-samples // limit)))
        self._plans = {layer.shape.name: layer for layer in plan.layers}
        self._columns = _columns(network, self._plans)
        self._inputs, self._cotangents = self._targets(len(self._batches[0]))
        convolves = any(isinstance(child, Convolution) for child in network.module.modules())
        self._is_batched = not convolves and not network.fallback

    def __call__(
        self,
        x: Tensor,  # (samples, …)
        *,
        prove: bool = False,
    ) -> BlockFactors:
        """Compute the factors of the samples.

        Args:
            x: The samples.
            prove: Whether each batch is compared with autograd and with other batches.
        """
        network, block = self._network, self._block
        with without_kept_graphs():
            for batch in self._batches:
                part = slice(batch.start, batch.stop)
                samples = network.input(x[part])
                recording = record(network.module, network.layer_modules, samples, watch=network.following.recording)
                self._fill(recording, part)
                fill_fallback(block, network, self._plan, part, samples)
                if prove and not has_true_factors(network, self._plan, recording, block, part):
                    fill_fallback(block, network, self._plan.one_by_one, part, samples)
                del recording  # and with it the graph
            if prove:
                require_same_in_other_batches(network, x, block.logits, len(self._batches[0]))
                require_same_alone(network, x, block, len(self._batches[0]))
        return block

    def _targets(self, batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Collect where inputs (samples, groups, k, T) and cotangents (samples, groups, m, channels, T) are written.

        These are views of the factors of the block. For rows that are kept, it is memory for one batch.
        """
        inputs, cotangents = {}, {}
        for pair in self._block.pairs:
            inputs[pair.plan.shape.name] = pair.inputs if pair.plan.order == "explicit" else pair.inputs.mT
            cotangents[pair.plan.shape.name] = pair.cotangents.transpose(1, 2)
        for name, plan in self._plans.items():
            if plan.keeps_rows:
                inputs[name] = self._empty(batch, *_input_sizes(plan.shape))
                cotangents[name] = self._empty(batch, *_cotangent_sizes(plan.shape, self._plan.num_outputs))
        for layer in self._network.layers:
            if layer.joined is not None:
                inputs[layer.name][:, :, -1] = 1
        return inputs, cotangents

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._network.precision.accumulate_dtype, device=self._network.device)

    def _fill(self, recording: Recording, batch: slice) -> None:
        """Write the factors of one batch."""
        network, block = self._network, self._block
        block.logits[batch] = recording.outputs.detach()
        require_planned_uses(network, recording)
        recording.outputs = network.mapped(recording.outputs)
        with_matrix = [(layer, self._samples_of(layer.name, batch)) for layer in network.layers if layer.has_matrix]
        for layer, samples in with_matrix:
            self._fill_inputs(self._inputs[layer.name][samples], layer, recording)
        for outputs, grads in self._gradients(recording):
            for layer, samples in with_matrix:
                _fill_cotangents(self._cotangents[layer.name][samples, :, outputs], layer, grads[layer.name])
            pulled = pulled_rows(recording.uses, grads)
            for layer in network.layers:
                for vector in layer.vectors:
                    target = block.rows[batch, outputs, self._columns[layer.full_name(vector)]]
                    if layer.name in pulled:
                        target.copy_(pulled[layer.name].transpose(0, 1))
                    else:
                        _fill_vector(target, layer, vector, recording, grads[layer.name])
        for layer, samples in with_matrix:
            if self._plans[layer.name].keeps_rows:
                g, a = self._cotangents[layer.name][samples], self._inputs[layer.name][samples]
                rows = rows_of(g.flatten(2, 3), a, self._plan.rates.route)  # (samples, groups, m · channels, k)
                by_output = rows.unflatten(2, g.shape[2:4]).transpose(1, 2).flatten(2)
                block.rows[batch, :, self._columns[layer.name]] = by_output

    def _samples_of(self, layer: str, batch: slice) -> slice:
        return slice(0, batch.stop - batch.start) if self._plans[layer].keeps_rows else batch

    def _fill_inputs(self, target: Tensor, layer: Layer, recording: Recording) -> None:
        uses, start = recording.uses[layer.name], 0
        if self._plans[layer.name].uses_pixels:
            target.copy_(pixels_of(layer.module, uses[0].x).mT)
            return
        if layer.rule is CONVOLUTION and len(uses) == 1:
            _fill_windows(target if layer.joined is None else target[:, :, :-1], layer.module, uses[0].x)
            return
        for use in uses:
            a = layer.rule.inputs(layer.module, use.x).mT
            target[:, :, : a.shape[2], start : start + a.shape[3]] = a
            start += a.shape[3]

    def _gradients(self, recording: Recording) -> Iterator[tuple[slice, Gradients]]:
        """Yield the gradients of all outputs at once, or of one output after the other."""
        m = recording.outputs.shape[1]
        if self._is_batched and (found := pull_back_all(recording)) is not None:
            yield slice(0, m), found
            return
        for index, grads in enumerate(cotangents(recording)):
            yield slice(index, index + 1), {name: [grad[None] for grad in each] for name, each in grads.items()}


def pull_back_all(recording: Recording) -> Gradients | None:
    """Take the gradients of all outputs in one backward pass; None if `torch.vmap` does not support the network."""
    outputs, m = recording.outputs, recording.outputs.shape[1]
    uses = [(name, use) for name, calls in recording.uses.items() for use in calls]
    if not outputs.requires_grad or not uses:
        return None
    weights = torch.eye(m, dtype=outputs.dtype, device=outputs.device)[:, None].expand(m, *outputs.shape)
    try:
        found = pull_together([outputs], [weights], [use.output for _, use in uses])
    except RuntimeError:
        return None
    by_layer: Gradients = {name: [] for name in recording.uses}
    for (name, use), grad in zip(uses, found, strict=True):
        by_layer[name].append(zeros_for(use.output, m) if grad is None else grad)
    return by_layer


def _fill_windows(
    target: Tensor,  # (samples, groups, k, T)
    module: nn.Module,
    x: Tensor,
) -> None:
    """Write the windows of a convolution, without another copy of them."""
    assert isinstance(module, Convolution)
    axes = x.ndim - 2
    windows = windows_first(module, x).unflatten(1, (module.groups, -1))
    target.unflatten(3, windows.shape[-axes:]).unflatten(2, windows.shape[2:-axes]).copy_(windows)


def _fill_cotangents(
    target: Tensor,  # (samples, groups, some m, channels, T)
    layer: Layer,
    grads: list[Tensor],  # for each use, (some m, samples, …)
) -> None:
    start = 0
    for grad in grads:
        g = layer.rule.cotangents(layer.module, grad.flatten(0, 1))  # (some m · samples, groups, positions, channels)
        g = g.unflatten(0, grad.shape[:2]).permute(1, 2, 0, 4, 3)
        target[..., start : start + g.shape[4]] = g
        start += g.shape[4]


def _fill_vector(
    target: Tensor,  # (samples, some m, parameter)
    layer: Layer,
    vector: str,
    recording: Recording,
    grads: list[Tensor],  # for each use, (some m, samples, …)
) -> None:
    rule, uses = layer.rule.vectors[vector], recording.uses[layer.name]
    if isinstance(uses[0].x, Part):  # it computes the rows of all outputs at once
        target.copy_(sum_over_uses(use.x.rows(grad) for use, grad in zip(uses, grads, strict=True)).transpose(0, 1))
        return
    for output in range(target.shape[1]):
        parts = (rule(layer.module, use.x, grad[output]) for use, grad in zip(uses, grads, strict=True))
        target[:, output] = sum_over_uses(parts)


def _columns(network: Network, plans: Mapping[str, LayerPlan]) -> dict[str, slice]:
    """Find the columns of the kept rows: of a matrix by the name of its layer, of a vector by its own."""
    columns, start = {}, 0
    sizes_of = {name: param.numel() for name, param in network.params.items()}
    for layer in network.layers:
        is_kept = layer.has_matrix and plans[layer.name].keeps_rows
        sizes = [(layer.name, plans[layer.name].shape.num_params)] if is_kept else []
        sizes += [(layer.full_name(vector), sizes_of[layer.full_name(vector)]) for vector in layer.vectors]
        for name, size in sizes:
            columns[name] = slice(start, start + size)
            start += size
    return columns


def _input_sizes(shape: LayerShape) -> tuple[int, ...]:
    return shape.groups, shape.inputs, shape.positions


def _cotangent_sizes(shape: LayerShape, num_outputs: int) -> tuple[int, ...]:
    return shape.groups, num_outputs, shape.channels, shape.positions
