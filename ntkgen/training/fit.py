"""Training of a network until a target accuracy. A network that misses the target can be refused."""

import copy
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkgen.data.dataset import Dataset
from ntkgen.errors import DivergedError, NotConvergedError
from ntkgen.files.folder import File, file_of
from ntkgen.training import checkpoint as checkpoints
from ntkgen.training.checkpoint import Checkpoint
from ntkgen.training.loop import Stepper, batches, training_mode
from ntkgen.training.loop import accuracy as measure_accuracy
from ntkgen.training.recipe import Recipe

# Number of measured steps for a projection of the training time.
MEASURED_STEPS = 2


class EpochReport(Protocol):
    """Called after every step and, with an accuracy, after every epoch."""

    def __call__(self, epoch: int, step: int, num_steps: int, accuracy: float | None) -> None:
        """Report the progress of training."""


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a layer is a batch norm. The default learning rate depends on this."""
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in model.modules())


@dataclass
class _Run:
    """A network in training, with all state that changes from step to step."""

    model: nn.Module
    recipe: Recipe
    device: torch.device
    epoch: int = 0

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=max(1, recipe.num_epochs))
        self.order = torch.Generator("cpu").manual_seed(
            recipe.seed
        )  # for sample order and augmentation; dropout uses torch's generator
        self.stepper = Stepper(self.model, self.optimizer, self.device)

    def resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.training
        checkpoints.load_state(self.model, checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.stepper.load_state_dict(state["scaler"])
        self.order.set_state(state["random"]["order"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        self.epoch = checkpoint.epoch

    def checkpoint(self, accuracy: float | None, loss: float | None, target_accuracy: float) -> Checkpoint:
        random = {"order": self.order.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.stepper.state_dict(),
            "random": random,
            "threads": torch.get_num_threads(),
        }
        is_finished = self.epoch >= self.recipe.num_epochs or (accuracy is not None and accuracy >= target_accuracy)
        return Checkpoint(self.recipe, self.epoch, accuracy, loss, is_finished, _state(self.model), training)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers to the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    place: File | Path,
    *,
    target_accuracy: float,
    report: EpochReport = lambda *_: None,
) -> Checkpoint:
    """Train until the accuracy on the training samples reaches the target.

    The accuracy is measured without augmentation and in evaluation mode. The loss is the cross-entropy. It is minimised
    by stochastic gradient descent with momentum, weight decay and a cosine schedule over the recipe's epochs. A
    checkpoint is written after each epoch, and an interrupted run resumes from it. On a CPU the result of a resumed run
    has the same bits as that of an uninterrupted run. With zero epochs the network is not trained. Otherwise the module
    is trained in place, on its own device.

    Raises:
        DivergedError: If the loss is not finite. The checkpoint of the last good epoch is kept.
        FingerprintError: If the checkpoint at this path has another recipe.
    """
    path = file_of(place)
    checkpoint = checkpoints.load(path) if path.exists else None
    if checkpoint is not None:
        checkpoints.check_recipe(path, checkpoint, recipe)
        if checkpoint.is_finished:  # kernels of this checkpoint may exist
            return checkpoint
    elif recipe.num_epochs == 0:  # no optimizer, because its import takes more than a second
        checkpoint = Checkpoint(recipe, 0, None, None, is_finished=True, state=_state(model), training={})
        checkpoints.save(path, checkpoint)
        return checkpoint
    device = next(model.parameters()).device
    threads = torch.get_num_threads() if checkpoint is None else checkpoint.training["threads"]
    with training_mode(device, recipe.seed, threads):
        if device.type == "cuda":
            model.to(memory_format=torch.channels_last)
        run = _Run(model, recipe, device)
        if checkpoint is not None:
            run.resume(checkpoint)
        else:
            checkpoint = run.checkpoint(None, None, target_accuracy)
            checkpoints.save(path, checkpoint)
        data = data.to(device)
        while not checkpoint.is_finished:
            loss = _train_epoch(run, data, path, report)
            accuracy = measure_accuracy(run.model, data)
            checkpoint = run.checkpoint(accuracy, loss, target_accuracy)
            checkpoints.save(path, checkpoint)
            report(run.epoch, _num_steps(run, data), _num_steps(run, data), accuracy)
    return checkpoint


def seconds_to_train(model: nn.Module, data: Dataset, recipe: Recipe) -> float:
    """Project an upper bound of the training time in seconds, from a few steps with a copy of the network."""
    copied = copy.deepcopy(model)
    device = next(copied.parameters()).device
    with training_mode(device, recipe.seed, torch.get_num_threads()):
        run, data = _Run(copied.train(), recipe, device), data.to(device)
        all_ids = batches(torch.arange(data.num_samples, device="cpu"), recipe.batch_size)
        steps = []
        for ids in all_ids[: MEASURED_STEPS + 1]:  # the first step is a warm-up
            started = time.perf_counter()
            _take_step(run, data, ids)
            steps.append(time.perf_counter() - started)
        ids = all_ids[0]
        copied.eval()
        started = time.perf_counter()
        with torch.no_grad():
            float(copied(data.inputs(ids)).sum())
        evaluating = (time.perf_counter() - started) * data.num_samples / len(ids)
    return recipe.num_epochs * (len(all_ids) * statistics.median(steps[1:] or steps) + evaluating)


def has_converged(checkpoint: Checkpoint, target_accuracy: float) -> bool:
    """Return whether a checkpoint has reached the target. This is true for a network that is not trained."""
    if checkpoint.recipe.num_epochs == 0:
        return True
    return checkpoint.train_accuracy is not None and checkpoint.train_accuracy >= target_accuracy


def require_convergence(path: File, checkpoint: Checkpoint, target_accuracy: float) -> None:
    """Refuse a network that has not reached its target.

    Raises:
        NotConvergedError: If the accuracy is below the target. The checkpoint is kept.
    """
    if not has_converged(checkpoint, target_accuracy):
        recipe = checkpoint.recipe
        raise NotConvergedError(
            f"{recipe.model} on {recipe.dataset} did not converge: expected {target_accuracy:g} % training accuracy, "
            f"found {checkpoint.train_accuracy:.2f} % after {checkpoint.epoch} of {recipe.num_epochs} epochs, where "
            f"its training ended. Too few epochs, a lower target then, a learning rate ({recipe.learning_rate:g}) "
            f"that does not suit it? Its checkpoint is kept at {path}: lower `target_accuracy`, set "
            "`allow_unconverged`, or train anew with other settings and another `out`."
        )


def _num_steps(run: _Run, data: Dataset) -> int:
    return len(batches(torch.arange(data.num_samples, device="cpu"), run.recipe.batch_size))


def _take_step(run: _Run, data: Dataset, ids: Tensor) -> float:
    labels = data.labels[ids.to(data.labels.device)]
    return run.stepper.step(data.batch(ids, run.order), lambda outputs: F.cross_entropy(outputs, labels))


def _train_epoch(run: _Run, data: Dataset, path: File, report: EpochReport) -> float:
    """Train one epoch, with the samples in random order, and return the mean loss.

    Raises:
        DivergedError: If a loss is not finite.
    """
    run.model.train()
    order = torch.randperm(data.num_samples, generator=run.order, device="cpu")
    total = 0.0
    for step, ids in enumerate(batches(order, run.recipe.batch_size)):
        loss = _take_step(run, data, ids)
        if not math.isfinite(loss):
            raise DivergedError(
                f"The loss became {loss} in epoch {run.epoch + 1}, step {step + 1}: training of {run.recipe.model} "
                f"diverged. A learning rate of {run.recipe.learning_rate:g} is probably too high for it. Train anew "
                f"with a lower `learning_rate` and another `out`; the last good epoch ({run.epoch}) is kept at {path}."
            )
        total += loss * len(ids)
        report(run.epoch, step + 1, _num_steps(run, data), None)
    run.scheduler.step()
    run.epoch += 1
    return total / data.num_samples
