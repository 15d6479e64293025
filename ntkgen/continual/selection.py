"""The parameters of the best epoch of a task."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class BestEpoch:
    """Keeps the parameters and buffers of the epoch with the largest validation accuracy, the first of several.

    Choosing the epoch of each task on validation samples is early stopping without its saving of time: training always
    runs to the last epoch (Dohare et al. 2024, Nature 632, incremental CIFAR-100).
    """

    def __init__(self) -> None:
        self.accuracy = -1.0
        self.epoch = -1
        self.tensors: dict[str, Tensor] = {}

    def offer(self, epoch: int, accuracy: float, model: nn.Module) -> None:
        """Keep a copy of the network if its accuracy is strictly larger than that of all epochs before.

        Args:
            epoch: Number of the epoch in its task, from 1.
            accuracy: Its validation accuracy.
            model: The network at its end.
        """
        if accuracy > self.accuracy:
            self.accuracy, self.epoch = accuracy, epoch
            self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def restore(self, model: nn.Module) -> int:
        """Copy what is kept into the network, forget it, and return the number of the epoch."""
        model.load_state_dict(self.tensors)
        epoch = self.epoch
        self.accuracy, self.epoch, self.tensors = -1.0, -1, {}
        return epoch

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept."""
        return {"accuracy": self.accuracy, "epoch": self.epoch, "tensors": self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        self.accuracy, self.epoch = float(state["accuracy"]), int(state["epoch"])
        self.tensors = {name: tensor.clone() for name, tensor in state["tensors"].items()}
