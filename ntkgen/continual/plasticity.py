"""Plasticity of a recorded run from its stored parameters: what the network shows at each boundary between tasks."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ntkgen.continual.boundaries import network_at, plan_of
from ntkgen.continual.chance import generator_of
from ntkgen.continual.metrics.confusion import class_accuracy, count_confusions
from ntkgen.continual.metrics.plasticity import THRESHOLD, active_fraction, dormant_units, weight_magnitude
from ntkgen.continual.metrics.ranks import Ranks, Tolerance
from ntkgen.continual.plan import Data, Plan
from ntkgen.continual.reading import RunReader
from ntkgen.continual.streams.tasks import IntArray
from ntkgen.continual.streams.views import NEXT, PREVIOUS, VIEWS, samples_of
from ntkgen.continual.units import hidden_layers, recorded
from ntkgen.errors import DivergedError, InputError, ModelError, UnknownNameError
from ntkgen.training.loop import evaluation_mode

FloatArray = npt.NDArray[np.float64]

# Where the statistics of batch norm come from.
BATCH_NORM = ("running", "batch")
# Samples whose activations are held at a time.
BATCH = 250
# What is measured under each view.
MEASURES = ("dormant_units", *(field.name for field in dataclasses.fields(Ranks)))


@dataclass(frozen=True)
class PlasticitySettings:
    """How plasticity is measured.

    Attributes:
        threshold: A unit is dormant if it is not zero on a smaller fraction of samples and positions.
        num_samples: Maximum number of samples of a view.
        batch_norm: ``running``: batch norm uses its running statistics, as in every evaluation; ``batch``: it uses
            those of the samples of the view, as in the published analysis, which does not leave the training mode. The
            accuracy on classes then has the statistics of batches of as many held-out samples.
        rank_tolerance: Tolerance τ of the numerical rank, or several; None for what the type of the activations
            resolves.
    """

    threshold: float = THRESHOLD
    num_samples: int = 1000
    batch_norm: str = "running"
    rank_tolerance: Tolerance = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UnknownNameError: If ``batch_norm`` is unknown.
            InputError: If a number is not possible.
        """
        if self.batch_norm not in BATCH_NORM:
            raise UnknownNameError("`batch_norm`", self.batch_norm, BATCH_NORM)
        if self.num_samples < 1 or not 0 <= self.threshold <= 1:
            raise InputError(
                "Plasticity cannot be measured so: expected at least one sample and a threshold from 0 to 1, found "
                f"`num_samples` {self.num_samples} and `threshold` {self.threshold:g}. Is a percentage given? Divide "
                "it by 100."
            )


@dataclass(frozen=True, eq=False)
class Plasticity:
    """What the network of a run shows at each boundary, where k tasks are finished, k = 0, 1, ….

    The views are training images without augmentation: ``next_task`` of the classes of task k + 1, and
    ``previous_tasks`` of the classes of all tasks up to k, tasks being counted from 1. They have no samples, and NaN,
    at the last and at the first boundary. Ranks are those of the activations of the last hidden layer, averaged over
    positions. The published arrays do not have the last boundary, where all tasks are finished.

    Attributes:
        next_task: For each of `MEASURES` an array (boundaries,); the numerical rank at several tolerances is
            (boundaries, tolerances).
        previous_tasks: The same.
        weight_magnitude: Mean magnitude of all parameters, (boundaries,).
        class_accuracy: Accuracy at the end on each class in the order of arrival, (classes,): the recorded one, or None
            without one; with the statistics of batches it is measured, by the outputs of the network.
        num_features: Units of the last hidden layer, the largest possible rank.
    """

    next_task: Mapping[str, FloatArray]
    previous_tasks: Mapping[str, FloatArray]
    weight_magnitude: FloatArray
    class_accuracy: FloatArray | None
    num_features: int

    def arrays(self) -> dict[str, FloatArray]:
        """Return all arrays by name, such as ``next_task_dormant_units``."""
        views = {NEXT: self.next_task, PREVIOUS: self.previous_tasks}
        found = {f"{view}_{name}": values for view, each in views.items() for name, values in each.items()}
        found["weight_magnitude"] = self.weight_magnitude
        return found if self.class_accuracy is None else {**found, "class_accuracy": self.class_accuracy}


