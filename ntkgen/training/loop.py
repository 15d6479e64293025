"""The parts of a training that do not depend on its goal: batches, one step, the mode of the process, the accuracy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.data.dataset import Dataset
from ntkgen.jacobian.precision import fixed_threads, flushed_denormals

EVALUATION_BATCH = 1000


class Stepper:
    """Takes the steps of an optimizer, on CUDA in mixed precision.

    Args:
        model: The network.
        optimizer: Its optimizer.
        device: The device of the network.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self._amp_dtype = torch.bfloat16 if _has_bfloat16(device) else torch.float16
        is_scaled = device.type == "cuda" and self._amp_dtype == torch.float16  # bfloat16 needs no scaling
        self._scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)

    def step(self, x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> float:
        """Take one step on a batch, and return its loss.

        Args:
            x: The batch.
            loss_of: Computes the loss of the outputs.
        """
        is_cuda = self.device.type == "cuda"
        # Not on a CPU. There it is 1.4 times faster for a ResNet of 8 channels and one thread, but with two threads the
        # backward pass of torch 2.15 writes outside of its memory, and the process ends with a segmentation fault.
        if is_cuda and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=self._amp_dtype, enabled=is_cuda):
            loss = loss_of(self.model(x))
        self._scaler.scale(loss).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scaling."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        self._scaler.load_state_dict(state)


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


@contextmanager
def training_mode(device: torch.device, seed: int, threads: int) -> Iterator[None]:
    """Flush denormals, seed torch's generators for dropout, fix the threads, and restore all settings at the end."""
    devices = [device] if device.type == "cuda" else []
    with flushed_denormals(), torch.random.fork_rng(devices=devices), fixed_threads(threads):
        torch.manual_seed(seed)
        yield


def batches(order: Tensor, size: int) -> list[Tensor]:
    """Cut an order into batches. A last batch of one sample is merged, because batch norm needs two samples.

    >>> [len(batch) for batch in batches(torch.arange(7), 3)]
    [3, 4]
    """
    cut = list(order.split(size))
    if len(cut) > 1 and len(cut[-1]) == 1:
        cut[-2:] = [torch.cat(cut[-2:])]
    return cut


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Measure the accuracy in per cent on all samples, without augmentation, in evaluation mode and full precision."""
    correct = 0
    with evaluation_mode(model), torch.no_grad():
        for ids in torch.arange(data.num_samples, device="cpu").split(EVALUATION_BATCH):
            predicted = model(data.inputs(ids)).argmax(1)
            correct += int((predicted == data.labels[ids.to(data.labels.device)]).sum())
    return 100 * correct / data.num_samples
