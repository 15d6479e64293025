"""A user's module made ready: our evaluation copy of it, and which rule treats which parameter, checked by value."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError, RuleError, ShapeError
from ntkgen.jacobian.capture import Recording, record
from ntkgen.jacobian.cost import LayerShape, NetworkProfile
from ntkgen.jacobian.coverage import draw_directions
from ntkgen.jacobian.evaluation import (
    as_input,
    evaluation_copy,
    require_own_parameters,
    require_plain_module,
    without_kept_graphs,
)
from ntkgen.jacobian.layers import CONVOLUTION, Layer, layers_with_rules
from ntkgen.jacobian.precision import Precision, check_device, exact_arithmetic
from ntkgen.jacobian.probe import NotInThisDtypeError, Trial, choose_samples, explained_errors, try_network
from ntkgen.jacobian.reach import require_reached
from ntkgen.jacobian.reals import count_real_numbers
from ntkgen.jacobian.reference import trainable
from ntkgen.jacobian.windows import Windows, windows_of

# The shapes of input and output of each use of a layer, for one sample.
UseShapes = tuple[tuple[torch.Size, torch.Size], ...]


@dataclass(frozen=True)
class Network:
    """An evaluation copy in the compute dtype, with its layers, its parameters without a rule, and its sizes."""

    module: nn.Module
    precision: Precision
    device: torch.device
    layers: tuple[Layer, ...]
    fallback: tuple[str, ...]
    profile: NetworkProfile
    use_shapes: Mapping[str, UseShapes]  # of each layer, to which every batch must keep
    directions: Mapping[str, Tensor]  # with which the weight matrix of each layer is checked, (groups, k, directions)
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

    def follows(self, planned: NetworkProfile) -> bool:
        """Say whether the parameters are treated as was planned: the same layers, and the same ones without a rule."""
        mine = self.profile
        return (mine.layers, mine.dense_params, mine.fallback) == (
            planned.layers,
            planned.dense_params,
            planned.fallback,
        )

    @property
    def layer_modules(self) -> dict[str, nn.Module]:
        """What `capture.record` records."""
        return {layer.name: layer.module for layer in self.layers}


def prepare(
    model: nn.Module,
    x: Tensor,  # (samples, …): a few samples that the network accepts
    precision: Precision,
    device: torch.device | None = None,
    excluded: Collection[str] = (),
) -> Network:
    """Copy a module and decide, by value, how each of its parameters is treated.

    For a few samples and random weights w, ``Σ_io w_io · row_io`` of every parameter with a rule must equal
    ``autograd.grad(Σ_io w_io f_io)``. A parameter that differs (a hook that never fires, a rule that does not fit) is
    left to autograd, as are tied weights, parameters of layers without a rule, and those ``excluded`` by name.

    Raises:
        ModelError: If the kernel is not defined: samples mix, outputs are not (samples, outputs), nothing is trainable.
    """
    require_plain_module(model)
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    check_device(precision, device)
    _require_trainable(model)
    _refuse_batch_statistics(model)
    samples = choose_samples(x)
    with exact_arithmetic(device), without_kept_graphs():
        module, trial = _tried_copy(model, samples, precision.compute_dtype, device)
        samples = as_input(samples, precision.compute_dtype, device)
        require_reached(model, module, samples, trial.reached)
        wrong = trial.disproved | set(excluded)
        layers = tuple(kept for layer in layers_with_rules(module) if any((kept := layer.without(wrong)).params()))
        recording, activations = _record_one(module, layers, samples[:1])
        layers = tuple(layer for layer in layers if layer.name in recording.uses)  # not one whose output was kept
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
    )


def more_excluded(excluded: frozenset[str], error: RuleError) -> frozenset[str]:
    """Add the parameters whose rule was found not to hold for a batch to those that are left to autograd.

    Raises:
        RuleError: If they are there already.
    """
    found = excluded.union(error.params)
    if found == excluded:
        raise error
    return found


def use_shapes(recording: Recording, layer: Layer) -> UseShapes:
    """List the shapes, without the axis of samples, of what goes into a layer and comes out of it."""
    return tuple((into[1:], out[1:]) for into, out in (use.shapes for use in recording.uses.get(layer.name, ())))


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _tried_copy(model: nn.Module, samples: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Trial]:
    """Copy a module, and try it on a few samples.

    It is tried on a copy in float64, which is gone before the one in another dtype is made.
    """
    judge = evaluation_copy(model, torch.float64, device if dtype == torch.float64 else _float64_device(device))
    try:
        trial = try_network(judge, samples, torch.float64)
    except NotInThisDtypeError:  # it may cast to float32 on its way
        judge = evaluation_copy(model, dtype, device)
        return judge, try_network(judge, samples, dtype)
    if dtype != torch.float64:
        del judge
        judge = evaluation_copy(model, dtype, device)
    return judge, trial


def _require_trainable(model: nn.Module) -> None:
    if not any(param.requires_grad for param in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} has no trainable parameter: expected at least one with requires_grad, found none. "
            "Was the network frozen? Set requires_grad_(True) on what the kernel is to be taken of."
        )


def _refuse_batch_statistics(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is None:
            raise ModelError(
                f"Layer {name or type(child).__name__} mixes the samples of a batch even in evaluation mode: a batch "
                "norm was expected to have running statistics, and has none (track_running_stats=False). The kernel of "
                "one sample would depend on the others. Build the network with track_running_stats=True and train it."
            )


def _record_one(module: nn.Module, layers: tuple[Layer, ...], sample: Tensor) -> tuple[Recording, int]:
    """Run one sample, and count the numbers that its graph keeps for the backward passes.

    Raises:
        NotInThisDtypeError: If the network raises.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size() * (2 if tensor.is_complex() else 1)
        return tensor

    params = {param.untyped_storage().data_ptr() for param in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), explained_errors(sample):
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