def measure_plasticity(
    run: RunReader,
    data: Data,
    settings: PlasticitySettings = PlasticitySettings(),
    device: torch.device | str = "cpu",
) -> Plasticity:
    """Measure the plasticity of a recorded run at the beginning and at the end of each finished task.

    Args:
        run: The run.
        data: Its data.
        settings: How it is measured.
        device: Where the networks run.

    Raises:
        FingerprintError: If the run was made from other data.
        StoreError: If stored parameters are missing or damaged.
        ModelError: If the network has no hidden units, or it is not known where.
        DivergedError: If activations are not finite.
    """
    plan, train = plan_of(run, data), data.train.to(device)
    rows: dict[str, list[dict[str, Any]]] = {view: [] for view in VIEWS}
    magnitudes = []
    for boundary in range(run.num_finished + 1):
        model = network_at(run, plan, boundary)
        magnitudes.append(weight_magnitude(param.detach().numpy() for param in model.parameters()))
        model.to(device)
        for view in VIEWS:
            ids = samples_of(view, plan.stream, data.labels, boundary, settings.num_samples, run.settings.seed)
            found = _measured(model, train.inputs(torch.from_numpy(ids)), settings) if len(ids) else {}
            rows[view].append(found)
    columns = {
        view: {name: _column(name, each, settings.rank_tolerance) for name in MEASURES} for view, each in rows.items()
    }
    confusion = None if run.confusion is None else run.confusion[-1]
    if settings.batch_norm == "batch" and run.num_finished:
        confusion = _confusion_of_batches(model, plan, run.num_finished, settings.num_samples)
    accuracy = None if confusion is None else class_accuracy(confusion)
    num_features = int(rows[NEXT][0]["num_features"])
    return Plasticity(columns[NEXT], columns[PREVIOUS], np.array(magnitudes), accuracy, num_features)


def _column(name: str, rows: list[dict[str, Any]], tolerance: Tolerance) -> FloatArray:  # (boundaries[, tolerances])
    """Collect a measure of all boundaries; NaN where a view has no samples."""
    shape = (len(tolerance),) if name == "numerical_rank" and isinstance(tolerance, tuple) else ()
    return np.array([np.broadcast_to(row.get(name, np.nan), shape) for row in rows], np.float64)


def _confusion_of_batches(model: nn.Module, plan: Plan, num_finished: int, batch_size: int) -> IntArray:
    """Count what the network makes of the held-out samples with the statistics of batches of all their classes."""
    data, used = plan.data.held_out, plan.num_used(num_finished - 1)
    device = next(model.parameters()).device
    ids = generator_of(plan.settings.seed, "batches").permutation(np.concatenate(plan.held_out[:num_finished]))
    confusion = np.zeros((plan.stream.num_targets,) * 2, np.int64)
    with evaluation_mode(model), torch.no_grad():
        _choose_statistics(model, "batch")
        for part in np.array_split(ids, -(-len(ids) // batch_size)):  # of nearly the same size: one sample has none
            outputs = model(data.inputs(torch.from_numpy(part)).to(device))[:, :used]
            targets = plan.stream.targets(data.labels.cpu().numpy()[part])
            confusion += count_confusions(targets, outputs.argmax(1).cpu().numpy(), len(confusion))
    return confusion


def _choose_statistics(model: nn.Module, batch_norm: str) -> None:
    """Let batch norm use the statistics of each batch, or its running ones."""
    for module in model.modules():
        module.training = batch_norm == "batch" and isinstance(module, _BatchNorm)


def _measured(model: nn.Module, x: Tensor, settings: PlasticitySettings) -> dict[str, Any]:
    """Measure the activations on some samples.

    Raises:
        ModelError: If there are no hidden units, or it is not known where.
        DivergedError: If activations are not finite.
    """
    active, features = _activations(model, x, settings.batch_norm)
    if not np.isfinite(features).all():
        raise DivergedError(
            "The activations of the last hidden layer are not finite: expected numbers, found NaN or infinity. Did the "
            "training diverge? Measure a run with a lower `learning_rate`."
        )
    ranks = Ranks.of(features, settings.rank_tolerance)
    return {
        "dormant_units": dormant_units(active, settings.threshold),
        "num_features": features.shape[1],
        **dataclasses.asdict(ranks),
    }


def _activations(
    model: nn.Module, x: Tensor, batch_norm: str
) -> tuple[list[FloatArray], npt.NDArray[np.floating]]:  # of (units,) for each layer, (samples, units)
    """Compute how often each hidden unit is active, and the activations of the last layer, averaged over positions.

    Raises:
        ModelError: If there are no hidden units, or it is not known where.
    """
    layers = hidden_layers(model)
    if not layers:
        raise ModelError(
            f"The plasticity of {type(model).__name__} cannot be measured: expected at least one hidden layer, found "
            "none. Is it a linear network? Choose a network with hidden units."
        )
    counts, features = [], []
    with evaluation_mode(model), torch.no_grad():
        _choose_statistics(model, batch_norm)
        for part in x.split(len(x) if batch_norm == "batch" else BATCH):
            with recorded(model, layers) as activations:
                model(part)
            found = [activations[layer.activation].cpu().numpy() for layer in layers]
            counts.append([len(part) * active_fraction(each) for each in found])
            features.append(found[-1].reshape(*found[-1].shape[:2], -1).mean(2))
    return [np.sum(column, 0) / len(x) for column in zip(*counts, strict=True)], np.concatenate(features)
