"""The interface of a surgery, which acts on the units or parameters of a network during training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ntkgen.continual.streams.tasks import Task
from ntkgen.continual.surgery.options import SurgeryOptions
from ntkgen.continual.units import HiddenLayer


@dataclass(frozen=True, eq=False)
class Subject:
    """What surgeries act on.

    Attributes:
        model: The network, on its device.
        optimizer: Its optimizer.
        layers: Its hidden layers, for surgeries that need features; see `ntkgen.continual.units.hidden_layers`.
        head: Name of its last linear layer, for the reset of the head.
        seed: Seed of the run.
        options: Options of the surgeries.
        fresh: Builds the same network, with as many outputs as it has now, with new parameters from a seed. For resets.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    layers: tuple[HiddenLayer, ...] = ()
    head: str = ""
    seed: int = 0
    options: SurgeryOptions = field(default_factory=SurgeryOptions)
    fresh: Callable[[int], nn.Module] | None = None


class Surgery:
    """Something that acts after a step or at a boundary.

    A run calls `after_step` after each step of the optimizer, and `at_boundary` at the beginning of each task but the
    first. What changes during a run is what `state_dict` returns: tensors and plain values, by the name of the layer
    and never by its module, so that a resumed run acts on its own network.
    """

    needs_features: ClassVar[bool] = False
    """Whether `after_step` needs the activations of the hidden layers."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def after_step(self, features: Mapping[str, Tensor]) -> int:  # noqa: ARG002 - for those that need them
        """Act after a step of the optimizer.

        Args:
            features: The activations of the hidden layers on the batch, before the step, by the name of the activation
                module; see `ntkgen.continual.units.recorded`.

        Returns:
            The number of units that were replaced.
        """
        return 0

    def at_boundary(self, task: Task) -> None:
        """Act before a later task begins."""

    def restart(self) -> None:
        """Forget what is known of the units, because the whole network has been drawn anew."""

    def state_dict(self) -> dict[str, Any]:
        """Return all state that changes during a run."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        assert not state
