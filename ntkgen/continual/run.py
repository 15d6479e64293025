"""A run of continual learning at work: its network, its method, its record, and where it is."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkgen.continual.batches import augmented, training_inputs
from ntkgen.continual.chance import seed_of
from ntkgen.continual.checkpoint import saved
from ntkgen.continual.evaluation import Evaluation, HeldOut, evaluate
from ntkgen.continual.heads import grow_head, growing_head
from ntkgen.continual.network import build_network, fitting_network, subject_of
from ntkgen.continual.optimizer import make_optimizer
from ntkgen.continual.plan import Plan, steps_per_epoch
from ntkgen.continual.record import MEASURES, Record, is_begun, plain_values
from ntkgen.continual.schedule import Moment
from ntkgen.continual.selection import BestEpoch
from ntkgen.continual.series import ROOT
from ntkgen.continual.snapshots import Snapshots
from ntkgen.continual.streams.tasks import IntArray, Task
from ntkgen.continual.surgery import make_surgeries
from ntkgen.continual.surgery.registry import RESETS
from ntkgen.continual.training_log import Stopwatch, TrainingLog
from ntkgen.continual.units import recorded
from ntkgen.errors import DivergedError
from ntkgen.files.folder import Folder
from ntkgen.training.loop import Stepper

# Seconds after which a checkpoint is written within an epoch. One is also written at the end of each epoch.
COMMIT_SECONDS = 30.0
# What a checkpoint says of where the run is.
POSITION = ("task", "step", "iteration", "epochs_done", "has_begun", "num_outputs")


Announce = Callable[[str], None]
"""Called with a line of text for each epoch and for each window of iterations."""


def say_nothing(line: str) -> None:
    """Announce nothing."""


class Run:
    """A run at work: its network, its method, its record, and where it is."""

    def __init__(self, plan: Plan, folder: Folder, device: torch.device, announce: Announce = say_nothing) -> None:
        settings = plan.settings
        self.plan, self.announce = plan, announce
        self.data = plan.data.to(device)
        facts = plan.facts
        is_begun(folder, settings, facts)  # refuses other settings; what follows refuses a network that does not fit
        self.num_outputs = plan.num_outputs(0)
        self.model = fitting_network(plan, device)
        self.optimizer = make_optimizer(settings, self.model)
        self.stepper = Stepper(self.model, self.optimizer, device)
        self.method = plan.method(self.model, self.data.train.inputs)
        subject = subject_of(settings, self.model, self.optimizer, lambda: self.num_outputs)
        self.layers, self.surgeries = subject.layers, make_surgeries(settings.surgery, subject)
        self.training, self.best, self.watch = TrainingLog(), BestEpoch(), Stopwatch()
        self.snapshots = self._opened_snapshots(folder / "kernels.zarr")  # refuses a kernel that is not defined
        self.record = Record.open(folder, settings, plan.stream, plan.probe, facts)
        self.task, self.step, self.iteration, self.epochs_done = 0, 0, 0, 0.0
        self.has_begun = False  # whether the method has prepared the task
        self.planned = [steps * settings.epochs for steps in steps_per_epoch(plan)]  # iterations per task
        self.accuracy: float | None = None  # mean over the tasks so far, at the last evaluation
        self._committed = time.monotonic()

    def _opened_snapshots(self, folder: Folder) -> Snapshots:
        plan, settings = self.plan, self.plan.settings
        if folder.has(ROOT) is False and folder.has("kernel/zarr.json"):
            folder.clear()  # its creation was interrupted
        labels = plan.data.labels[plan.probe.ids]
        return Snapshots(
            folder,
            self.model,
            self.data.train.inputs(torch.from_numpy(plan.probe.ids)),
            labels=plan.stream.targets(labels),
            tasks=plan.probe.tasks,
            sample_ids=plan.probe.ids,
            output=settings.output,
            precision=settings.precision,
            per_layer=settings.per_layer,
            num_outputs=plan.stream.num_targets,
            lazy_error=settings.lazy_error,
        )

    # where it is -----------------------------------------------------------------------------------------------------

    def resume(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Continue from the newest checkpoint, and drop what is later; without one begin anew."""
        if checkpoint is not None:
            self._load(checkpoint)
        last = self.iteration if checkpoint is not None else -1
        self.record.rewind(last)
        self.snapshots.truncate(last)

    def commit(self) -> None:
        """Write the newest state."""
        self.record.commit(saved(self._state()))
        self._committed = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint was written some time ago."""
        return time.monotonic() - self._committed > COMMIT_SECONDS

    def _state(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if self.stepper.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.stepper.device)
        return {
            "position": {name: getattr(self, name) for name in POSITION},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stepper": self.stepper.state_dict(),
            "method": self.method.state_dict(),
            "snapshots": self.snapshots.state_dict(),
            "training": self.training.state_dict(),
            "best": self.best.state_dict(),
            "watch": self.watch.state_dict(),
            "surgery": {name: surgery.state_dict() for name, surgery in self.surgeries.items()},
            "random": random,
            "threads": torch.get_num_threads(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.grow(state["position"].get("num_outputs", self.num_outputs))
        for name, value in state["position"].items():
            setattr(self, name, value)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stepper.load_state_dict(state["stepper"])
        self.method.load_state_dict(state["method"])
        self.snapshots.load_state_dict(state.get("snapshots", {}))
        for name, surgery in self.surgeries.items():
            surgery.load_state_dict(state["surgery"][name])
        for name in ("training", "best", "watch"):  # a checkpoint of an earlier version has none of them
            getattr(self, name).load_state_dict(state.get(name, getattr(self, name).state_dict()))
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and self.stepper.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.stepper.device)

    def note(self, moment: Moment) -> str:
        """Say where the run is, for the progress."""
        settings, epoch = self.plan.settings, math.ceil(moment.step / moment.steps_per_epoch)
        parts = [f"task {moment.task + 1}/{len(self.plan.stream)}", f"epoch {epoch}/{settings.epochs}"]
        return ", ".join(parts if self.accuracy is None else [*parts, f"accuracy {self.accuracy:.3f}"])

    # what it does ----------------------------------------------------------------------------------------------------

    def begin(self, task: Task) -> None:
        """Begin a task: the head grows, the method prepares, and the optimizer may begin anew."""
        before = self.num_outputs
        self.grow(self.plan.num_outputs(task.number), task.number)
        if self.num_outputs > before:
            found = {"iteration": self.iteration, "step": 0, "task": task.number, "num_outputs": self.num_outputs}
            self.record.log("head grown", found)
        self.method.begin(task, self.model)
        if task.number and self.surgeries:
            self._operate(task)
        if self.plan.settings.reset_optimizer:
            self.optimizer.state.clear()  # what a new optimizer has
        self.has_begun = True

    def _operate(self, task: Task) -> None:
        """Let the surgeries act before a later task, and keep the parameters after a reset."""
        for surgery in self.surgeries.values():
            surgery.at_boundary(task)
        if any(name in RESETS for name in self.surgeries):
            self.write_parameters(f"task{task.number - 1}-reset")

    def grow(self, num_outputs: int, task: int = 0) -> None:
        """Give the head more outputs, with rows that are drawn for a task."""
        if num_outputs == self.num_outputs:
            return
        heads = growing_head(self.model, self.num_outputs, build_network(self.plan.settings, num_outputs, task))
        grow_head(*heads, self.optimizer)
        self.num_outputs = num_outputs

    def look(self, moment: Moment) -> None:
        """Evaluate and compute the kernel, as the schedules say.

        Raises:
            DivergedError: If outputs of the network are not finite.
        """
        settings = self.plan.settings
        if settings.evaluation_schedule.contains(moment):
            with self.watch.measured("evaluation"):
                found = self._evaluated(moment.task, self._held_out())
            where = {"iteration": self.iteration, "trained_task": moment.task, "epoch": self.epochs_done}
            self.accuracy = float(found.accuracy[: moment.task + 1].mean())
            self.announce(f"task {moment.task + 1}, iteration {self.iteration}: held-out accuracy {self.accuracy:.3f}")
            self.record.evaluated({**where, **{name: getattr(found, name) for name in MEASURES}})
            if moment.ends_task:
                self.record.ended_task(self.iteration, found.confusion[: moment.task + 1].sum(0))
        if settings.kernel_schedule.contains(moment):
            self._take_snapshot(moment.task)

    def num_used(self, task: int) -> int:
        """Count the outputs that the loss and the predictions use."""
        return min(self.plan.num_used(task), self.num_outputs)

    def _evaluated(self, task: int, held_out: HeldOut) -> Evaluation:
        return evaluate(self.model, self.method, self.plan.stream, held_out, self.num_used(task))

    def _held_out(self) -> HeldOut:
        settings, data = self.plan.settings, self.data.held_out
        if not settings.augment_evaluation:
            return HeldOut(data, self.plan.held_out)
        seed = seed_of(settings.seed, "augment", self.iteration)  # a resumed run draws the same
        return HeldOut(augmented(data, settings), self.plan.held_out, torch.Generator("cpu").manual_seed(seed))

    def _take_snapshot(self, task: int) -> None:
        rate = float(self.optimizer.param_groups[0]["lr"])
        num_seen = self.plan.stream.num_seen(task)
        try:
            self.snapshots(
                self.model,
                iteration=self.iteration,
                epoch=self.epochs_done,
                task=task,
                step_size=rate,
                num_seen=num_seen,
            )
        except DivergedError as error:
            raise self._diverged("outputs are not finite") from error

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"The training diverged in task {self.task}, iteration {self.iteration}: expected finite numbers, found "
            f"that {what}. Is the learning rate of {self.plan.settings.learning_rate:g} too high? Run it with a lower "
            "`learning_rate` and another `out`. What is recorded so far is kept."
        )

    def train_on(self, ids: IntArray, *, frozen: bool = False) -> float:
        """Take one step on some samples.

        Args:
            ids: The samples.
            frozen: Whether the network is in evaluation mode, with fixed statistics of batch norm.

        Raises:
            DivergedError: If the loss is not finite.
        """
        targets = torch.from_numpy(self.plan.stream.targets(self.plan.data.labels[ids])).to(self.stepper.device)
        self.model.train(not frozen)
        x = training_inputs(self.data.train, ids, self.plan.settings, self.task, self.step)
        used = self.num_used(self.task)
        is_correct: list[Tensor] = []

        def loss_of(outputs: Tensor) -> Tensor:
            visible = outputs if outputs.shape[1] == used else outputs[:, :used]
            is_correct.append(visible.detach().argmax(1) == targets)
            return self.method.loss(visible, targets, x)

        with recorded(self.model, self.layers) as features:
            loss = self.stepper.step(x, loss_of)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss}")
        replaced = sum(surgery.after_step(features) for surgery in self.surgeries.values())
        self.training.add(loss, float(is_correct[0].double().mean()), replaced)
        if (mean := self.training.last_window) is not None:
            self.announce(f"task {self.task + 1}, iteration {self.iteration + 1}: training accuracy {mean:.3f}")
        return loss

    def end_epoch(self, moment: Moment) -> None:
        """Log the training of an epoch, and keep its parameters if it is the best one so far."""
        stream, number = self.plan.stream, moment.step // moment.steps_per_epoch
        self.watch.end_epoch()
        line = {"iteration": self.iteration, "task": moment.task, "epoch": self.epochs_done, **self.training.finish()}
        if self.plan.settings.select == "best":
            ids = [task.validation for task in stream.tasks[: moment.task + 1]]
            counts = [len(each) for each in ids]
            with self.watch.measured("validation"):
                found = self._evaluated(moment.task, HeldOut(self.data.train, ids))
            line["validation_accuracy"] = float(np.average(found.accuracy, weights=counts))
            line["validation_loss"] = float(np.average(found.loss, weights=counts))
            self.best.offer(number, line["validation_accuracy"], self.model)
        self.record.log("epoch", line)
        validation = f", validation {line['validation_accuracy']:.3f}" if "validation_accuracy" in line else ""
        self.announce(
            f"task {moment.task + 1}/{len(stream)}, epoch {number}/{self.plan.settings.epochs}: training loss "
            f"{line['loss']:.4f}, accuracy {line['accuracy']:.3f}{validation}; {self.watch.seconds['epoch'][-1]:.1f} s"
        )

    def end(self, task: Task) -> None:
        """End a task: choose its epoch, finish the method, and write the parameters."""
        if self.plan.settings.select == "best":
            self._select(task)
        self.method.end(task, self.model)
        self.write_parameters(f"task{task.number}")

    def _select(self, task: Task) -> None:
        """Restore the best epoch, and record what the last one achieves on the held-out samples."""
        last = self._evaluated(task.number, self._held_out())
        self.write_parameters(f"task{task.number}-last")
        epoch = self.best.restore(self.model)
        values = {name: plain_values(getattr(last, name)) for name in ("accuracy", "loss")}
        self.record.log("epoch selected", {"iteration": self.iteration, "task": task.number, "epoch": epoch, **values})

    def write_parameters(self, name: str) -> None:
        """Write the present parameters and buffers below ``models``."""
        self.record.folder.write(f"models/{name}.pt", saved(self.model.state_dict()))
