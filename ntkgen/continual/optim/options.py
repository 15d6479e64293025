"""The options of streaming learners as settings of a run of another kind. This module needs no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ntkgen.continual.optim.names import NAMES

# Learners that also train on batches of any loss: those without a Hessian or gates. `sgd` and `adam` are torch's there.
BATCH_LEARNERS = tuple(
    name
    for name, learner in NAMES.items()
    if not learner.is_second_order and not learner.has_gates and name not in {"sgd", "adam"}
)


@dataclass(frozen=True)
class LearnerOptions:
    """Options of the learners in `BATCH_LEARNERS`, beside learning rate and weight decay. None: the learner's default.

    Attributes:
        sigma: Standard deviation σ of the noise.
        decay: Weight decay of ``shrink_and_perturb``.
        beta_utility: Decay rate of the running mean of the utilities.
        beta_weight: Decay rate of the running mean of the weights.
        beta_fisher: Decay rate of the running mean of the squared gradients of ``ewc``, or of the absolute values of
            ``mas``.
        beta_importance: Decay rate of the importances of ``si`` and ``rwalk``.
        beta1: Decay rate of the running mean of the gradients of ``adaptive_upgd``.
        beta2: Decay rate of the running mean of the squared gradients of ``adaptive_upgd``.
        eps: What keeps a denominator from 0.
        kappa: Weight of the penalty of ``ewc``, ``mas``, ``si`` and ``rwalk``.
        step_scale: Factor of the step along gradient and noise.
        mixture: Share of the mean over a kernel in the utility of its weights.
        largest: Utility that the global normalisation divides by: ``corrected`` or ``raw``.
        normalisation: ``global``: utilities are divided by the largest one; ``local``: row by row.
        protecting: Whether useful weights are protected from the gradient too.
        noise_scale: What multiplies the noise of each tensor: ``none``, ``weight``, ``grad`` or ``ratio``.
        gate_noise: Whether useful weights are protected from the noise.
        utility_shape: Which weights of a convolution share a utility: ``element``, ``kernel``, ``column``, ``convex``.
    """

    sigma: float | None = None
    decay: float | None = None
    beta_utility: float | None = None
    beta_weight: float | None = None
    beta_fisher: float | None = None
    beta_importance: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    kappa: float | None = None
    step_scale: float | None = None
    mixture: float | None = None
    largest: str | None = None
    normalisation: str | None = None
    protecting: bool | None = None
    noise_scale: str | None = None
    gate_noise: bool | None = None
    utility_shape: str | None = None

    @property
    def given_learner_options(self) -> dict[str, Any]:
        """The options that are given."""
        names = [each.name for each in dataclasses.fields(LearnerOptions)]
        return {name: value for name in names if (value := getattr(self, name)) is not None}
