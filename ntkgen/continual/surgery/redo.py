"""ReDo: units that are dormant on the current batch begin anew, every few hundred steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ntkgen.continual.surgery.replacement import Replacement
from ntkgen.continual.surgery.surgery import Subject, Surgery
from ntkgen.continual.surgery.utilities import Observation


class ReDo(Surgery):
    """Replaces dormant units: those whose mean |h| is at most a fraction of the mean of their layer.

    New units get new incoming weights and no outgoing ones, see `Replacement`. The activations are those of the batch
    of the step. A layer without any activation is replaced as a whole.

    References:
        Sokar, Agarwal, Castro, Evci (2023), ICML, arXiv:2302.12902.

    Raises:
        ModelError: If there are no hidden layers.
    """

    needs_features = True

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.replace = Replacement(subject, 1)
        self.steps = 0

    @torch.no_grad()
    def after_step(self, features: Mapping[str, Tensor]) -> int:
        """Replace dormant units if it is time, and say how many."""
        self.steps += 1
        if self.steps % self.subject.options.redo_period:
            return 0
        layers = self.replace.layers
        magnitude = Observation(layers, features, torch.float32).magnitude
        count = 0
        for layer, own in zip(layers, magnitude.split([layer.num_units for layer in layers]), strict=True):
            (units,) = (own <= self.subject.options.redo_threshold * own.mean()).nonzero(as_tuple=True)
            if len(units):
                self.replace(layer, units)
            count += len(units)
        return count

    def restart(self) -> None:
        """Begin the period anew."""
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, and the state of the source of new weights."""
        return {"steps": self.steps, "generator": self.replace.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        self.steps = int(state["steps"])
        self.replace.generator.set_state(state["generator"])
