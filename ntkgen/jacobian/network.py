"""A user's module made ready: our evaluation copy of it, and which rule treats which parameter, checked by value."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError, ShapeError
from ntkgen.jacobian.capture import Recording, Use, pull_back, record
from ntkgen.jacobian.cost import LayerShape, NetworkProfile
from ntkgen.jacobian.evaluation import (
    as_input,
    evaluation_copy,
    outputs_of,
    require_own_parameters,
    require_plain_module,
    require_real_outputs,
)
from ntkgen.jacobian.layers import CONVOLUTION, RULES, LayerRule
from ntkgen.jacobian.precision import Precision, check_device, exact_arithmetic
from ntkgen.jacobian.reals import count_real_numbers
from ntkgen.jacobian.reference import trainable
from ntkgen.jacobian.windows import Windows, windows_of

# How far a rule's rows may be from autograd's, relative to their norm. Wrong rules are off by per cents, and deep
# networks in float32 by a tenth of one: the check is made in float64 wherever the network can be run in it.
COVERAGE_TOLERANCE = {torch.float32: 3e-3, torch.float64: 1e-9}


class _NotInThisDtypeError(ModelError):
    """The network raised, or cast, when it was run in a dtype; it may run in another."""


@dataclass(frozen=True)
class Layer:
    """A module with a rule, and those of its trainable parameters that the rule treats."""

    name: str
    module: nn.Module
    rule: LayerRule
    has_matrix: bool
    vectors: tuple[str, ...]

    def full_name(self, param: str) -> str:
        """Name a parameter as `nn.Module.named_parameters` does."""
        return f"{self.name}.{param}" if self.name else param

    def params(self) -> Iterator[str]:
        """Name the treated parameters, relative to the module: the matrix first, then the vectors."""
        if self.has_matrix:
            assert self.rule.matrix is not None
            yield self.rule.matrix
        yield from self.vectors

    def without(self, excluded: set[str]) -> "Layer":
        """Drop the parameters of these full names."""
        kept = {param for param in self.params() if self.full_name(param) not in excluded}
        vectors = tuple(vector for vector in self.vectors if vector in kept)
        return dataclasses.replace(self, has_matrix=self.rule.matrix in kept, vectors=vectors)


@dataclass(frozen=True)
class Network:
    """An evaluation copy in the compute dtype, with its layers, its parameters without a rule, and its sizes."""

    module: nn.Module
    precision: Precision
    device: torch.device
    layers: tuple[Layer, ...]
    fallback: tuple[str, ...]
    profile: NetworkProfile
    windows: Mapping[str, Windows] = field(default_factory=dict)  # of the convolutions that move in steps of one
    transform: Tensor | None = None  # (outputs, logits): the kernel is of A f; None: of f

    def seen_through(self, transform: Tensor | None) -> "Network":
        """Give the same network with the kernel of A f in place of that of f.

        Raises:
            ShapeError: If the matrix has not as many columns as the network has outputs.
        """
        if transform is None:
            return self
        num_logits = self.profile.num_logits
        if transform.ndim != 2 or transform.shape[1] != num_logits or not len(transform):
            raise ShapeError(
                f"The output map has the shape {tuple(transform.shape)}: expected (outputs, {num_logits}), a column "
                "for each output of the network. Is it meant for another network? Give a matrix of that shape."
            )
        profile = dataclasses.replace(self.profile, num_outputs=len(transform))
        matrix = transform.to(self.device, self.precision.compute_dtype)
        return dataclasses.replace(self, profile=profile, transform=matrix)

    def mapped(
        self,
        logits: Tensor,  # (…, logits)
    ) -> Tensor:  # (…, outputs)
        """Turn what the network returns into the outputs that the kernel is of, A f(x)."""
        return logits if self.transform is None else logits @ self.transform.mT

    def input(self, x: Tensor) -> Tensor:
        """Move a batch to where and how the network computes."""
        return as_input(x, self.precision.compute_dtype, self.device)

    @property
    def layer_modules(self) -> dict[str, nn.Module]:
        """What `capture.record` records."""
        return {layer.name: layer.module for layer in self.layers}


def prepare(
    model: nn.Module,
    x: Tensor,  # (samples, …): a few samples that the network accepts
    precision: Precision,
    device: torch.device | None = None,
) -> Network:
    """Copy a module and decide, by value, how each of its parameters is treated.

    For two samples and a random v, ``Σ_o v_o · row_o`` of every parameter with a rule must equal
    ``autograd.grad(v · f)``. A parameter that differs (a hook that never fires, a rule that does not fit) is left to
    autograd, as are tied weights and parameters of layers without a rule.

    Raises:
        ModelError: If the kernel is not defined: samples mix, outputs are not (samples, outputs), nothing is trainable.
    """
    require_plain_module(model)
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    check_device(precision, device)
    if not any(param.requires_grad for param in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} has no trainable parameter: expected at least one with requires_grad, found none. "
            "Was the network frozen? Set requires_grad_(True) on what the kernel is to be taken of."
        )
    _refuse_batch_statistics(model)
    pair = x[_different_samples(x)]
    with exact_arithmetic(device):
        module, num_outputs, wrong = _checked_copy(model, pair, precision.compute_dtype, device)
        layers = tuple(kept for layer in _layers_with_rules(module) if any((kept := layer.without(wrong)).params()))
        treated = {layer.full_name(param) for layer in layers for param in layer.params()}
        fallback = tuple(name for name in trainable(module) if name not in treated)
        sample = as_input(pair[:1], precision.compute_dtype, device)
        recording, activations = _record_one(module, layers, sample)
        require_own_parameters(recording.outputs, model)
        windows = _windows(layers, recording)
    own = trainable(module)
    profile = NetworkProfile(
        num_outputs=num_outputs,
        num_params=count_real_numbers(own.values()),
        layers=tuple(_shape(layer, recording, windows) for layer in layers if layer.has_matrix),
        dense_params=sum(own[layer.full_name(v)].numel() for layer in layers for v in layer.vectors)
        + count_real_numbers(own[name] for name in fallback),
        fallback=fallback,
        activation_numbers=activations,
        input_numbers=sample.numel(),
        num_logits=num_outputs,
    )
    return Network(module, precision, device, layers, fallback, profile, windows)


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _checked_copy(
    model: nn.Module, pair: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, int, set[str]]:
    """Copy a module, count its outputs, and name the parameters whose rule does not hold.

    The check is made on a copy in float64, which is gone before the one in another dtype is made.
    """
    judge = evaluation_copy(model, torch.float64, device if dtype == torch.float64 else _float64_device(device))
    try:
        found = _check_by_value(judge, pair, torch.float64)
    except _NotInThisDtypeError:  # it may cast to float32 on its way
        judge = evaluation_copy(model, dtype, device)
        found = _check_by_value(judge, pair, dtype)
        return judge, *found
    if dtype != torch.float64:
        del judge
        judge = evaluation_copy(model, dtype, device)
    return judge, *found


def _check_by_value(module: nn.Module, pair: Tensor, dtype: torch.dtype) -> tuple[int, set[str]]:
    """Count a network's outputs, and name the parameters whose rule does not hold.

    Raises:
        ModelError: If its kernel is not defined.
    """
    samples = as_input(pair, dtype, next(module.parameters()).device)
    num_outputs = _check_outputs(module, samples)
    return num_outputs, _uncovered(module, tuple(_layers_with_rules(module)), samples)


def _different_samples(x: Tensor) -> list[int]:
    """Choose two samples, different ones if there are any: equal ones could mix unnoticed."""
    other = (index for index in range(1, len(x)) if not torch.equal(x[index], x[0]))
    return [0, next(other, 1)] if len(x) > 1 else [0]


def _refuse_batch_statistics(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is None:
            raise ModelError(
                f"Layer {name or type(child).__name__} mixes the samples of a batch even in evaluation mode: a batch "
                "norm was expected to have running statistics, and has none (track_running_stats=False). The kernel of "
                "one sample would depend on the others. Build the network with track_running_stats=True and train it."
            )


def _check_outputs(module: nn.Module, pair: Tensor) -> int:
    """Run the network on two samples, together and apart, and return its number of outputs.

    Raises:
        _NotInThisDtypeError: If it raises, or returns another dtype.
        ModelError: If it does not return (samples, outputs), or a sample's outputs depend on the other sample.
    """
    with torch.no_grad():
        try:
            together = outputs_of(module, pair)
            apart = [outputs_of(module, sample[None]) for sample in pair]
        except Exception as error:  # the network is somebody else's code: whatever it raises is its own error
            raise _NotInThisDtypeError(
                f"The network cannot take these samples, of shape {tuple(pair.shape[1:])} and {pair.dtype} each "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Is it made for another size or "
                "number of channels? Give it samples of the kind it was made for."
            ) from error
        if not isinstance(together, Tensor) or together.ndim != 2 or len(together) != len(pair):
            found = tuple(together.shape) if isinstance(together, Tensor) else type(together).__name__
            raise ModelError(
                f"The network must return one row per sample, ({len(pair)}, outputs), and returned {found}. Is there a "
                "flatten missing, or does it return several values? Wrap it in a module that returns one such tensor."
            )
        require_real_outputs(together)
        if together.dtype != pair.dtype and pair.is_floating_point():
            raise _NotInThisDtypeError(
                f"The network returns {together.dtype} where its parameters and samples are {pair.dtype}: its forward "
                "pass rounds on its own. Remove the cast, so that --precision says how the kernel is computed."
            )
        if not together.isfinite().all():
            raise ModelError(
                "The network's outputs are not finite: expected numbers, found infinity or NaN for the first samples. "
                "Did its training diverge, or do the samples have values that are not finite? Repair what made them."
            )
    alone = torch.cat(apart)
    difference = float((together - alone).abs().max())
    scale = float(alone.abs().max())
    if difference > COVERAGE_TOLERANCE[together.dtype] * 10 * max(scale, 1e-30):
        raise ModelError(
            f"The network mixes the samples of a batch even in evaluation mode: alone and in a batch of {len(pair)} a "
            f"sample's outputs differ by {difference:.1e} (largest output {scale:.1e}), expected rounding only. Does a "
            "layer use batch statistics or randomness? Replace it by one that treats samples one by one."
        )
    return int(together.shape[1])


def _layers_with_rules(module: nn.Module) -> Iterator[Layer]:
    """Find the modules with a rule. A parameter that two modules own is tied, and belongs to neither."""
    owners = Counter(id(param) for child in module.modules() for param in child.parameters(recurse=False))
    for name, child in module.named_modules():
        rule = RULES.get(type(child))  # the exact type: a subclass may compute something else
        if rule is None or not rule.applies(child):
            continue
        own = {
            n
            for n, p in child.named_parameters(recurse=False)
            if p.requires_grad and owners[id(p)] == 1 and not p.is_complex()  # no rule is made for complex numbers
        }
        layer = Layer(name, child, rule, rule.matrix in own, tuple(v for v in rule.vectors if v in own))
        if any(layer.params()):
            yield layer


def _uncovered(module: nn.Module, layers: tuple[Layer, ...], pair: Tensor) -> set[str]:
    """Name the parameters whose rows, as their rule gives them, are not what autograd gives."""
    if not layers:
        return set()
    recording = record(module, {layer.name: layer.module for layer in layers}, pair)
    num_outputs = recording.outputs.shape[1]
    weights = torch.randn(
        num_outputs, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu"
    )
    weights = weights.to(recording.outputs)
    grads = pull_back(recording, weights)  # rows are linear in the cotangents, so that one pass checks all outputs
    treated = {layer.full_name(param): (layer, param) for layer in layers for param in layer.params()}
    params = {name: param for name, param in module.named_parameters() if name in treated}

    def holds(sample: slice, name: str, grad: Tensor | None) -> bool:
        layer, param = treated[name]
        uses, of_layer = recording.uses.get(layer.name, []), grads.get(layer.name, [])
        if not _fits(uses, of_layer, len(pair)):
            return False
        uses = [dataclasses.replace(use, x=use.x[sample]) for use in uses]
        with suppress(Exception):  # to raise is one way in which a rule does not hold
            return _close(param_rows(layer, param, uses, [each[sample] for each in of_layer])[0], grad)
        return False

    covered = set(treated)
    for sample in (slice(index, index + 1) for index in range(len(pair))):
        covered &= _true_of_gradients(outputs_of(module, pair[sample])[0] @ weights, params, partial(holds, sample))
    return set(treated) - covered


def _true_of_gradients(
    target: Tensor, params: Mapping[str, Tensor], holds: Callable[[str, Tensor | None], bool]
) -> set[str]:
    """Name the parameters of whose gradient something is true, looking at one gradient at a time.

    All gradients together are as large as the network, and go unused: each is dropped as soon as it has been seen.
    """
    found: dict[str, bool] = {}
    with ExitStack() as stack:
        for name, param in params.items():

            def see(param: Tensor, name: str = name) -> None:
                found[name] = holds(name, param.grad)
                param.grad = None

            stack.callback(param.register_post_accumulate_grad_hook(see).remove)
        if target.requires_grad:
            target.backward(inputs=list(params.values()))
    return {name for name in params if (found[name] if name in found else holds(name, None))}


def _fits(uses: Sequence[Use], grads: Sequence[Tensor], samples: int) -> bool:
    """Say whether a layer was called at all, and with samples as the first axis of what goes in and comes out."""
    return bool(uses) and all(len(use.x) == len(grad) == samples for use, grad in zip(uses, grads, strict=True))


def _close(row: Tensor, grad: Tensor | None) -> bool:
    expected = torch.zeros_like(row) if grad is None else grad.flatten()
    if row.shape != expected.shape:
        return False
    return bool((row - expected).norm() <= COVERAGE_TOLERANCE[row.dtype] * expected.norm())


def param_rows(
    layer: Layer, param: str, uses: Sequence[Use], grads: Sequence[Tensor]
) -> Tensor:  # (samples, parameter)
    """Form the Jacobian rows of one parameter for one output, summed over the uses of its layer."""
    rows = []
    for use, grad in zip(uses, grads, strict=True):
        if param == layer.rule.matrix:
            g, a = layer.rule.cotangents(layer.module, grad), layer.rule.inputs(layer.module, use.x)
            rows.append((g.mT @ a).flatten(1))
        else:
            rows.append(layer.rule.vectors[param](layer.module, use.x, grad))
    return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)


def _record_one(module: nn.Module, layers: tuple[Layer, ...], sample: Tensor) -> tuple[Recording, int]:
    """Run one sample, and count the numbers that its graph keeps for the backward passes."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size() * (2 if tensor.is_complex() else 1)
        return tensor

    params = {param.untyped_storage().data_ptr() for param in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        recording = record(module, {layer.name: layer.module for layer in layers}, sample)
    return recording, sum(count for address, count in saved.items() if address not in params)


def _windows(layers: tuple[Layer, ...], recording: Recording) -> dict[str, Windows]:
    """Find the convolutions whose inputs may be kept as pixels: used once, in steps of one."""
    found: dict[str, Windows] = {}
    for layer in layers:
        uses = recording.uses[layer.name]
        if layer.has_matrix and layer.rule is CONVOLUTION and len(uses) == 1:
            windows = windows_of(layer.module, uses[0].x)
            found |= {} if windows is None else {layer.name: windows}
    return found


def _shape(layer: Layer, recording: Recording, windows: Mapping[str, Windows]) -> LayerShape:
    """Measure one layer: positions are summed over its uses."""
    inputs = [layer.rule.inputs(layer.module, use.x) for use in recording.uses[layer.name]]
    outputs = [layer.rule.cotangents(layer.module, use.output) for use in recording.uses[layer.name]]
    own = windows.get(layer.name)
    return LayerShape(
        name=layer.name,
        positions=sum(a.shape[2] for a in inputs),
        inputs=inputs[0].shape[3],
        channels=outputs[0].shape[3],
        groups=inputs[0].shape[1],
        taps=1 if own is None else own.taps,
        pixels=0 if own is None else own.pixels,
        passes_back=any(use.passes_back for use in recording.uses[layer.name]),
    )
