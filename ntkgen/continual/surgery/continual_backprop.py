"""Continual backpropagation: after each step, a small fraction of the least useful hidden units begins anew."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ntkgen.continual.surgery.replacement import Replacement
from ntkgen.continual.surgery.surgery import Subject, Surgery
from ntkgen.continual.surgery.turnover import Turnover
from ntkgen.continual.surgery.utilities import CENTERED, UTILITIES, Observation

# What is kept of each unit.
ARRAYS = ("age", "trace", "mean")


class ContinualBackprop(Surgery):
    """Replaces mature units with the smallest utility; for linear layers, convolutions, and residual networks.

    Every unit of every hidden layer has an age a in steps, and a running mean of its utility in each step, for example
    w̄_out · mean |h| for the outgoing weights w_out and the activations h:

        trace ← η trace + (1 − η) utility,    û = trace / (1 − η^a).

    Units with an age above the maturity are eligible. At each step `Turnover` says how many units of a layer are
    replaced: those of the smallest û among the eligible ones. They get new incoming weights and no outgoing ones, see
    `Replacement`, and their age, trace and running mean of activations begin anew. Without the correction by the age,
    units that have just become eligible would be replaced first.

    In a residual network, the weights that leave a unit are those of the next layer on the main path; shortcuts are
    ignored, as in the paper. With the option ``transfer_bias``, the bias of the next layer gets Σ w_out ĥ of a replaced
    unit, with the running mean ĥ of its activations. Its outputs then stay as they were if h is constant. At the border
    of a padded convolution that is approximate. Behind batch norm it would have no effect.

    The published code for residual networks instead sums mean |h|, without decay, over all steps of the run, also those
    before a replacement, and computes û = w̄_out · (1 − η) Σ mean |h|: the option ``activation_mean``.

    The host never waits for a result of the device: it knows how many units are replaced, and not which ones.

    References:
        Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton (2024), Nature 632, 768–774, arXiv:2306.13812.

    Raises:
        ModelError: If there are no hidden layers.
    """

    needs_features = True

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.options = subject.options
        self.replace = Replacement(subject)
        self.layers = self.replace.layers
        sizes = [layer.num_units for layer in self.layers]
        stops = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._slices = [slice(start, stop) for start, stop in pairwise(stops)]
        weight = self.layers[0].incoming.weight
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        # One array for all layers: a step then has few operations.
        self.age = torch.zeros(sum(sizes), dtype=torch.int64, device=weight.device)
        self.trace, self.mean = (torch.zeros(sum(sizes), dtype=self._dtype, device=weight.device) for _ in range(2))
        self.turnovers = [Turnover(size, self.options, self._draw) for size in sizes]
        normed = {layer.name for layer in self.layers if layer.norm is not None}
        following = {layer.incoming: layer.outgoing for layer in subject.layers}
        self._transfers = [
            self.options.transfer_bias
            and layer.outgoing.bias is not None
            and not {layer.name, following[layer.name]} & normed
            for layer in self.layers
        ]
        self._is_summed = self.options.activation_mean == "sum"
        self._needs_mean = any(self._transfers) or self.options.unit_utility in CENTERED

    @torch.no_grad()
    def after_step(self, features: Mapping[str, Tensor]) -> int:
        """Replace units, and say how many."""
        if not self.options.replacement_rate:
            return 0
        self.age += 1
        seen = Observation(self.layers, features, self._dtype)
        self._observe(seen)
        counts = [turnover.advance() for turnover in self.turnovers]
        if any(counts):
            scores = self._scores(seen).masked_fill(self.age <= self.options.maturity, torch.inf)
            # In the order of the computation: the new incoming weights of the next layer overwrite the zeros that leave
            # this one, from new units to new units.
            for k, count in enumerate(counts):
                if count:
                    self._replace(k, scores[self._slices[k]].argsort(stable=True)[:count])
        return sum(counts)

    def restart(self) -> None:
        """Begin with units of age 0."""
        for turnover in self.turnovers:
            turnover.begin([0] * turnover.num_units)
        for name in ARRAYS:
            getattr(self, name).zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept of each unit and of each layer, and the state of the source of new weights."""
        layers = {
            layer.name: {
                **{name: getattr(self, name)[part].clone() for name in ARRAYS},
                "accumulated": turnover.accumulated,
            }
            for layer, part, turnover in zip(self.layers, self._slices, self.turnovers, strict=True)
        }
        return {"layers": layers, "generator": self.replace.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        for layer, part, turnover in zip(self.layers, self._slices, self.turnovers, strict=True):
            found = state["layers"][layer.name]
            for name in ARRAYS:
                getattr(self, name)[part] = found[name].to(self.age.device)
            turnover.begin(found["age"].tolist(), found["accumulated"])
        self.replace.generator.set_state(state["generator"])

    def _observe(self, seen: Observation) -> None:
        """Update the running means."""
        options, weight = self.options, 1 - self.options.utility_decay
        if self._needs_mean:
            self.mean.lerp_(seen.mean, weight)
        if self._is_summed:
            self.trace.add_(seen.magnitude, alpha=weight)
        elif options.unit_utility != "random":
            center = self.mean / self._correction(self.age) if options.unit_utility in CENTERED else self.mean
            self.trace.lerp_(UTILITIES[options.unit_utility](seen, center), weight)

    def _scores(self, seen: Observation) -> Tensor:  # (all units,)
        """Compute û of every unit."""
        if self.options.unit_utility == "random":
            return torch.rand(len(self.age), generator=self.replace.generator).to(self.trace, non_blocking=True)
        if self._is_summed:
            return seen.outgoing if self.options.unit_utility == "weight" else seen.outgoing * self.trace
        return self.trace / self._correction(self.age)

    def _correction(self, age: Tensor) -> Tensor:
        """Compute 1 − η^age, to the last bit also for η close to 1."""
        decay = self.options.utility_decay
        return -torch.expm1(age.to(self._dtype) * (math.log(decay) if decay else -math.inf))

    def _replace(self, k: int, units: Tensor) -> None:
        layer, part = self.layers[k], self._slices[k]
        age, trace, mean = self.age[part], self.trace[part], self.mean[part]
        if self._transfers[k]:
            assert layer.outgoing.bias is not None
            activations = (mean[units] / self._correction(age[units])).to(layer.outgoing.weight.dtype)
            layer.outgoing.bias.add_(layer.contribution(units, activations))
        self.replace(layer, units)
        age.index_fill_(0, units, 0)
        mean.index_fill_(0, units, 0.0)
        if not self._is_summed:
            trace.index_fill_(0, units, 0.0)

    def _draw(self) -> float:
        return torch.rand((), generator=self.replace.generator).item()
