"""The trial of a network on a few samples: its outputs, the rules that hold, and the parameters with a gradient."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError
from ntkgen.jacobian.capture import Watch, pull_back, record
from ntkgen.jacobian.coverage import (
    TOLERANCES,
    Claim,
    Claims,
    draw_directions,
    draw_weights,
    hold_against_autograd,
    rows_product,
)
from ntkgen.jacobian.evaluation import as_input, require_matrix
from ntkgen.jacobian.failures import NotInThisDtypeError
from ntkgen.jacobian.following import NO_JUNCTIONS, Following
from ntkgen.jacobian.junction_search import JunctionSearch
from ntkgen.jacobian.layers import Layer, Rows, layers_with_rules, sum_over_uses
from ntkgen.jacobian.recording import Recording, Use

# Number of samples of the rows, and of samples of the columns, from which the samples of the trial are chosen.
PROBE_SAMPLES = 16
# Number of samples on which a network is tried, together and one by one. They are different if possible, because mixing
# of equal samples has no effect. With a single sample, an input without an axis of samples would look like a batch.
PROBE_BATCH = 3
# Maximum difference between the outputs of a sample in two batches, relative to the largest output.
OUTPUT_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass(frozen=True)
class Trial:
    """The result of the trial of a network."""

    num_outputs: int
    disproved_rules: frozenset[str]  # parameters of layers whose rule does not hold
    reached: frozenset[str]  # trainable parameters that the outputs depend on
    following: Following  # the junctions of the parameters without a rule


def in_turns(x1: Tensor, x2: Tensor | None) -> Tensor:
    """Take some samples of rows and columns alternately, so that the first samples contain both."""
    if x2 is None:
        return x1[:PROBE_SAMPLES]
    few = min(len(x1), len(x2), PROBE_SAMPLES)
    mixed = torch.stack([x1[:few], x2[:few]], dim=1).flatten(0, 1)
    return torch.cat([mixed, x1[few:PROBE_SAMPLES], x2[few:PROBE_SAMPLES]])


def choose_samples(x: Tensor) -> Tensor:  # (PROBE_BATCH, …)
    """Choose `PROBE_BATCH` different samples. If there are too few, repeat the last one."""
    chosen = [0]
    for index in range(1, len(x)):
        if len(chosen) < PROBE_BATCH and not any(torch.equal(x[index], x[other]) for other in chosen):
            chosen.append(index)
    return x[(chosen + [chosen[-1]] * PROBE_BATCH)[:PROBE_BATCH]]


def try_network(module: nn.Module, samples: Tensor, dtype: torch.dtype, excluded: Collection[str] = ()) -> Trial:
    """Run a network on a few samples, together and one by one, and compare its rules with autograd.

    The rules are applied to the samples together. They are compared with the gradients of each sample alone, because
    these define the kernel. The parameters without a rule that holds are then followed to their junctions, and what is
    found is compared in the same way.

    Raises:
        NotInThisDtypeError: If the network raises an error or returns another dtype.
        ModelError: If its kernel is not defined.
    """
    samples = as_input(samples, dtype, next(module.parameters()).device)
    layers = tuple(layers_with_rules(module))
    own = {name for name, value in module.named_parameters() if value.requires_grad} - set(excluded)
    followed = own - {
        layer.full_name(param)
        for layer in layers
        # the rule does not hold for a table of positions, which are the same for all samples
        if not isinstance(layer.module, nn.Embedding)
        for param in layer.params()
    }
    found = _compared(module, samples, layers, followed)
    if again := (found.disproved_rules & own) - found.following.treated:
        second = _compared(module, samples, (), followed | again)
        by_rules = {layer.full_name(param) for layer in layers for param in layer.params()} - found.disproved_rules
        found = dataclasses.replace(found, following=second.following.without(frozenset(by_rules)))
    return found


def _compared(module: nn.Module, samples: Tensor, layers: tuple[Layer, ...], followed: Collection[str]) -> Trial:
    """Compare the rules of some layers, and the junctions of some parameters, with autograd.

    Raises:
        NotInThisDtypeError: If the network raises an error or returns another dtype.
        ModelError: If its outputs depend on the batch, or on the call.
    """
    search = JunctionSearch(module, frozenset(followed))
    try:
        first = _called(module, (), samples[:1], search.alone) if search.is_needed else None
        together = _called(module, layers, samples, search.together if search.is_needed else None)
    except NotInThisDtypeError:
        if not search.is_needed:
            raise
        return _compared(module, samples, layers, ())  # it may work if nothing is followed
    weights = draw_weights(together.outputs, len(samples))
    grads = pull_back(together, weights)  # rows are linear in the cotangents, so one pass checks all outputs
    by_rule, failed = _claims(together, layers, grads)
    following = search.following.without(frozenset(by_rule) - failed)
    by_junctions, lost = _claims(together, following.layers, grads)
    in_batch = together.outputs.detach()
    del together, grads  # frees its graph
    others = samples if first is None else samples[1:]
    outputs = [_called(module, (), sample[None]).outputs for sample in others]
    alone = torch.cat(outputs if first is None else [first.outputs, *outputs])
    try:
        require_same_outputs(in_batch, alone.detach(), len(samples))
    except ModelError:
        _require_repeatable(in_batch, _called(module, (), samples).outputs.detach())
        raise
    params = {name: value for name, value in module.named_parameters() if value.requires_grad}
    claims = {**by_rule, **by_junctions}
    findings = hold_against_autograd(alone, weights, params, claims, TOLERANCES[alone.dtype])
    wrong_rules = failed | (findings.disproved & by_rule.keys())
    return Trial(alone.shape[1], wrong_rules, findings.reached, following.without(findings.disproved | lost))


def _called(module: nn.Module, layers: Iterable[Layer], samples: Tensor, watch: Watch | None = None) -> Recording:
    """Run a network on a batch.

    Raises:
        NotInThisDtypeError: If the network raises an error or returns another dtype.
        ModelError: If the outputs are not (samples, outputs), or not finite.
    """
    modules = {layer.name: layer.module for layer in layers}
    recording = record(module, modules, samples, watch=watch or NO_JUNCTIONS.recording)
    outputs = recording.outputs
    require_matrix(outputs, len(samples))
    if outputs.dtype != samples.dtype and samples.is_floating_point():
        raise NotInThisDtypeError(
            f"The network returns {outputs.dtype} where its parameters and samples are {samples.dtype}: its forward "
            "pass rounds on its own. Remove the cast, so that `precision` says how the kernel is computed."
        )
    if not outputs.isfinite().all():
        raise ModelError(
            "The network's outputs are not finite: expected numbers, found infinity or NaN for the first samples. "
            "Did its training diverge, or do the samples have values that are not finite? Train the network again, or "
            "repair the samples."
        )
    return recording


def require_same_outputs(
    in_batch: Tensor,  # (samples, outputs)
    otherwise: Tensor,  # (samples, outputs), of the same samples alone or in another batch
    batch_size: int,
) -> None:
    """Refuse a network whose outputs for a sample depend on the other samples of its batch.

    Raises:
        ModelError: If they differ by more than rounding explains.
    """
    require_form(in_batch, otherwise.shape[1], otherwise.dtype)
    difference = float((in_batch - otherwise).abs().max())
    scale = float(otherwise.abs().max())
    if not difference <= OUTPUT_TOLERANCES[in_batch.dtype] * max(scale, 1e-30):
        raise ModelError(
            f"The network mixes the samples of a batch even in evaluation mode: expected that a sample has the same "
            f"outputs in every batch up to rounding, found that they differ by {difference:.1e} between a batch of "
            f"{batch_size} and another one (largest output {scale:.1e}). Does a layer use batch statistics or "
            "randomness? Replace it by one that treats samples one by one."
        )


def require_form(outputs: Tensor, num_logits: int, dtype: torch.dtype) -> None:
    """Refuse outputs of another number or dtype than in another batch.

    Raises:
        ModelError: If they differ.
    """
    if outputs.ndim != 2 or outputs.shape[1] != num_logits or outputs.dtype != dtype:
        raise ModelError(
            f"The network's outputs change from batch to batch: expected {num_logits} of {dtype} for each sample, "
            f"found shape {tuple(outputs.shape)} and {outputs.dtype} in some batch. Does the forward pass depend on "
            "the values of its samples? Make it return the same outputs for all samples."
        )


def _require_repeatable(outputs: Tensor, again: Tensor) -> None:
    """Refuse a network that returns other outputs for the same batch.

    Raises:
        ModelError: If they differ by more than rounding explains.
    """
    difference = float((outputs - again).abs().max())
    if not difference <= OUTPUT_TOLERANCES[outputs.dtype] * max(float(outputs.abs().max()), 1e-30):
        raise ModelError(
            "The network's outputs change between two calls with the same samples: expected equal ones up to rounding, "
            f"found a difference of {difference:.1e}. Does it draw random numbers in evaluation mode, or count its "
            "calls? Remove that, or draw the numbers beforehand and pass them with the samples."
        )


def is_one_by_one(uses: Sequence[Use], batch_size: int) -> bool:
    """Check that a layer was called, and that all its inputs and outputs are real and have samples as first axis."""
    return bool(uses) and all(
        shape and shape[0] == batch_size and not use.output.is_complex() and not use.x.is_complex()
        for use in uses
        for shape in use.shapes
    )


def _claims(
    recording: Recording, layers: Sequence[Layer], grads: Mapping[str, Sequence[Tensor]]
) -> tuple[Claims, frozenset[str]]:
    """Compute the weighted gradients by the rules, and list the parameters for which this is not possible."""
    claims: dict[str, list[Claim]] = {}
    missing: set[str] = set()
    for layer in layers:
        uses = recording.uses.get(layer.name, [])
        if is_one_by_one(uses, recording.count):
            found = _layer_claims(layer, uses, grads[layer.name])
            for name, claim in found.items():
                claims.setdefault(name, []).append(claim)
            missing |= {name for param in layer.params() if (name := layer.full_name(param)) not in found}
        else:
            missing |= {layer.full_name(param) for param in layer.params()}
    return claims, frozenset(missing)


def _layer_claims(layer: Layer, uses: Sequence[Use], grads: Sequence[Tensor]) -> dict[str, Claim]:
    claims: dict[str, Claim] = {}
    for param in layer.params():
        claim = _matrix_claim if param == layer.rule.matrix else partial(_vector_claim, layer.rule.vectors[param])
        with suppress(Exception):  # a rule that raises an error does not hold
            claims[layer.full_name(param)] = claim(layer, uses, grads)
    return claims


def _vector_claim(rows: Rows, layer: Layer, uses: Sequence[Use], grads: Sequence[Tensor]) -> Claim:
    return Claim(sum_over_uses(rows(layer.module, use.x, grad).sum(0) for use, grad in zip(uses, grads, strict=True)))


def _matrix_claim(layer: Layer, uses: Sequence[Use], grads: Sequence[Tensor]) -> Claim:
    inputs = [layer.rule.inputs(layer.module, use.x) for use in uses]  # each (samples, groups, positions, k)
    directions = draw_directions(inputs[0].shape[1], inputs[0].shape[3], inputs[0])
    parts = (
        rows_product(layer.rule.cotangents(layer.module, grad).mT, a @ directions)
        for a, grad in zip(inputs, grads, strict=True)
    )
    return Claim(sum_over_uses(parts), directions, layer.positions)
