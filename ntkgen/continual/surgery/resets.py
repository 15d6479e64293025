"""Resets at a boundary: the head, or the whole network, is drawn anew before a later task begins."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ntkgen.continual.chance import seed_of
from ntkgen.continual.streams.tasks import Task
from ntkgen.continual.surgery.surgery import Subject, Surgery
from ntkgen.errors import InputError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence


class ResetHead(Surgery):
    """Draws the last linear layer anew before each later task, as at the construction of the network.

    With the option ``full_reset``, what the optimizer keeps of it is forgotten.

    Raises:
        InputError: If it is not known how to build the network.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        _require_fresh(subject)

    def at_boundary(self, task: Task) -> None:
        """Draw the head from the seed of the run and the number of the task."""
        reset(self.subject, task, f"{self.subject.head}.")


class ResetNetwork(Surgery):
    """Draws the whole network anew before each later task: the baseline that is retrained from scratch.

    With the option ``full_reset``, the statistics of batch norm and all other buffers begin anew too, what the
    optimizer keeps is forgotten, and other surgeries forget what they know of the units. In the published code all of
    that survives.

    Attributes:
        others: The other surgeries of the run.

    Raises:
        InputError: If it is not known how to build the network.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.others: Sequence[Surgery] = ()
        _require_fresh(subject)

    def at_boundary(self, task: Task) -> None:
        """Draw the network from the seed of the run and the number of the task."""
        reset(self.subject, task)
        if self.subject.options.full_reset:
            for surgery in self.others:
                surgery.restart()


@torch.no_grad()
def reset(subject: Subject, task: Task, prefix: str = "") -> None:
    """Give parameters whose names begin with a prefix the values that they have in a new network.

    Raises:
        ShapeError: If the new network has another shape.
    """
    assert subject.fresh is not None
    new = _tensors(subject.fresh(seed_of(subject.seed, "init", task.number)), subject)
    for name, tensor in _tensors(subject.model, subject).items():
        if not name.startswith(prefix):
            continue
        if name not in new or new[name].shape != tensor.shape:
            raise ShapeError(
                f"The network cannot be reset: expected {name} of shape {tuple(tensor.shape)} in the new network, "
                f"found {tuple(new[name].shape) if name in new else 'none'}. Does `fresh` build it with another number "
                "of outputs? Let it build the network as it is now."
            )
        tensor.copy_(new[name])
        if subject.options.full_reset:
            # A new optimizer begins with zeros. A fused step needs them for all parameters, or for none.
            for value in subject.optimizer.state.get(tensor, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()


def _tensors(model: nn.Module, subject: Subject) -> dict[str, Tensor]:
    """List the parameters, and with the option ``full_reset`` the buffers."""
    return dict(model.named_parameters()) | (dict(model.named_buffers()) if subject.options.full_reset else {})


def _require_fresh(subject: Subject) -> None:
    if subject.fresh is None:
        raise InputError(
            "The network cannot be reset: expected `fresh`, a function that builds it anew from a seed, found none. "
            "Was the subject made without it? Give it, or leave the resets out."
        )
