"""The proof of what products with the kernel rely on: samples are treated one by one, and backward passes are linear.

A product J₁ (J₂ᵀ V) runs the network on whole batches, and J of a batch is that of its samples only where the network
does not mix them. What holds for the few samples that a network was tried on need not hold for the next batch: a
network may drop what exceeds the capacity of an expert, or average over some samples. So every batch is tried.
"""

import math

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError
from ntkgen.jacobian.batch_check import require_finite
from ntkgen.jacobian.capture import weighted_sum
from ntkgen.jacobian.coverage import draw_weights
from ntkgen.jacobian.evaluation import outputs_of
from ntkgen.jacobian.probe import require_same_outputs
from ntkgen.jacobian.reals import real_numbers

# How far a sum of gradients may be from the gradient of the sum, relative to its norm for each parameter …
TOLERANCES = {torch.float32: 3e-3, torch.float64: 1e-9}
# … and to that of all parameters, where a gradient is zero but for rounding.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}
# The second of the two cotangents is larger by this factor, so that a gradient that is clipped shows.
SCALE = 10.0

# One gradient per trainable parameter, as real numbers.
Gradients = list[Tensor]


def has_own_gradients(module: nn.Module, batch: Tensor) -> bool:
    """Say whether the gradient of each sample is its own in this batch, as it is alone.

    It is not where an embedding divides by how often a token occurs, or where a mean over the batch is detached. Then
    the samples must be run one at a time. A batch whose outputs depend on each other is refused.

    With random cotangents u and v the gradient of ⟨u + v, f⟩ over the batch must be the sum of those of ⟨u, f⟩ and
    ⟨v, f⟩ over smaller batches, of about √b of the b samples in random order.

    Raises:
        DivergedError: If outputs are not finite.
        ModelError: If outputs differ by more than rounding explains, or a backward pass is not linear.
    """
    outputs = outputs_of(module, batch)
    require_finite(outputs)
    u = draw_weights(outputs, len(batch))
    v = SCALE * u.flip(0)
    whole = _gradients(module, outputs, u + v)
    order = torch.randperm(len(batch), generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(batch.device)
    total = [torch.zeros_like(part) for part in whole]
    for part in order.split(math.isqrt(len(batch) - 1) + 1):
        smaller = outputs_of(module, batch[part])
        require_same_outputs(outputs[part].detach(), smaller.detach(), len(batch))
        for weights in (u, v):
            parts = _gradients(module, smaller, weights[part], retain=True)
            total = [so_far + gradient for so_far, gradient in zip(total, parts, strict=True)]
    if not _differ(total, whole):
        return True
    _require_linear(module, batch, (u, v), whole)
    return False


def _gradients(module: nn.Module, outputs: Tensor, weights: Tensor, *, retain: bool = False) -> Gradients:
    params = [param for param in module.parameters() if param.requires_grad]
    if not outputs.requires_grad:
        return [torch.zeros_like(real_numbers(param.detach())) for param in params]
    found = torch.autograd.grad(weighted_sum(outputs, weights), params, retain_graph=retain, allow_unused=True)
    return [
        torch.zeros_like(real_numbers(param.detach())) if grad is None else real_numbers(grad.to_dense())
        for param, grad in zip(params, found, strict=True)
    ]


def _differ(found: Gradients, expected: Gradients) -> bool:
    """Compare each parameter's gradient: a small one may be wrong beside a large one that is right."""
    dtype = expected[0].dtype
    norms = torch.stack([part.double().norm() for part in expected])
    differences = torch.stack([(one - other).double().norm() for one, other in zip(found, expected, strict=True)])
    allowed = TOLERANCES[dtype] * norms + ROUNDING[dtype] * norms.norm()
    return not bool((differences <= allowed).all())


def _require_linear(module: nn.Module, batch: Tensor, cotangents: tuple[Tensor, Tensor], whole: Gradients) -> None:
    """Refuse a backward pass that is not linear: the batch is the same, and the cotangents come one by one.

    Raises:
        ModelError: If it is not.
    """
    outputs = outputs_of(module, batch)
    first, second = (_gradients(module, outputs, weights, retain=True) for weights in cotangents)
    if _differ([one + other for one, other in zip(first, second, strict=True)], whole):
        raise ModelError(
            "The network's backward pass is not linear: the gradient of a sum of outputs was expected to be the sum of "
            "their gradients, and is not. Is a gradient clipped, normalised or rounded within the network, by an "
            "autograd.Function or a hook? Remove that: the Jacobian of such a network is not defined."
        )
