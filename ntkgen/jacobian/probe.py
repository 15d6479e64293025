"""A network tried on a few samples: what it returns, which rules hold, and which parameters its outputs depend on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError
from ntkgen.jacobian.capture import Recording, Use, pull_back, record
from ntkgen.jacobian.coverage import (
    TOLERANCES,
    Claim,
    draw_directions,
    draw_weights,
    hold_against_autograd,
    rows_product,
)
from ntkgen.jacobian.evaluation import as_input, require_real_outputs
from ntkgen.jacobian.layers import Layer, Rows, layers_with_rules, sum_over_uses

# Samples of the rows, and as many of the columns, among which those are chosen on which a network is tried.
PROBE_SAMPLES = 16
# Samples on which a network is tried together, and one by one. Different ones, if there are any: equal ones could mix
# unnoticed. With one sample alone an input without an axis of samples looks like a batch of one.
PROBE_BATCH = 3
# How far a sample's outputs may be from those of the same sample in another batch, relative to the largest output.
OUTPUT_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}


class NotInThisDtypeError(ModelError):
    """The network raised, or cast, when it was run in a dtype; it may run in another."""


@dataclass(frozen=True)
class Trial:
    """What a few samples show of a network."""

    num_outputs: int
    disproved: frozenset[str]  # parameters whose rule does not hold
    reached: frozenset[str]  # trainable parameters that the outputs depend on


def in_turns(x1: Tensor, x2: Tensor | None) -> Tensor:
    """Take some samples of the rows and the columns, in turns, so that both are among the first."""
    if x2 is None:
        return x1[:PROBE_SAMPLES]
    few = min(len(x1), len(x2), PROBE_SAMPLES)
    mixed = torch.stack([x1[:few], x2[:few]], dim=1).flatten(0, 1)
    return torch.cat([mixed, x1[few:PROBE_SAMPLES], x2[few:PROBE_SAMPLES]])


def choose_samples(x: Tensor) -> Tensor:  # (PROBE_BATCH, …)
    """Choose some different samples; where there are too few, the last one again."""
    chosen = [0]
    for index in range(1, len(x)):
        if len(chosen) < PROBE_BATCH and not any(torch.equal(x[index], x[other]) for other in chosen):
            chosen.append(index)
    return x[(chosen + [chosen[-1]] * PROBE_BATCH)[:PROBE_BATCH]]


def try_network(module: nn.Module, samples: Tensor, dtype: torch.dtype) -> Trial:
    """Run a network on a few samples, together and one by one, and hold its rules against autograd.

    The rules are applied to the samples together. The gradients that they are compared with are those of each sample
    alone, which the kernel is defined by.

    Raises:
        NotInThisDtypeError: If it raises, or returns another dtype.
        ModelError: If its kernel is not defined.
    """
    samples = as_input(samples, dtype, next(module.parameters()).device)
    layers = tuple(layers_with_rules(module))
    together = _called(module, layers, samples)
    weights = draw_weights(together.outputs, len(samples))
    claims, failed = _claims(together, layers, weights)
    in_batch = together.outputs.detach()
    del together  # and with it a graph
    alone = torch.cat([_called(module, (), sample[None]).outputs for sample in samples])
    require_same_outputs(in_batch, alone.detach(), len(samples))
    params = {name: value for name, value in module.named_parameters() if value.requires_grad}
    found = hold_against_autograd(alone, weights, params, claims, TOLERANCES[alone.dtype])
    return Trial(alone.shape[1], found.disproved | failed, found.reached)


def _called(module: nn.Module, layers: Iterable[Layer], samples: Tensor) -> Recording:
    """Run a network on a batch.

    Raises:
        NotInThisDtypeError: If it raises, or returns another dtype.
        ModelError: If it does not return (samples, outputs), all finite.
    """
    with explained_errors(samples):
        recording = record(module, {layer.name: layer.module for layer in layers}, samples)
    outputs = recording.outputs
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(samples):
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ModelError(
            f"The network must return one row per sample, ({len(samples)}, outputs), and returned {found}. Is there a "
            "flatten missing, or does it return several values? Wrap it in a module that returns one such tensor."
        )
    require_real_outputs(outputs)
    if outputs.dtype != samples.dtype and samples.is_floating_point():
        raise NotInThisDtypeError(
            f"The network returns {outputs.dtype} where its parameters and samples are {samples.dtype}: its forward "
            "pass rounds on its own. Remove the cast, so that --precision says how the kernel is computed."
        )
    if not outputs.isfinite().all():
        raise ModelError(
            "The network's outputs are not finite: expected numbers, found infinity or NaN for the first samples. "
            "Did its training diverge, or do the samples have values that are not finite? Repair what made them."
        )
    return recording


@contextmanager
def explained_errors(samples: Tensor) -> Iterator[None]:
    """Explain what a network raises: it is somebody else's code, and its error its own.

    Raises:
        NotInThisDtypeError: If it raises.
    """
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "dtype" in said or "same type" in said or "Float" in said or "Double" in said:
            other = "float32" if samples.dtype == torch.float64 else "float64"
            cause = (
                f"Does it run in {other} alone, because of a cast in its forward pass or a tensor that is no buffer? "
                f"Choose the precision {other}, or remove the cast and use register_buffer."
            )
        else:
            cause = (
                "Is it made for another size, number of channels or dtype? Give it samples of the kind it was made for."
            )
        raise NotInThisDtypeError(
            f"The network cannot take these samples, of shape {tuple(samples.shape[1:])} and {samples.dtype} each "
            f"({said}). {cause}"
        ) from error


def require_same_outputs(
    in_batch: Tensor,  # (samples, outputs)
    otherwise: Tensor,  # (samples, outputs), of the same samples alone or in a smaller batch
    batch_size: int,
) -> None:
    """Refuse a network whose outputs for a sample depend on the batch that it is in.

    Raises:
        ModelError: If they differ by more than rounding explains.
    """
    difference = float((in_batch - otherwise).abs().max())
    scale = float(otherwise.abs().max())
    if not difference <= OUTPUT_TOLERANCES[in_batch.dtype] * max(scale, 1e-30):
        raise ModelError(
            f"The network mixes the samples of a batch even in evaluation mode: alone and in a batch of {batch_size} a "
            f"sample's outputs differ by {difference:.1e} (largest output {scale:.1e}), expected rounding only. Does a "
            "layer use batch statistics or randomness? Replace it by one that treats samples one by one."
        )


def is_one_by_one(uses: Sequence[Use], batch_size: int) -> bool:
    """Say whether a layer was called, each time with real numbers and the samples as first axis, in and out."""
    return bool(uses) and all(
        shape and shape[0] == batch_size and not use.output.is_complex() and not use.x.is_complex()
        for use in uses
        for shape in use.shapes
    )


def _claims(
    recording: Recording, layers: Sequence[Layer], weights: Tensor
) -> tuple[Mapping[str, Claim], frozenset[str]]:
    """Collect what the rules say of the weighted gradient, and the parameters for which a rule cannot say anything."""
    grads = pull_back(recording, weights)  # rows are linear in the cotangents, so that one pass checks all outputs
    claims: dict[str, Claim] = {}
    treated = {layer.full_name(param) for layer in layers for param in layer.params()}
    for layer in layers:
        uses = recording.uses.get(layer.name, [])
        if is_one_by_one(uses, recording.count):
            claims |= _layer_claims(layer, uses, grads[layer.name])
    return claims, frozenset(treated - claims.keys())


def _layer_claims(layer: Layer, uses: Sequence[Use], grads: Sequence[Tensor]) -> dict[str, Claim]:
    claims: dict[str, Claim] = {}
    for param in layer.params():
        claim = _matrix_claim if param == layer.rule.matrix else partial(_vector_claim, layer.rule.vectors[param])
        with suppress(Exception):  # to raise is one way in which a rule does not hold
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
    return Claim(sum_over_uses(parts), directions)
