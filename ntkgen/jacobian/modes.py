"""The products Jᵀ V and J U of one batch, in the modes of automatic differentiation that a network supports."""

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ntkgen.jacobian.capture import weighted_sum
from ntkgen.jacobian.evaluation import outputs_of
from ntkgen.jacobian.precision import default_dtype_of
from ntkgen.jacobian.reals import real_numbers

# Maximum difference between products in another mode and those in reverse mode, relative to their norm.
COVERAGE_TOLERANCE = {torch.float32: 3e-3, torch.float64: 1e-9}

# One tensor per trainable parameter, (columns, *parameter): several vectors in the space of parameters.
Directions = list[Tensor]


def real_rows(
    part: Tensor,  # (columns, *parameter)
) -> Tensor:  # (columns, numbers)
    """Reshape the columns of a parameter to rows of real numbers, so that ⟨u, v⟩ = Σ Re u Re v + Im u Im v."""
    return real_numbers(part).reshape(len(part), -1)


def trainable_parameters(module: nn.Module) -> list[Tensor]:
    """List the trainable parameters, which the Jacobian is taken with respect to, in the order of `Directions`."""
    return [param for param in module.parameters() if param.requires_grad]


def parameter_aliases(module: nn.Module) -> dict[str, str]:
    """Map each name of a trainable parameter to its first name, for `torch.func.functional_call`.

    A tied parameter has several names. A module that is used in two places contributes one name, because
    `functional_call` would otherwise remove its parameters.
    """
    first = {id(param): name for name, param in module.named_parameters() if param.requires_grad}
    aliases = {}
    for prefix, child in module.named_modules():
        for name, param in child.named_parameters(recurse=False, remove_duplicate=False):
            if id(param) in first:
                aliases[f"{prefix}.{name}" if prefix else name] = first[id(param)]
    return aliases


def add_pullback(
    module: nn.Module,
    batch: Tensor,  # (samples, …)
    cotangents: Tensor,  # (columns, samples, outputs)
    total: Directions,
) -> None:
    """Add Jᵀ V of one batch to a total, with one forward pass and one backward pass per column."""
    outputs = outputs_of(module, batch)
    if not outputs.requires_grad:
        return
    for column, cotangent in enumerate(cotangents):
        retain = column + 1 < len(cotangents)
        target = weighted_sum(outputs, cotangent)
        grads = torch.autograd.grad(target, trainable_parameters(module), retain_graph=retain, allow_unused=True)
        for part, grad in zip(total, grads, strict=True):
            if grad is not None:
                part[column] += grad


def push_forward(
    module: nn.Module,
    batch: Tensor,  # (samples, …)
    directions: Directions,
) -> Tensor:  # (columns, samples, outputs)
    """Compute J U of one batch in forward mode, with one pass per column."""
    aliases = parameter_aliases(module)
    names = [name for name, param in module.named_parameters() if param.requires_grad]

    def outputs(values: list[Tensor]) -> Tensor:
        known = dict(zip(names, values, strict=True))
        by_name = {alias: known[name] for alias, name in aliases.items()}
        with default_dtype_of(module):
            result: Tensor = functional_call(module, by_name, (batch.clone(),), tie_weights=False)
        return result

    params = [param.detach() for param in trainable_parameters(module)]
    with torch.no_grad():  # `jvp` needs no graph for a backward pass
        return torch.stack([jvp(outputs, (params,), (list(column),))[1] for column in zip(*directions, strict=True)])


