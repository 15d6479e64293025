"""The preparation of a user's module: an evaluation copy, and the choice of a rule or autograd for each parameter."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError, RuleError, ShapeError
from ntkgen.jacobian.capture import CountedNumbers, record
from ntkgen.jacobian.cost import LayerShape, NetworkProfile
from ntkgen.jacobian.coverage import draw_directions
from ntkgen.jacobian.evaluation import (
    as_input,
    class_name,
    evaluation_copy,
    require_own_parameters,
    require_plain_module,
    without_kept_graphs,
)
from ntkgen.jacobian.failures import NotInThisDtypeError, explained_errors
from ntkgen.jacobian.fallback import choose_way, chunk_samples, warn_of_single_passes
from ntkgen.jacobian.following import NO_JUNCTIONS, Following
from ntkgen.jacobian.layers import CONVOLUTION, Layer, layers_with_rules
from ntkgen.jacobian.precision import Precision, check_device, exact_arithmetic
from ntkgen.jacobian.probe import Trial, choose_samples, try_network
from ntkgen.jacobian.reach import require_reached
from ntkgen.jacobian.reals import count_real_numbers
from ntkgen.jacobian.recording import Recording
from ntkgen.jacobian.reference import trainable
from ntkgen.jacobian.windows import Windows, windows_of

# The shapes of input and output of each use of a layer, for one sample.
UseShapes = tuple[tuple[torch.Size, torch.Size], ...]


@dataclass(frozen=True)
class Network:
    """An evaluation copy in the compute dtype, with its layers, its parameters left to autograd, and its sizes."""

    module: nn.Module
    precision: Precision
    device: torch.device
    layers: tuple[Layer, ...]
    fallback: tuple[str, ...]
    profile: NetworkProfile
    use_shapes: Mapping[str, UseShapes]  # by layer; those of every batch must be equal
    directions: Mapping[str, Tensor]  # by layer, (groups, k, directions): vectors for the check of its weight matrix
    following: Following = NO_JUNCTIONS  # the junctions of parameters that belong to no layer with a rule
    windows: Mapping[str, Windows] = field(default_factory=dict)  # by layer, for convolutions of stride 1
    transform: Tensor | None = None  # A, (outputs, logits), if the kernel is that of A f instead of f
    only_in_training: tuple[str, ...] = ()  # parameters that the outputs depend on in training mode alone

    def seen_through(self, transform: Tensor | None) -> "Network":
        """Return the same network with the kernel of A f instead of f.

        Raises:
            ShapeError: If the number of columns of A is not the number of outputs of the network.
        """
        if transform is None:
            return self
        num_logits = self.profile.num_logits
        if transform.ndim != 2 or transform.shape[1] != num_logits or not len(transform):
            raise ShapeError(
                f"The output map has shape {tuple(transform.shape)}: expected (outputs, {num_logits}), one column "
                "per output of the network. Is it meant for another network? Pass a matrix of that shape."
            )
        profile = dataclasses.replace(self.profile, num_outputs=len(transform))
        matrix = transform.to(self.device, self.precision.compute_dtype)
        return dataclasses.replace(self, profile=profile, transform=matrix)

    def mapped(
        self,
        logits: Tensor,  # (…, logits)
    ) -> Tensor:  # (…, outputs)
        """Apply the output map to the logits: A f(x)."""
        return logits if self.transform is None else logits @ self.transform.mT

    def input(self, x: Tensor) -> Tensor:
        """Move a batch to the device of the network, and convert it to the compute dtype."""
        return as_input(x, self.precision.compute_dtype, self.device)

    def warn_of_cost(self, num_samples: int) -> None:
        """Warn if the parameters that are left to autograd take most of the time."""
        profile = self.profile
        warn_of_single_passes(profile.fallback, profile.fallback_way, num_samples, profile.num_logits)

    def follows(self, planned: NetworkProfile) -> bool:
        """Check whether layers and parameters left to autograd are those of a plan."""
        profile = self.profile
        return (profile.layers, profile.dense_params, profile.fallback) == (
            planned.layers,
            planned.dense_params,
            planned.fallback,
        )

    @functools.cached_property
    def params(self) -> dict[str, nn.Parameter]:
        """All parameters of the copy by name. Tied ones have their first name."""
        return dict(self.module.named_parameters())

    @property
    def layer_modules(self) -> dict[str, nn.Module]:
        """The modules that `capture.record` records, by layer."""
        return {layer.name: layer.module for layer in self.layers if layer.owner is None}


def prepare(
    model: nn.Module,
    x: Tensor,  # (samples, …): a few samples that the network accepts
    precision: Precision,
    device: torch.device | None = None,
    excluded: Collection[str] = (),
) -> Network:
    """Copy a module, and decide for each parameter how its rows are computed.

    The parameters of layers with a rule are treated by this rule. All others are followed to their junctions, the calls
    in which they meet the samples. For a few samples and random weights w, ``Σ_io w_io · row_io`` of every parameter
    must then equal ``autograd.grad(Σ_io w_io f_io)``. A parameter for which the two differ, and the ``excluded`` names,
    are left to autograd, which is slower.

    Raises:
        ModelError: If the kernel is not defined, because the network mixes samples, its outputs are not (samples,
            outputs), or it has no trainable parameter.
    """
    require_plain_module(model)
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    check_device(precision, device)
    _require_trainable(model)
    _refuse_batch_statistics(model)
    samples = choose_samples(x)
    with exact_arithmetic(device), without_kept_graphs():
        module, trial = _tried_copy(model, samples, precision.compute_dtype, device, excluded)
        samples = as_input(samples, precision.compute_dtype, device)
        only_in_training = require_reached(model, module, samples, trial.reached)
        wrong = trial.disproved_rules | set(excluded)
        layers = tuple(kept for layer in layers_with_rules(module) if any((kept := layer.without(wrong)).params()))
        following = trial.following
        layers += following.layers
        recording, activations = _record_one(module, layers, samples[:1], following)
        layers = tuple(layer for layer in layers if layer.name in recording.uses)  # only layers that were called
        following = following.only(layers)
        require_own_parameters(recording.outputs, model)
        windows = _windows(layers, recording)
    shapes = tuple(_shape(layer, recording, windows) for layer in layers if layer.has_matrix)
    profile = _profile(
        module,
        layers,
        shapes,
        num_outputs=trial.num_outputs,
        activation_numbers=activations,
        input_numbers=samples[0].numel(),
    )
    profile = _with_fallback(module, profile, samples, device)
    return Network(
        module=module,
        precision=precision,
        device=device,
        layers=layers,
        fallback=profile.fallback,
        profile=profile,
        use_shapes={layer.name: use_shapes(recording, layer) for layer in layers},
        directions={shape.name: draw_directions(shape.groups, shape.inputs, recording.outputs) for shape in shapes},
        windows=windows,
        following=following,
        only_in_training=only_in_training,
    )


def _with_fallback(module: nn.Module, profile: NetworkProfile, samples: Tensor, device: torch.device) -> NetworkProfile:
    """Choose how autograd computes the rows that are left to it, and for how many samples at once."""
    if not profile.fallback:
        return profile
    with exact_arithmetic(device), without_kept_graphs():
        way = choose_way(module, profile.fallback, samples)
    numbers = count_real_numbers(trainable(module)[name] for name in profile.fallback)
    count = chunk_samples(way, profile.activation_numbers, profile.num_logits, numbers)
    return dataclasses.replace(profile, fallback_way=way, fallback_samples=count)


def more_excluded(excluded: frozenset[str], error: RuleError) -> frozenset[str]:
    """Add the parameters of a `RuleError` to those that are left to autograd.

    Raises:
        RuleError: If they are left to autograd already.
    """
    extended = excluded.union(error.params)
    if extended == excluded:
        raise error
    return extended


def use_shapes(recording: Recording, layer: Layer) -> UseShapes:
    """List the shapes of a layer's inputs and outputs, without the axis of samples."""
    return tuple((into[1:], out[1:]) for into, out in (use.shapes for use in recording.uses.get(layer.name, ())))


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _tried_copy(
    model: nn.Module, samples: Tensor, dtype: torch.dtype, device: torch.device, excluded: Collection[str]
) -> tuple[nn.Module, Trial]:
    """Copy a module, and try it on a few samples.

    The trial uses a copy in float64. This copy is freed before the copy in another dtype is made.
    """
    copied = evaluation_copy(model, torch.float64, device if dtype == torch.float64 else _float64_device(device))
    try:
        trial = try_network(copied, samples, torch.float64, excluded)
    except NotInThisDtypeError:  # the forward pass may cast to float32
        copied = evaluation_copy(model, dtype, device)
        return copied, try_network(copied, samples, dtype, excluded)
    if dtype != torch.float64:
        del copied
        copied = evaluation_copy(model, dtype, device)
    return copied, trial


