"""The projected time and bytes of a run, from a short one on a few samples with the same network and method."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ntkgen.continual.chance import seed_of
from ntkgen.continual.evaluation import HeldOut, evaluate
from ntkgen.continual.learner import learn
from ntkgen.continual.network import build_network
from ntkgen.continual.plan import Plan
from ntkgen.continual.probe import choose_probe
from ntkgen.continual.reading import open_seed
from ntkgen.continual.run import Run
from ntkgen.continual.snapshot_layout import SEEN
from ntkgen.continual.streams.tasks import IntArray, Task
from ntkgen.continual.surgery.registry import RESETS
from ntkgen.files.folder import LocalFolder
from ntkgen.jacobian.kernel_function import KernelFunction
from ntkgen.training.loop import training_mode

# Samples of a task on which the short run is evaluated.
HELD_OUT = 64
# Kernels of these numbers of probe samples are measured while there is time.
PROBES = (8, 32, 128, 512, 2048)
# Power of the number of samples with which the time of a kernel is assumed to grow, before it is measured.
USUAL_POWER = 1.5
MAX_STEPS = 10


@dataclass(frozen=True)
class Forecast:
    """What one run is projected to take on this machine.

    Attributes:
        step_seconds: Seconds of an iteration of a later task.
        evaluation_seconds: Seconds of an evaluation on all held-out samples.
        kernel_seconds: Seconds of a kernel of the probe.
        measured_probe: Probe samples of the largest kernel that was measured; see `_kernel_seconds`.
        kernel_bytes: Bytes of one kernel.
        checkpoint_bytes: Bytes of the newest state, and of the parameters at the end of each task.
    """

    step_seconds: float
    evaluation_seconds: float
    kernel_seconds: float
    measured_probe: int
    kernel_bytes: int
    checkpoint_bytes: int

    def to_json(self, described: dict[str, Any]) -> dict[str, Any]:
        """Multiply by the numbers of iterations, evaluations and kernels, which ``described`` lists."""
        seconds = {
            "training": self.step_seconds * described["iterations"],
            "evaluations": self.evaluation_seconds * described["evaluations"],
            "kernels": self.kernel_seconds * described["kernels"],
        }
        return {
            "projected_seconds": {**seconds, "total": sum(seconds.values())},
            "bytes": {
                "kernels": self.kernel_bytes * described["kernels"],
                "checkpoints": self.checkpoint_bytes,
            },
            "measured": vars(self),
        }


def forecast(plan: Plan, device: torch.device, seconds: float) -> Forecast:
    """Measure steps, an evaluation and kernels for about the given time, beside that of a short run."""
    with TemporaryDirectory(prefix="ntkgen-forecast-") as place:
        folder = LocalFolder(Path(place), fsync=False)
        run = learn(_shortened(plan), folder, device)
        sizes, arrays = folder.sizes(), open_seed(folder).kernels
        per_kernel = sum(arrays[name].dtype.itemsize * arrays[name][0].size for name in arrays if "kernel" in str(name))
        rows = len(run.plan.probe.ids)
        models = [size for key, size in sizes.items() if key.startswith("models/")]
        with training_mode(device, seed_of(plan.settings.seed, "noise"), torch.get_num_threads()):
            step = _step_seconds(run, seconds / 3)
            evaluation = _evaluation_seconds(run, sum(len(ids) for ids in plan.held_out))
            kernel, measured = _kernel_seconds(plan, device, seconds / 2)
    return Forecast(
        step_seconds=step,
        evaluation_seconds=evaluation,
        kernel_seconds=kernel,
        measured_probe=measured,
        kernel_bytes=round(per_kernel * (len(plan.probe.ids) / rows) ** 2),
        checkpoint_bytes=sizes["checkpoint.pt"] + max(models) * _num_written(plan),
    )


def _num_written(plan: Plan) -> int:
    """Count the files of parameters: one before the training, and those of each task.

    They are the parameters of the end, those of the last epoch if it is not the end, and those after a reset.
    """
    settings, num_tasks = plan.settings, len(plan.stream)
    of_resets = (num_tasks - 1) * any(name in RESETS for name in settings.surgery)
    return 1 + num_tasks * (1 + (settings.select == "best")) + of_resets


def _shortened(plan: Plan) -> Plan:
    """Keep the first two tasks with a batch or two each, and the fewest probe samples."""
    data, batch = plan.data, plan.settings.batch_size
    tasks = []
    for task in plan.stream.tasks[:2]:
        each = math.ceil(batch / len(task.classes))
        train = _some_of_each_class(task.train, data.labels, task, each)
        validation = _some_of_each_class(task.validation, data.labels, task, max(1, HELD_OUT // len(task.classes)))
        tasks.append(dataclasses.replace(task, train=train, validation=validation, test=task.test[:HELD_OUT]))
    stream = dataclasses.replace(plan.stream, tasks=tuple(tasks))
    batch = min(batch, *(len(task.train) for task in tasks))
    settings = dataclasses.replace(
        plan.settings, batch_size=batch, epochs=1, probe_per_class=1, kernels="task", evaluations="task", dense=None
    )
    return Plan(settings, data, stream, choose_probe(stream, data.labels, settings))


def _some_of_each_class(ids: IntArray, labels: IntArray, task: Task, count: int) -> IntArray:
    return np.concatenate([ids[labels[ids] == label][:count] for label in task.classes])


def _step_seconds(run: Run, seconds: float) -> float:
    """Measure iterations of the last task."""
    task = run.plan.stream.tasks[-1]
    run.task, run.step = task.number, 0
    ids = task.train[: run.plan.settings.batch_size]
    return _median_seconds(lambda: run.train_on(run.method.batch_ids(ids, task, 0)), run.stepper.device, seconds)


def _evaluation_seconds(run: Run, num_held_out: int) -> float:
    """Measure an evaluation, whose time is proportional to the number of held-out samples."""
    plan, data = run.plan, run.data.held_out
    measured, outputs = sum(len(ids) for ids in plan.held_out), plan.stream.num_targets
    each = _median_seconds(
        lambda: evaluate(run.model, run.method, plan.stream, HeldOut(data, plan.held_out), outputs),
        run.stepper.device,
        0.0,
    )
    return each * num_held_out / measured


def _kernel_seconds(plan: Plan, device: torch.device, seconds: float) -> tuple[float, int]:
    """Measure kernels of few probe samples, then of as many as the time allows. The time grows as a power of them.

    Returns:
        The projected time for all probe samples, and the largest number that was measured.
    """
    settings, train = plan.settings, plan.data.train.to(device)
    model = build_network(settings, plan.stream.num_targets).to(device).eval()
    output = "full" if settings.output == SEEN else settings.output

    def measure(count: int) -> float:
        x = train.inputs(torch.from_numpy(plan.probe.ids[:count]))
        function = KernelFunction(model, x, output=output, precision=settings.precision, per_layer=settings.per_layer)
        return _median_seconds(lambda: function(model), device, 0.0)

    total, began = len(plan.probe.ids), time.monotonic()
    first, *larger = [*(count for count in PROBES if count < total), total]
    found = {first: measure(first)}
    spent = time.monotonic() - began
    fitting = [count for count in larger if spent + 3 * found[first] * (count / first) ** USUAL_POWER < seconds - spent]
    if fitting:
        found[fitting[-1]] = measure(fitting[-1])
    last = max(found)
    power = USUAL_POWER if last == first else math.log(found[last] / found[first]) / math.log(last / first)
    return found[last] * (total / last) ** min(2.0, max(1.0, power)), last


def _median_seconds(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Measure some work several times, until the time is used up; at least once after a first time."""
    durations: list[float] = []
    until = time.monotonic() + seconds
    while len(durations) < 2 or (time.monotonic() < until and len(durations) <= MAX_STEPS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - began)
    return float(np.median(durations[1:]))