def push_double_backward(
    module: nn.Module,
    batch: Tensor,  # (samples, …)
    directions: Directions,
) -> Tensor:  # (columns, samples, outputs)
    """Compute J U of one batch by differentiating ⟨Jᵀ V, U⟩, which is linear in V, with respect to V.

    The cost is up to three times that of forward mode. Each backward formula must be differentiable.
    """
    outputs = outputs_of(module, batch)
    cotangents = torch.zeros_like(outputs).requires_grad_()
    if not outputs.requires_grad:
        return cotangents.new_zeros(len(directions[0]), *outputs.shape)
    target = weighted_sum(outputs, cotangents)
    grads = torch.autograd.grad(target, trainable_parameters(module), create_graph=True, allow_unused=True)
    used = [index for index, grad in enumerate(grads) if grad is not None and grad.requires_grad]
    columns = []
    for column in range(len(directions[0])):
        along = [directions[index][column] for index in used]
        columns.append(torch.autograd.grad([grads[i] for i in used], cotangents, along, retain_graph=True)[0])
    return torch.stack(columns)


def push_rows(
    module: nn.Module,
    batch: Tensor,  # (samples, …)
    directions: Directions,
) -> Tensor:  # (columns, samples, outputs)
    """Compute J U of one batch row by row in reverse mode, with one backward pass per sample and output."""
    params, samples = trainable_parameters(module), []
    for sample in batch:
        outputs = outputs_of(module, sample[None])[0]
        products = outputs.detach().new_zeros(len(directions[0]), len(outputs))
        for index in range(len(outputs) if outputs.requires_grad else 0):
            grads = torch.autograd.grad(outputs[index], params, retain_graph=True, allow_unused=True)
            for part, grad in zip(directions, grads, strict=True):
                if grad is not None:
                    products[:, index] += real_rows(part) @ real_numbers(grad.to_dense())
        samples.append(products)
    return torch.stack(samples, dim=1)


# The ways to compute J U, fastest first. The last one works for every network, and the others are checked against it.
PUSHES: dict[str, Callable[[nn.Module, Tensor, Directions], Tensor]] = {
    "forward": push_forward,
    "double-backward": push_double_backward,
    "rows": push_rows,
}


def choose_push(module: nn.Module, sample: Tensor) -> str:
    """Choose the fastest way to compute J U for a network, by a trial with one sample and a random direction.

    Not every operation supports forward mode or double backward, and a custom operation may compute a wrong result in
    these modes. The result is therefore compared with that of plain reverse mode. The gradient of an embedding table
    may depend on all tokens, and one sample has only some of them. Such tables are recognised by their settings.
    """
    candidates = ["forward", "double-backward"]
    for table in embedding_tables(module):
        if table.scale_grad_by_freq:
            return "rows"
        if table.padding_idx is not None:
            candidates = ["double-backward"]
    generator = torch.Generator("cpu").manual_seed(0)
    directions = [_random_direction(param.detach(), generator) for param in trainable_parameters(module)]
    expected = push_rows(module, sample, directions)
    for name in candidates:
        # an operation that does not support the mode may raise any error, and torch warns on the first use of a mode
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            if _agree(PUSHES[name](module, sample, directions), expected):
                return name
    return "rows"


def _random_direction(param: Tensor, generator: torch.Generator) -> Tensor:  # (1, *parameter)
    dtype = torch.complex128 if param.is_complex() else torch.float64
    return torch.randn(1, *param.shape, generator=generator, dtype=dtype, device="cpu").to(param)


def embedding_tables(module: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """List the tables whose gradient may depend on the tokens of a whole batch."""
    return [child for child in module.modules() if isinstance(child, nn.Embedding | nn.EmbeddingBag)]


def _agree(product: Tensor, expected: Tensor) -> bool:
    assert product.shape == expected.shape
    return bool((product - expected).norm() <= COVERAGE_TOLERANCE[expected.dtype] * expected.norm())


def is_symmetric(
    V: Tensor,  # (rows, columns)
    U: Directions,
    KV: Tensor,  # (rows, columns)
) -> bool:
    """Check whether ⟨v, K v⟩ = ‖Jᵀ v‖² for each column, relative to ‖v‖ ‖K v‖."""
    squares = torch.stack([real_rows(part).square().sum(1) for part in U]).sum(0)
    difference = ((V * KV).sum(0) - squares).abs()
    return not bool((difference > COVERAGE_TOLERANCE[V.dtype] * V.norm(dim=0) * KV.norm(dim=0)).any())