def _require_trainable(model: nn.Module) -> None:
    if not any(param.requires_grad for param in model.parameters()):
        raise ModelError(
            f"{class_name(model)} has no trainable parameter: expected at least one with requires_grad, found none. "
            "Was the network frozen? Call requires_grad_(True) on the parameters of the kernel."
        )


def _refuse_batch_statistics(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is None:
            raise ModelError(
                f"Layer {name or type(child).__name__} mixes the samples of a batch even in evaluation mode: a batch "
                "norm was expected to have running statistics, and has none (track_running_stats=False). The kernel of "
                "one sample would depend on the others. Build the network with track_running_stats=True and train it."
            )


def _record_one(
    module: nn.Module, layers: tuple[Layer, ...], sample: Tensor, following: Following
) -> tuple[Recording, int]:
    """Run one sample, and count the numbers that its graph keeps for the backward passes.

    Raises:
        NotInThisDtypeError: If the network raises an error.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size() * (2 if tensor.is_complex() else 1)
        return tensor

    params = {param.untyped_storage().data_ptr() for param in module.parameters()}
    modules = {layer.name: layer.module for layer in layers if layer.owner is None}
    with suppress(Exception):  # transforms of torch.func refuse such hooks
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            recording = record(module, modules, sample, watch=following.recording)
        return recording, sum(count for address, count in saved.items() if address not in params)
    with explained_errors(sample), CountedNumbers() as made:
        recording = record(module, modules, sample, watch=following.recording)
    return recording, made.count


def _windows(layers: tuple[Layer, ...], recording: Recording) -> dict[str, Windows]:
    """Find the convolutions whose inputs may be stored as pixels. These have stride 1 and are used once."""
    by_layer: dict[str, Windows] = {}
    for layer in layers:
        uses = recording.uses[layer.name]
        if layer.has_matrix and layer.rule is CONVOLUTION and len(uses) == 1:
            windows = windows_of(layer.module, uses[0].x)
            by_layer |= {} if windows is None else {layer.name: windows}
    return by_layer


def _profile(
    module: nn.Module,
    layers: tuple[Layer, ...],
    shapes: tuple[LayerShape, ...],
    *,
    num_outputs: int,
    activation_numbers: int,
    input_numbers: int,
) -> NetworkProfile:
    """Collect the sizes of a network. Parameters that no layer treats are left to autograd."""
    treated = {layer.full_name(param) for layer in layers for param in layer.params()}
    params = trainable(module)
    fallback = tuple(name for name in params if name not in treated)
    vectors = sum(params[layer.full_name(vector)].numel() for layer in layers for vector in layer.vectors)
    return NetworkProfile(
        num_outputs=num_outputs,
        num_params=count_real_numbers(params.values()),
        layers=shapes,
        dense_params=vectors + count_real_numbers(params[name] for name in fallback),
        fallback=fallback,
        activation_numbers=activation_numbers,
        input_numbers=input_numbers,
        num_logits=num_outputs,
    )


def _shape(layer: Layer, recording: Recording, windows: Mapping[str, Windows]) -> LayerShape:
    """Determine the sizes of one layer. Its positions are summed over its uses."""
    inputs = [layer.rule.inputs(layer.module, use.x) for use in recording.uses[layer.name]]
    outputs = [layer.rule.cotangents(layer.module, use.output) for use in recording.uses[layer.name]]
    layer_windows = windows.get(layer.name)
    return LayerShape(
        name=layer.name,
        positions=sum(a.shape[2] for a in inputs),
        inputs=inputs[0].shape[3],
        channels=outputs[0].shape[3],
        groups=inputs[0].shape[1],
        taps=1 if layer_windows is None else layer_windows.taps,
        pixels=0 if layer_windows is None else layer_windows.pixels,
        passes_back=any(use.passes_back for use in recording.uses[layer.name]),
    )
