"""The networks and the optimizer of a run that learns a stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.continual.chance import seed_of
from ntkgen.continual.optim.registry import make_optimizer
from ntkgen.continual.streaming.learner import Curvature, Learner
from ntkgen.continual.streaming.network import StackedNetwork
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.data.dataset import Dataset
from ntkgen.errors import ModelError
from ntkgen.training import zoo


@dataclass(frozen=True, eq=False)
class Members:
    """The networks of a run: those of the first combination of hyper-parameters, one per seed, then of the next.

    Attributes:
        settings: The settings.
        shape: Shape of a sample.
        num_outputs: Number of outputs.
        device: The device.
        network: The networks.
        generators: The random generator of the noise of each.
    """

    settings: StreamingSettings
    shape: tuple[int, ...]
    num_outputs: int
    device: torch.device
    network: StackedNetwork
    generators: Sequence[torch.Generator]

    def drawn(self, task: int) -> StackedNetwork:
        """Draw new networks for a task."""
        return drawn_networks(self.settings, self.shape, self.num_outputs, task, self.device)


def make_members(settings: StreamingSettings, data: Dataset, device: torch.device) -> Members:
    """Build the networks of a run. All combinations of one seed begin with the same parameters, and see the same noise.

    Raises:
        UnknownNameError: If there is no such network.
        ModelError: If the network does not learn from single samples, or does not fit the data.
    """
    shape = tuple(data.inputs(torch.tensor([0])).shape[1:])
    network = drawn_networks(settings, shape, data.num_classes, 0, device)
    _require_fitting(network, data, settings)
    generators = [
        torch.Generator(device).manual_seed(seed_of(seed, "noise"))
        for _ in settings.combinations
        for seed in settings.seeds
    ]
    return Members(settings, shape, data.num_classes, device, network, generators)


def _require_fitting(network: StackedNetwork, data: Dataset, settings: StreamingSettings) -> None:
    """Try the networks on a sample, before anything is written.

    Raises:
        ModelError: If they fail, or do not have an output per class.
    """
    x = data.inputs(torch.zeros(network.num_members, dtype=torch.int64))
    x = x.to(next(iter(network.parameters.values())).device)
    expected = (network.num_members, data.num_classes)
    try:
        with torch.no_grad():
            found = tuple(network.forward(network.prepared(x)).outputs.shape)
            network.outputs(0, x[:1])
    except Exception as error:  # whatever a network makes of images that do not fit
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{settings.model} does not fit the samples of {settings.dataset}: expected a network for inputs of shape "
            f"{tuple(x.shape[1:])}, found that it fails ({type(error).__name__}: {reason}). {_cause(settings, data)}"
        ) from error
    if found != expected:
        raise ModelError(
            f"{settings.model} does not fit the classes of {settings.dataset}: expected {data.num_classes} outputs per "
            f"sample, found the shape {found[1:]}. Is it for another data set? Use another network."
        )


def _cause(settings: StreamingSettings, data: Dataset) -> str:
    """Say why a network may not fit the samples, and what to do."""
    if zoo.image_options(settings.model, tuple(data.images.shape[1:])):
        return (
            "Are the images too small, or not square? lenet-stream needs 16 × 16 pixels or more. Use another network, "
            "such as mlp-stream."
        )
    if data.zoo_sized:
        return (
            "Is the network made for the images' own size? Images of named data sets are brought to 3 × 32 × 32 for "
            "it. Change its first layer, or give the images in an .npz file, which keep their size."
        )
    return "Is the network made for inputs of another shape? Change its first layer, or use mlp-stream."


def drawn_networks(
    settings: StreamingSettings, shape: tuple[int, ...], num_outputs: int, task: int, device: torch.device
) -> StackedNetwork:
    """Build one network per member, with parameters that depend on the seed and the task."""
    options = zoo.image_options(settings.model, shape)
    networks = [
        zoo.build(
            settings.model,
            num_outputs,
            seed=seed_of(seed, "init", *[task] * (task > 0)),
            width=settings.width,
            **options,
        )
        for seed in settings.seeds
    ]
    if settings.learner.has_gates:
        from ntkgen.continual.optim.feature_upgd import gated

        networks = [gated(each) for each in networks]  # type: ignore[arg-type]  # it refuses other modules
    # the stack copies the parameters, so all combinations of a seed can share a network here
    return StackedNetwork([each.to(device) for each in networks] * len(settings.combinations))


def make_learner(settings: StreamingSettings, members: Members) -> Learner:
    """Make the optimizer of all networks, with the hyper-parameters of each.

    Raises:
        ModelError: If the learner is of second order, and the network has a layer without a rule for it.
    """
    options: dict[str, Any] = {}
    for name, value in settings.combinations[0].items():
        values = [each[name] for each in settings.combinations]
        is_shared = len(set(values)) == 1
        options[name] = (
            value if is_shared else torch.tensor(values, dtype=torch.float64).repeat_interleave(len(settings.seeds))
        )
    network = members.network
    optimizer = make_optimizer(
        settings.method,
        network.trainable.items(),
        members=network.num_members,
        generators=members.generators,
        compat=settings.compat,
        **options,
    )
    is_curved = settings.learner.is_second_order or optimizer.needs_curvature
    curvature = _curvature(network.module(0)) if is_curved else None
    if curvature is not None:  # it fails here, before anything is written
        x = torch.zeros(network.num_members, *members.shape, device=members.device)
        curvature(network.parameters, x, torch.zeros(network.num_members, dtype=torch.int64, device=members.device))
    return Learner(network, optimizer, curvature, copies=len(settings.combinations))


def _curvature(module: nn.Module) -> Curvature:
    """Make the function that computes the diagonal Hessian of every network."""
    from ntkgen.continual.optim.hesscale import hessian_diagonal

    def of_one(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = hessian_diagonal(module, parameters, x[None], target[None], "cross-entropy")
        return found

    def compute(parameters: Mapping[str, Tensor], x: Tensor, targets: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found = torch.func.vmap(of_one)(dict(parameters), x, targets)
        return [found[name] for name, values in parameters.items() if values.requires_grad]

    return compute
