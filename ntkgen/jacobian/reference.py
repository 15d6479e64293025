"""The reference implementation of the kernel: dense, slow and simple.

The network is run on each sample alone, and each row of the Jacobian is one backward pass in float64. The products are
summed over groups of parameters. Tests and verification compare their results with this implementation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ntkgen.jacobian.adapter import Function, Given, Target
from ntkgen.jacobian.evaluation import (
    as_input,
    evaluation_copy,
    outputs_of,
    require_matrix,
    require_own_parameters,
)
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.jacobian.reals import count_real_numbers, real_numbers
from ntkgen.jacobian.samples import Batch
from ntkgen.jacobian.selection import Select

# Maximum bytes of Jacobian rows at a time. The whole Jacobian of a large network never needs to fit in memory.
MAX_JACOBIAN_BYTES = 1 << 30


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by name, each once, in the module's order."""
    return {name: param.detach() for name, param in module.named_parameters() if param.requires_grad}


def jacobian_rows(
    module: nn.Module,
    params: Iterable[str],
    x: Tensor,  # (samples, …)
) -> Tensor:  # (samples, outputs, params)
    """Form the Jacobian with respect to some of a module's parameters, with one backward pass per sample and output.

    A complex parameter counts as two real ones. The gradient of a real output for z = a + i b is ∂/∂a + i ∂/∂b. Its
    real and imaginary parts are the columns of a and b.
    """
    by_name = dict(module.named_parameters())
    selected = [by_name[name] for name in params]
    rows = x.new_empty(0)
    for index, sample in enumerate(x):
        outputs = outputs_of(module, sample[None])[0]
        if index == 0:
            rows = selected[0].real.new_empty(len(x), len(outputs), count_real_numbers(selected))
        _differentiate(outputs, selected, rows[index])
    return rows


def fill_rows(
    rows: Tensor,  # (rows, params)
    module: nn.Module,
    params: Sequence[Tensor],
    sample: Tensor,
    cotangents: Tensor,  # (rows, outputs)
) -> None:
    """Form the Jacobian rows of vᵀ f of one sample, with one backward pass per v. Complex numbers count as two.

    The caller provides the memory of the rows, because new memory for each sample takes longer than the passes.
    """
    _differentiate(cotangents @ outputs_of(module, sample[None])[0], params, rows)


def _differentiate(
    outputs: Tensor,  # (outputs,)
    params: Sequence[Tensor],
    rows: Tensor,  # (outputs, params)
) -> None:
    """Write the gradients of the outputs of one sample. Parameters that an output does not depend on get zeros."""
    sizes = [count_real_numbers([param]) for param in params]
    for row, output in zip(rows, outputs, strict=True):
        grads: Sequence[Tensor | None] = [None] * len(params)
        if output.requires_grad:
            grads = torch.autograd.grad(output, params, retain_graph=True, allow_unused=True)
        for part, grad in zip(row.split(sizes), grads, strict=True):
            if grad is None:
                part.zero_()
            else:
                part.copy_(real_numbers(grad.detach().to_dense()))


def parameters_in_groups(params: Mapping[str, Tensor], max_numbers: int) -> Iterator[dict[str, Tensor]]:
    """Cut the parameters, in order, into groups of at most ``max_numbers`` scalars. A larger one has its own group."""
    group: dict[str, Tensor] = {}
    for name, param in params.items():
        if group and count_real_numbers([*group.values(), param]) > max_numbers:
            yield group
            group = {}
        group[name] = param
    if group:
        yield group


def reference_ntk(  # noqa: PLR0913 - the keywords of `ntkgen.ntk`
    model: nn.Module,
    x1: Batch,  # (n₁, …)
    x2: Batch | None = None,  # (n₂, …)
    *,
    function: Function | Sequence[Function] | None = None,
    select: Select | None = None,
    params: str | Sequence[str] | None = None,
    columns_function: Function | Sequence[Function] | None = None,
    max_bytes: int = MAX_JACOBIAN_BYTES,
) -> Tensor:  # (n₁ m, n₂ m), float64, on the CPU
    """Compute the kernel of two batches in float64, K = Σ_p J₁ₚ J₂ₚᵀ over groups of parameters p.

    The arguments are those of `ntkgen.ntk`.

    References:
        Jacot, Gabriel, Hongler (2018), arXiv:1806.07572, §4.
    """
    given = Given.of(model, x1, x2, Target.of(function, select, params, columns_function))
    return given.attempt(lambda given: _reference(given, max_bytes))


def _reference(given: Given, max_bytes: int) -> Tensor:
    device = torch.device("cpu")  # MPS has no float64
    module = evaluation_copy(given.model, torch.float64, device)
    left = as_input(given.rows, torch.float64, device)
    right = left if given.columns is None else as_input(given.columns, torch.float64, device)
    samples = len(left) + (0 if given.columns is None else len(right))
    with exact_arithmetic(device):
        outputs = outputs_of(module, left[:1])
        require_matrix(outputs, 1)
        require_own_parameters(outputs, given.model)
        num_outputs = outputs.shape[1]
        kernel = torch.zeros(len(left) * num_outputs, len(right) * num_outputs, dtype=torch.float64, device=device)
        for group in parameters_in_groups(trainable(module), max_bytes // (8 * samples * num_outputs)):
            rows = jacobian_rows(module, group, left).flatten(0, 1)
            columns = rows if given.columns is None else jacobian_rows(module, group, right).flatten(0, 1)
            kernel.addmm_(rows, columns.T)
    return kernel
