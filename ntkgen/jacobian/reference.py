"""The same kernel, dense, slow and obvious; the oracle.

Every sample goes through the network alone, every Jacobian is formed by `torch.func` in float64, and the products are
summed parameter by parameter. Tests, verification and the documentation all compare with this.
"""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from ntkgen.errors import ModelError
from ntkgen.jacobian.precision import exact_arithmetic

# Jacobian rows are formed for so many bytes of parameters at a time: a ResNet152 never needs all of J.
MAX_JACOBIAN_BYTES = 1 << 30


def evaluation_copy(model: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """Copy a module into evaluation mode, another dtype and plain strides; the user's own is left as it is.

    Raises:
        ModelError: If it cannot be copied.
    """
    with torch.inference_mode(mode=False):
        try:
            module: nn.Module = copy.deepcopy(model).eval().to(device=device, dtype=dtype)
        except RuntimeError as error:
            raise ModelError(
                f"{type(model).__name__} cannot be copied ({' '.join(str(error).split())[:200]}): expected a "
                "module that copy.deepcopy takes. Does it keep a computed tensor as an attribute, as the old "
                "torch.nn.utils.weight_norm does? Use torch.nn.utils.parametrizations, or a freshly built module."
            ) from error
        for child in module.modules():
            if isinstance(child, nn.Embedding | nn.EmbeddingBag):
                child.sparse = False  # the same function; sparse gradients cannot be differentiated on
        for param in module.parameters():
            param.data = param.data.contiguous()  # bits must not depend on whether it was trained channels-last
    return module


def as_input(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Move a batch to where and how the network computes; token ids keep their integer dtype."""
    with torch.inference_mode(mode=False):
        moved = x.to(device, dtype if x.is_floating_point() else None)
        return moved.clone() if moved.is_inference() else moved  # autograd cannot save what inference mode made


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Name the trainable parameters, each once, in the module's own order."""
    return {name: param.detach() for name, param in module.named_parameters() if param.requires_grad}


def jacobian_rows(
    module: nn.Module,
    params: Mapping[str, Tensor],
    x: Tensor,  # (samples, …)
) -> Tensor:  # (samples, outputs, params)
    """Form the Jacobian with respect to some parameters, sample by sample and output by output."""

    def outputs(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        result: Tensor = functional_call(module, values, (sample[None],))[0]
        return result

    # chunk_size=1 is a plain loop over outputs: nothing is vectorised, so that any operation is allowed
    rows = []
    for sample in x:
        jacobian = jacrev(outputs, chunk_size=1)(dict(params), sample)
        rows.append(torch.cat([part.detach().flatten(1) for part in jacobian.values()], dim=1))
    return torch.stack(rows)


def sampled_rows(
    module: nn.Module,
    sample: Tensor,
    cotangents: Tensor,  # (rows, outputs)
) -> Tensor:  # (rows, params)
    """Form the Jacobian rows of vᵀ f of one sample for some v, by a backward pass each; a complex number is two."""
    params = [param for param in module.parameters() if param.requires_grad]
    outputs = module(sample[None])[0]
    rows = []
    for v in cotangents if outputs.requires_grad else ():
        grads = torch.autograd.grad(outputs, params, v, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        rows.append(torch.cat([(torch.view_as_real(p) if p.is_complex() else p).flatten() for p in parts]))
    num_params = sum(param.numel() * (1 + param.is_complex()) for param in params)
    return torch.stack(rows) if rows else cotangents.new_zeros(len(cotangents), num_params)


def _groups(params: Mapping[str, Tensor], max_numbers: int) -> Iterator[dict[str, Tensor]]:
    """Cut the parameters, in order, into groups of at most ``max_numbers`` scalars (a larger one stands alone)."""
    group: dict[str, Tensor] = {}
    for name, param in params.items():
        if group and sum(map(Tensor.numel, group.values())) + param.numel() > max_numbers:
            yield group
            group = {}
        group[name] = param
    if group:
        yield group


def reference_ntk(
    model: nn.Module,
    x1: Tensor,  # (n₁, …)
    x2: Tensor | None = None,  # (n₂, …)
    *,
    max_bytes: int = MAX_JACOBIAN_BYTES,
) -> Tensor:  # (n₁ m, n₂ m), float64, on the CPU
    """Compute the kernel of two batches in float64, K = Σ_p J₁ₚ J₂ₚᵀ over groups of parameters p.

    References:
        Jacot, Gabriel, Hongler (2018), arXiv:1806.07572, §4.
    """
    device = torch.device("cpu")  # MPS has no float64
    module = evaluation_copy(model, torch.float64, device)
    left = as_input(x1, torch.float64, device)
    right = left if x2 is None else as_input(x2, torch.float64, device)
    samples = len(left) + (0 if x2 is None else len(right))
    with exact_arithmetic(device):
        num_outputs = module(left[:1]).shape[1]
        kernel = torch.zeros(len(left) * num_outputs, len(right) * num_outputs, dtype=torch.float64)
        for group in _groups(trainable(module), max_bytes // (8 * samples * num_outputs)):
            rows = jacobian_rows(module, group, left).flatten(0, 1)
            columns = rows if x2 is None else jacobian_rows(module, group, right).flatten(0, 1)
            kernel.addmm_(rows, columns.T)
    return kernel
