"""Output maps: the matrix that maps logits to outputs, and the reduction of the block of a pair of samples."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from scipy.linalg import helmert
from torch import Tensor, nn

from ntkgen.errors import InputError, UnknownNameError
from ntkgen.jacobian.cost import Reduction
from ntkgen.jacobian.network import Network, prepare
from ntkgen.jacobian.precision import policy

OUTPUTS = ("full", "sum", "centered", "index:K", "trace", "diagonal")


@dataclass(frozen=True)
class OutputMap:
    """A named output map. The kernel is that of A f(x), and its m × m blocks are stored whole or reduced."""

    name: str
    matrix: Tensor | None  # A, (outputs, logits), float64; None is the identity
    reduction: Reduction = "none"


def output_map(name: str, num_logits: int) -> OutputMap:
    """Look up an output map by its name.

    ``full`` is f itself. ``sum`` is Σ_k f_k. Its kernel is the pseudo-kernel of Mohamadi, Bae, Sutherland (2023,
    arXiv:2206.12543), without its factor 1 / m. ``index:K`` is the logit K, and ``centered`` the contrasts of
    `contrast_matrix`. ``trace`` and ``diagonal`` store the trace or the diagonal of each m × m block.

    Raises:
        UnknownNameError: If the name is unknown.
        InputError: If there is no logit of that number, or if a single logit should be centered.

    >>> output_map("index:1", 3).matrix
    tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    if name in {"full", "trace", "diagonal"}:
        return OutputMap(name, None, {"trace": "trace", "diagonal": "diagonal"}.get(name, "none"))  # type: ignore[arg-type]
    if name == "sum":
        return OutputMap(name, torch.ones(1, num_logits, dtype=torch.float64, device="cpu"))
    if name == "centered":
        if num_logits == 1:
            raise InputError(
                "The output 'centered' removes the common shift of all logits: expected at least two logits, found "
                "one. No output would remain. Use `output` full."
            )
        return OutputMap(name, contrast_matrix(num_logits))
    kind, _, index = str(name).partition(":")
    if kind != "index" or not index.removeprefix("-").isdecimal() or index != str(int(index)):
        raise UnknownNameError("output", name, OUTPUTS)
    if not 0 <= int(index) < num_logits:
        raise InputError(
            f"There is no logit {index}: expected a number from 0 to {num_logits - 1}, because the network has "
            f"{num_logits} outputs. Is the number counted from 1, or from the end? Logits are counted from 0."
        )
    return OutputMap(name, torch.eye(num_logits, dtype=torch.float64, device="cpu")[int(index)][None])


def prepare_mapped(
    model: nn.Module,
    x: Tensor,  # (samples, …): a few samples that the network accepts
    precision: str,
    output: str,
    *,
    device: torch.device | None = None,
    excluded: Collection[str] = (),
) -> tuple[Network, OutputMap]:
    """Prepare a network for an output map, with the precision and the output map given by name.

    Args:
        model: Any module that maps (samples, …) to (samples, logits). It is copied.
        x: Samples on which the network is tried.
        precision: The precision policy.
        output: The output map.
        device: The device of the computation. By default it is the module's device.
        excluded: Parameters that are left to autograd.

    Raises:
        UnknownNameError: If the precision or the output has an unknown name.
        InputError: If the output map does not fit the network.
        ModelError: If the kernel of this network is not defined.
    """
    network = prepare(model, x, policy(precision), device, excluded)
    chosen = output_map(output, network.profile.num_logits)
    return network.seen_through(chosen.matrix), chosen


def contrast_matrix(num_logits: int) -> Tensor:  # (num_logits - 1, num_logits), float64
    """Build the matrix of Helmert's orthonormal contrasts, Q with Q Qᵀ = I and Qᵀ Q = I − 1 1ᵀ / m.

    The kernel Q K Qᵀ has size n (m − 1) and the nonzero eigenvalues of the kernel of centered logits. It is nonsingular
    if K is. The gradient of the cross-entropy has no component along a common shift of the logits, so Q K Qᵀ determines
    the training dynamics. Source: Helmert (1876); Lancaster (1965), The Helmert matrices.

    >>> contrast_matrix(2)
    tensor([[ 0.7071, -0.7071]], dtype=torch.float64)
    """
    return torch.from_numpy(helmert(num_logits))
