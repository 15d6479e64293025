"""Stacked networks that learn a stream: a step of all of them, and what is measured in it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ntkgen.continual.optim.stacked import StackedOptimizer
from ntkgen.continual.streaming.measures import EACH_STEP, THINNED
from ntkgen.continual.streaming.network import StackedNetwork
from ntkgen.continual.streaming.statistics import (
    accuracy,
    inactive_units,
    losses,
    plasticity,
    thinned_measures,
    weights_of,
    where_finite,
)

# Computes the diagonal of the Hessian for every parameter of a stack, from samples and targets.
Curvature = Callable[[Mapping[str, Tensor], Tensor, Tensor], Sequence[Tensor]]


class Learner:
    """Networks of a stack and their optimizer.

    Each step is test-then-train: the prediction of a sample counts before the sample is learnt.

    Args:
        network: The networks.
        optimizer: The optimizer of their stacked parameters.
        curvature: Computes what a second-order optimizer needs; None for the others.
        copies: Number of networks that get the same sample; the first of each seed, then the second, ….
    """

    def __init__(
        self,
        network: StackedNetwork,
        optimizer: StackedOptimizer,
        curvature: Curvature | None = None,
        copies: int = 1,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        optimizer.draws_ahead = True
        self.copies = copies
        self._curvature = curvature

    def learn(
        self,
        x: Tensor,
        targets: Tensor,
        measured: Collection[int] = (),
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, npt.NDArray[Any]]:  # each (steps, members)
        """Learn some samples of every member, one after the other.

        Args:
            x: The samples, (steps, members / copies, …).
            targets: Their classes, (steps, members / copies).
            measured: The steps after which norms and ranks are measured.
            is_stopped: Says after each step whether to leave out the later ones.

        Returns:
            What was measured: `EACH_STEP` for each step, `THINNED` for those of ``measured``.
        """
        steps: list[Tensor] = []
        thinned: list[Tensor] = []
        for step, (inputs, classes) in enumerate(zip(x, targets, strict=True)):
            steps.append(self._step(self._copied(inputs), self._copied(classes)))
            if step in measured:
                thinned.append(self.measure_thinned())
            if is_stopped():
                break
        return _by_name(EACH_STEP, steps) | _by_name(THINNED, thinned)

    def _copied(self, values: Tensor) -> Tensor:  # (members / copies, …) -> (members, …)
        return values if self.copies == 1 else values.repeat(self.copies, *[1] * (values.ndim - 1))

    def _step(self, x: Tensor, targets: Tensor) -> Tensor:  # (measures, members)
        params = list(self.network.trainable.values())
        prepared = self.network.prepared(x)
        before = self.network.forward(prepared)
        loss = losses(before.outputs, targets)
        for param, grad in zip(params, torch.autograd.grad(loss.sum(), params), strict=True):
            param.grad = grad
        if self._curvature is None:
            self.optimizer.step()
        else:
            self.optimizer.step(curvature=self._curvature(self.network.parameters, x, targets))
        with torch.no_grad():
            after = self.network.forward(prepared)
            later = losses(after.outputs, targets)
            found = {
                "loss": loss.detach(),
                "accuracy": accuracy(before.outputs, targets, loss),
                "plasticity": plasticity(loss.detach(), later),
                "inactive_units": where_finite(loss + later, inactive_units(after.rectified)),
            }
        return torch.stack([found[name].to(loss.dtype) for name in EACH_STEP])

    def measure_thinned(self) -> Tensor:  # (measures, members)
        """Measure norms and ranks of the weights, and norms of their last gradient."""
        parameters = self.network.parameters
        grads = {name: values.grad for name, values in parameters.items() if values.grad is not None}
        found = thinned_measures(weights_of(parameters), weights_of(grads))
        return torch.stack([found[name].double() for name in THINNED])


def _by_name(names: Mapping[str, Any], rows: list[Tensor]) -> dict[str, npt.NDArray[Any]]:
    if not rows:
        return {}
    values = torch.stack(rows).double().cpu().numpy()  # (steps, measures, members)
    return {name: np.ascontiguousarray(values[:, index]) for index, name in enumerate(names)}
