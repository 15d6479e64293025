"""What is differentiated: the matrix that maps logits to outputs, and what is kept of a pair's block."""

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
    """A named choice: the kernel is of A f(x), and its m × m blocks are kept whole or reduced."""

    name: str
    matrix: Tensor | None  # (outputs, logits), float64; None is the identity
    reduction: Reduction = "none"


def output_map(name: str, num_logits: int) -> OutputMap:
    """Look an output map up by name.

    ``full`` is f itself, ``sum`` Σ_k f_k (whose kernel is the pseudo-kernel of Mohamadi, Bae, Sutherland 2023,
    arXiv:2206.12543, up to its factor 1 / m), ``index:K`` the K-th logit, ``centered`` the contrasts of
    `contrast_matrix`. ``trace`` and ``diagonal`` keep of each m × m block its trace, or its diagonal.

    Raises:
        UnknownNameError: If there is none of that name.
        InputError: If there is no logit of that number, or nothing left of a single one.

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
                "one, of which nothing would be left. Use --output full."
            )
        return OutputMap(name, contrast_matrix(num_logits))
    kind, _, index = name.partition(":")
    if kind != "index" or not index.isdecimal() or index != str(int(index)):
        raise UnknownNameError("output", name, OUTPUTS)
    if int(index) >= num_logits:
        raise InputError(
            f"There is no logit {index}: expected a number from 0 to {num_logits - 1}, because the network has "
            f"{num_logits} outputs. Logits are counted from 0."
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
    """Prepare a network whose kernel is that of an output map, both by name.

    Args:
        model: Any module that maps (samples, …) to (samples, logits); it is copied.
        x: Samples for the trial of the network.
        precision: The precision policy.
        output: The output map.
        device: Where the network computes; None takes the module's device.
        excluded: Parameters that are left to autograd.

    Raises:
        UnknownNameError: If there is no such precision or output.
        InputError: If the output map does not fit the network.
        ModelError: If the kernel of this network is not defined.
    """
    network = prepare(model, x, policy(precision), device, excluded)
    chosen = output_map(output, network.profile.num_logits)
    return network.seen_through(chosen.matrix), chosen


def contrast_matrix(num_logits: int) -> Tensor:  # (num_logits - 1, num_logits), float64
    """Build the orthonormal contrasts of Helmert, Q with Q Qᵀ = I and Qᵀ Q = I − 1 1ᵀ / m.

    The kernel Q K Qᵀ has the nonzero eigenvalues of the kernel of centered logits, is nonsingular when K is, and has
    the size n (m − 1). Cross-entropy never drives the common shift of the logits, so this is the kernel that training
    with it sees. Source: Helmert (1876); Lancaster (1965), The Helmert matrices.

    >>> contrast_matrix(2)
    tensor([[ 0.7071, -0.7071]], dtype=torch.float64)
    """
    return torch.from_numpy(helmert(num_logits))
