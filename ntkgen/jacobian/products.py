"""Matrix products, computed by the fastest library on the device, which is called the route."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ntkgen.jacobian.cost import LONGEST_SUM, slices
from ntkgen.jacobian.precision import Precision, reduced_products

# Maximum number of float32 products in one sum of `torch.mm`, which adds them one after the other for small results.
LONGEST_MM_SUM = 1 << 13
# Minimum number of multiply-adds for which each sample gets its own call of a matrix product.
LARGE_MACS = 1 << 19
# Minimum number of multiply-adds for which oneDNN is faster than `torch.mm`. Its calls take longer.
ONEDNN_MACS = 1 << 20


def matmul_nt(
    a: Tensor,  # (rows, k)
    b: Tensor,  # (columns, k)
    route: str = "mm",
) -> Tensor:  # (rows, columns)
    """Multiply ``a bᵀ`` with `torch.mm`, or with oneDNN for float32 on a CPU. oneDNN is twice as fast on some CPUs."""
    is_onednn = route == "onednn" and a.dtype == torch.float32 and a.device.type == "cpu"
    is_onednn = is_onednn and len(a) * len(b) * a.shape[1] >= ONEDNN_MACS
    product, longest = (_onednn, LONGEST_SUM) if is_onednn else (_mm, LONGEST_MM_SUM)
    if a.dtype == torch.float64 or a.device.type != "cpu" or a.shape[1] <= longest:
        return product(a, b)
    result = a.new_zeros(len(a), len(b))
    for part in slices(a.shape[1], longest):
        result += product(a[:, part], b[:, part])
    return result


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.mT


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    # the operator that torch.compile uses for linear layers; torch.mm calls MKL instead
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.contiguous(), None, "none", [], "")
    return result


def routes(device: torch.device) -> tuple[str, ...]:
    """List the routes that work on this machine, by a trial with a small product."""
    a = torch.arange(12.0, dtype=torch.float32, device=device).view(3, 4)
    if device.type != "cpu":
        return ("mm",)
    try:
        works = torch.equal(_onednn(a, a), a @ a.T)
    except (RuntimeError, AttributeError, NotImplementedError):  # a torch built without oneDNN
        works = False
    return ("mm", "onednn") if works else ("mm",)


@cache
def usual_route(device: torch.device) -> str:
    """Choose a route without a measurement: oneDNN where it works. MKL is half as fast on some processors."""
    return routes(device)[-1]


@dataclass(frozen=True)
class Products:
    """The matrix products of a contraction, rounded according to a precision policy."""

    precision: Precision
    route: str

    def wide(self, x: Tensor) -> Tensor:
        """Convert to the dtype of intermediates and sums."""
        return x.to(self.precision.accumulate_dtype)

    def operand(self, x: Tensor) -> Tensor:
        """Convert to the dtype of operands of `rounded`: bfloat16 if the policy rounds to it."""
        is_rounded = self.precision.rounding == "bf16"
        return x.to(self.precision.factor_dtype if is_rounded else self.precision.accumulate_dtype)

    def exact(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply operands in the dtype of sums, a bᵀ, without rounding them."""
        return matmul_nt(a, b, self.route)

    def rounded(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply operands, a bᵀ, with the rounding of the policy. The result has the dtype of sums."""
        if self.precision.rounding == "ieee":
            return matmul_nt(a, b, self.route)
        with reduced_products(a.device, self.precision.rounding):
            if a.dtype == torch.bfloat16 and a.device.type == "cuda":
                mm: Any = torch.mm
                result: Tensor = mm(a, b.mT, out_dtype=self.precision.accumulate_dtype)
                return result
            return matmul_nt(self.wide(a), self.wide(b))  # exact for bfloat16 operands; fast if the processor has AMX


def rows_of(
    cotangents: Tensor,  # (samples, groups, channels, positions)
    inputs: Tensor,  # (samples, groups, k, positions)
    route: str = "mm",
    out: Tensor | None = None,
) -> Tensor:  # (samples, groups, channels, k)
    """Build Jacobian rows, Σ_t g[t] ⊗ a[t], in new memory or in ``out``. Large products are sample by sample."""
    samples, groups, channels, positions = cotangents.shape
    k = inputs.shape[2]
    if route == "mm" or channels * k * positions < LARGE_MACS or cotangents.dtype != torch.float32:
        return torch.matmul(cotangents, inputs.mT, out=out)
    out = cotangents.new_empty(samples, groups, channels, k) if out is None else out
    for sample in range(samples):
        for group in range(groups):
            out[sample, group] = matmul_nt(cotangents[sample, group], inputs[sample, group], route)
    return out
