"""The noise of shrink and perturb. To shrink is the weight decay of the optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ntkgen.continual.chance import seed_of
from ntkgen.continual.surgery.surgery import Subject, Surgery


class Perturb(Surgery):
    """Adds noise from N(0, σ²) to every parameter after each step, also to those of batch norm and to biases.

    Without noise (σ = 0) every bit of the parameters stays.

    References:
        Ash, Adams (2020), NeurIPS, arXiv:1910.08475; after each step in Dohare et al. (2024), Nature 632.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        device = next(subject.model.parameters()).device
        self.generator = torch.Generator(device).manual_seed(seed_of(subject.seed, "perturbation"))

    @torch.no_grad()
    def after_step(self, features: Mapping[str, Tensor]) -> int:  # noqa: ARG002 - it needs none
        """Add noise; no unit is replaced."""
        std = self.subject.options.noise_std
        for param in self.subject.model.parameters() if std else ():
            if param.requires_grad:
                noise = torch.empty_like(param).normal_(generator=self.generator)
                param.add_(noise, alpha=std)
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the source of noise."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        self.generator.set_state(state["generator"])
