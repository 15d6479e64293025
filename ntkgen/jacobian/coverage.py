"""The comparison of layer rules with autograd, by the value of the gradient of Σ_io w_io f_o(x_i).

The weights w are Gaussian, one for each sample and output. The gradient is linear in the rows of the Jacobian, so a
wrong row changes it. A row that belongs to another sample changes it too, because the samples have different weights.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntkgen.jacobian.capture import weighted_sum

# Maximum difference between the rows of a rule and those of autograd, relative to their norm, for each dtype of the
# factors. Wrong rules differ by at least a few per cent. Both sides use the same forward pass, so no unit changes its
# sign between them.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2}
# Minimum scale of a comparison, as a fraction of the norm of the gradient of all parameters. Without a minimum, the
# rounding of a gradient that should be zero would count as a difference.
SCALE_FLOOR = 1e-3
# Number of random vectors with which the gradient of a weight matrix is multiplied before the comparison. A comparison
# of the whole matrix costs as much as a backward pass. With two vectors, a wrong matrix of rank one is missed
# once in a million times.
NUM_DIRECTIONS = 2


@dataclass(frozen=True)
class Claim:
    """The gradient of one parameter that follows from its rule.

    ``value`` is the flattened gradient. With ``directions`` it is the product of a weight matrix's gradient with these
    vectors.
    """

    value: Tensor  # (parameter,), or (groups, channels, directions)
    directions: Tensor | None = None  # (groups, inputs, directions)

    def compare(self, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the norm of the difference from autograd's gradient, and the norm of autograd's gradient."""
        if grad is None:
            return self.value.norm(), torch.zeros_like(self.value.norm())
        expected, norm = grad.flatten(), grad.norm()
        if self.directions is not None:
            groups, channels, _ = self.value.shape
            expected = grad.reshape(groups, channels, -1) @ self.directions
            norm = norm * math.sqrt(self.directions.shape[2])
        if self.value.shape != expected.shape:
            return torch.full_like(norm, torch.inf), norm
        return (self.value - expected).norm(), norm


def draw_weights(outputs: Tensor, count: int) -> Tensor:  # (samples, outputs)
    """Draw a weight for each of the first ``count`` samples and each output. The weights of the padding are zero."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(count, outputs.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    weights = torch.zeros_like(outputs)
    weights[:count] = drawn.to(weights)
    return weights


def draw_directions(groups: int, inputs: int, like: Tensor) -> Tensor:  # (groups, inputs, directions)
    """Draw the vectors with which the gradient of a weight matrix is multiplied."""
    generator = torch.Generator("cpu").manual_seed(1)
    drawn = torch.randn(groups, inputs, NUM_DIRECTIONS, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(like.device, like.dtype)


def rows_product(
    cotangents: Tensor,  # (samples, groups, channels, positions), weighted and summed over the outputs
    projected: Tensor,  # (samples, groups, positions, directions)
) -> Tensor:  # (groups, channels, directions)
    """Multiply the weighted sum of all rows with the directions, Σ_i Σ_t g_i[t] (a_i[t] · v)."""
    return (cotangents @ projected).sum(0)


@dataclass(frozen=True)
class Findings:
    """The result of one backward pass through the whole network."""

    reached: frozenset[str]  # parameters that get a gradient
    disproved: frozenset[str]  # parameters whose rule disagrees with autograd


def hold_against_autograd(
    outputs: Tensor,  # (samples, outputs), in the graph
    weights: Tensor,  # (samples, outputs)
    params: Mapping[str, nn.Parameter],
    claims: Mapping[str, Claim],
    tolerance: float,
) -> Findings:
    """Compare the claims with the gradients of Σ w f with respect to some parameters, and free the graph.

    All gradients together are as large as the network. Each is therefore freed directly after its comparison.
    """
    compared: dict[str, tuple[Tensor, Tensor]] = {}
    reached = set()
    with ExitStack() as stack:
        for name, param in params.items():

            def compare(param: Tensor, name: str = name) -> None:
                reached.add(name)
                if name in claims:
                    compared[name] = claims[name].compare(param.grad)
                param.grad = None

            stack.callback(param.register_post_accumulate_grad_hook(compare).remove)
        if outputs.requires_grad and params:
            weighted_sum(outputs, weights).backward(inputs=list(params.values()))
    compared |= {name: claim.compare(None) for name, claim in claims.items() if name not in compared}
    return Findings(frozenset(reached), frozenset(_exceeding(compared, tolerance)))


def _exceeding(compared: Mapping[str, tuple[Tensor, Tensor]], tolerance: float) -> Iterator[str]:
    """List the parameters that differ by more than the tolerance, relative to their norm or the norm of all."""
    if not compared:
        return
    errors, norms = (torch.stack(each).cpu().double() for each in zip(*compared.values(), strict=True))
    scale = torch.maximum(norms, SCALE_FLOOR * norms.norm())
    holds: list[bool] = (errors <= tolerance * scale).tolist()  # false for NaN
    yield from (name for name, is_close in zip(compared, holds, strict=True) if not is_close)
