"""The check of two assumptions: samples are independent, and backward passes are linear.

A product J₁ (J₂ᵀ V) runs the network on whole batches. The Jacobian of a batch consists of those of its samples only if
the network does not mix samples. The trial of a network (`probe.py`) uses only a few samples. A network may average
over some samples, or drop tokens that exceed the capacity of an expert. Every batch is therefore checked.
"""

import math

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError
from ntkgen.jacobian.batch_check import kept_claims, require_finite
from ntkgen.jacobian.capture import record, weighted_sum
from ntkgen.jacobian.coverage import draw_weights, relative_difference
from ntkgen.jacobian.evaluation import outputs_of
from ntkgen.jacobian.factors import BlockFactors
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.probe import require_same_outputs
from ntkgen.jacobian.reals import real_numbers

# Maximum difference between a sum of gradients and the gradient of the sum, relative to the norm for each parameter.
TOLERANCES = {torch.float32: 3e-3, torch.float64: 1e-9}
# Additional difference, relative to the norm of all gradients, for a gradient that would be zero without rounding.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}
# Ratio of the second cotangent to the first. With different sizes, a clipped gradient is not linear.
SCALE = 10.0

# Maximum difference between the gradient of a sample alone and in its batch, relative to the norm of all parameters. A
# unit near zero may have another sign alone. A larger difference leads to a closer look at the batch.
SUSPICIOUS = 0.1

# One gradient per trainable parameter, as real numbers.
Gradients = list[Tensor]


def require_same_alone(
    network: Network,
    x: Tensor,  # (samples, …), a block
    block: BlockFactors,
    batch_size: int,
) -> None:
    """Refuse a network that treats a sample in another way in a batch than alone, in its outputs or in its gradient.

    The kernel is that of the samples alone. Other batches of a similar size do not show what a network does with a
    single sample. One sample of each block is therefore run alone.

    Raises:
        ModelError: If the outputs differ by more than rounding explains, or the gradient by more than a few units.
    """
    if batch_size == 1:
        return
    index = int(torch.randint(len(x), (), generator=torch.Generator("cpu").manual_seed(0), device="cpu"))
    one = slice(index, index + 1)
    outputs = record(network.module, {}, network.input(x[one])).outputs
    require_same_outputs(block.logits[one], outputs.detach(), batch_size)
    outputs = network.mapped(outputs)
    weights = draw_weights(outputs, 1)
    claims = kept_claims(network, block, one, weights, network.fallback)
    params = {name: network.params[name] for name in claims}
    if relative_difference(outputs, weights, params, claims) <= SUSPICIOUS:
        return
    start = index - index % batch_size
    if not has_own_gradients(network.module, network.input(x[start : start + batch_size])):
        raise ModelError(
            "The network mixes the samples of a batch in its gradients: expected that a sample has the same gradient "
            f"alone and in a batch of {batch_size} up to rounding, found another one. Does the forward pass use a sum "
            "or a mean over the batch, or the size of the batch? Replace it by one that treats samples one by one."
        )


def has_own_gradients(module: nn.Module, batch: Tensor) -> bool:
    """Check whether the gradient of each sample in this batch equals its gradient alone.

    The gradients differ if an embedding divides by the frequency of a token, or if a mean over the batch is detached.
    The samples must then be run one at a time. A batch in which outputs depend on other samples is refused.

    For random cotangents u and v, the gradient of ⟨u + v, f⟩ over the batch is compared with the sum of the gradients
    of ⟨u, f⟩ and ⟨v, f⟩ over smaller batches. These have about √b of the b samples, in random order.

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
    grads = torch.autograd.grad(weighted_sum(outputs, weights), params, retain_graph=retain, allow_unused=True)
    return [
        torch.zeros_like(real_numbers(param.detach())) if grad is None else real_numbers(grad.to_dense())
        for param, grad in zip(params, grads, strict=True)
    ]


def _differ(found: Gradients, expected: Gradients) -> bool:
    """Compare gradients parameter by parameter, so that a large correct gradient does not hide a small wrong one."""
    dtype = expected[0].dtype
    norms = torch.stack([part.double().norm() for part in expected])
    differences = torch.stack([(one - other).double().norm() for one, other in zip(found, expected, strict=True)])
    allowed = TOLERANCES[dtype] * norms + ROUNDING[dtype] * norms.norm()
    return not bool((differences <= allowed).all())


def _require_linear(module: nn.Module, batch: Tensor, cotangents: tuple[Tensor, Tensor], whole: Gradients) -> None:
    """Refuse a backward pass that is not linear. The same batch is differentiated for each cotangent separately.

    Raises:
        ModelError: If the gradient of the sum is not the sum of the gradients.
    """
    outputs = outputs_of(module, batch)
    first, second = (_gradients(module, outputs, weights, retain=True) for weights in cotangents)
    if _differ([one + other for one, other in zip(first, second, strict=True)], whole):
        raise ModelError(
            "The network's backward pass is not linear: the gradient of a sum of outputs was expected to be the sum of "
            "their gradients, and is not. Does an autograd.Function or a hook clip, normalise or round a gradient? "
            "Remove it, because the Jacobian of such a network is not defined."
        )
