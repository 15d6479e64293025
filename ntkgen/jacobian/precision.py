"""Precision policies: compute dtype, accumulation dtype, and the torch settings that could change them silently."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkgen.alone import alone
from ntkgen.errors import InputError, ModelError, UnknownNameError

Rounding = Literal["ieee", "tf32", "bf16"]


@dataclass(frozen=True)
class Precision:
    """A policy: the dtypes of the network, of the factors and of the products, and the rounding of the products."""

    name: str
    compute_dtype: torch.dtype  # the network and its passes
    factor_dtype: torch.dtype  # inputs, cotangents and stored rows
    accumulate_dtype: torch.dtype  # intermediates (A, H, G, rows that are built for a product) and sums
    rounding: Rounding = "ieee"  # permitted rounding of the operands of large products


POLICIES = {
    policy.name: policy
    for policy in (
        Precision("float64", torch.float64, torch.float64, torch.float64),
        Precision("float64-accumulate", torch.float32, torch.float32, torch.float64),
        Precision("float32", torch.float32, torch.float32, torch.float32),
        Precision("tf32", torch.float32, torch.float32, torch.float32, "tf32"),
        Precision("bfloat16", torch.float32, torch.bfloat16, torch.float32, "bf16"),
    )
}


def policy(name: str) -> Precision:
    """Look up a policy by its name.

    Raises:
        UnknownNameError: If the name is unknown.
    """
    if name not in POLICIES:
        raise UnknownNameError("precision", name, POLICIES)
    return POLICIES[name]


def precision_of(model: object, precision: str | None) -> str:
    """Choose the precision: the given one, or float64 for a network of float64 parameters, and otherwise float32.

    >>> precision_of(nn.Linear(2, 1).double(), None), precision_of(nn.Linear(2, 1), None)
    ('float64', 'float32')
    """
    if precision is not None or not isinstance(model, nn.Module):
        return precision or "float32"
    dtypes = {param.dtype for param in model.parameters() if param.is_floating_point() or param.is_complex()}
    return "float64" if dtypes and dtypes <= {torch.float64, torch.complex128} else "float32"


def check_device(precision: Precision, device: torch.device) -> None:
    """Refuse a policy that a device does not support.

    Raises:
        InputError: If the device lacks float64 or TF32, and the policy needs it.
    """
    if device.type == "mps" and torch.float64 in {precision.compute_dtype, precision.accumulate_dtype}:
        raise InputError(
            f"Apple's GPUs have no float64, which `precision` {precision.name} needs: expected float32 on mps, or "
            "`device` cpu. Use one."
        )
    if precision.rounding == "tf32" and device.type != "cuda":
        raise InputError(
            f"`precision` tf32 is a way of NVIDIA's tensor cores: expected `device` cuda, found {device.type}. Use "
            "`precision` float32, which costs the same here."
        )


def widen(x: Tensor) -> Tensor:
    """Convert to float64. On a device without float64 the result is on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@contextmanager
def exact_arithmetic(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Set the settings of torch that exact arithmetic needs, and restore the previous settings at the end.

    Gradients are enabled. Inference mode, autocast, and TF32 or bfloat16 inside float32 products are disabled. cuDNN
    uses deterministic algorithms. Attention is computed by plain products, because a fused kernel may make the gradient
    of a sample depend on its batch. The number of threads is that of the plan, because matrix products differ bitwise
    between thread counts. The settings apply to the whole process. Another thread that needs them waits until this
    block ends.
    """
    with ExitStack() as stack:
        stack.enter_context(alone())
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_deterministic_cudnn())
        stack.enter_context(_ieee_float32(device))
        stack.enter_context(flushed_denormals())
        stack.enter_context(plain_attention())
        if threads is not None:
            stack.enter_context(fixed_threads(threads))
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """Use the implementation of attention whose samples are independent, and which can be differentiated twice."""
    mha: Any = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(before)


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Set the number of threads, on which the last bits of matrix products depend."""
    with alone():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Treat denormal numbers as zero. A CPU needs a hundred times longer for each denormal number."""
    smallest = torch.tensor([torch.finfo(torch.float32).tiny], dtype=torch.float32, device="cpu")
    were_flushed = bool(smallest.mul(0.5).item() == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)


@contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """Use deterministic algorithms, chosen without a benchmark."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


@contextmanager
def _ieee_float32(device: torch.device) -> Iterator[None]:
    """Disable float32 products of reduced precision in the backends of the device that have them enabled.

    Other settings are not changed, because backends inherit settings from each other.
    """
    backends: Any = torch.backends
    switches = {
        "cuda": [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn],
        "cpu": [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn],
    }.get(device.type, [])
    reduced = {switch: switch.fp32_precision for switch in switches if switch.fp32_precision not in {"ieee", "none"}}
    for switch in reduced:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, value in reduced.items():
            switch.fp32_precision = "none"  # restores an inherited value
            if switch.fp32_precision != value:
                switch.fp32_precision = value


@contextmanager
def reduced_products(device: torch.device, rounding: Rounding) -> Iterator[None]:
    """Let float32 matrix products round their operands, on devices where this is faster."""
    backends: Any = torch.backends
    switch = {"cuda": backends.cuda.matmul, "cpu": backends.mkldnn.matmul}.get(device.type)
    if switch is None or rounding == "ieee" or (device.type == "cuda" and rounding == "bf16"):
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = rounding
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextmanager
def default_dtype_of(module: nn.Module) -> Iterator[None]:
    """Give new tensors the dtype of a network, such as a first state that a forward pass makes by ``torch.zeros``."""
    before = torch.get_default_dtype()
    dtype = next((param.dtype for param in module.parameters() if param.is_floating_point()), before)
    if dtype == before:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Refuse a network with an autocast region in its forward pass, which rounds in another precision than the plan's.

    Raises:
        ModelError: If such a region is entered.
    """
    enter: Any = torch.autocast.__enter__

    def refuse(self: torch.autocast) -> Any:
        if self._enabled:
            raise ModelError(
                "The network computes in another precision than asked for: expected float32 or float64 as `precision` "
                f"says, found an autocast region of {self.fast_dtype} in its forward pass. Was it written for training "
                "in mixed precision? Remove the region, or build the network with autocast disabled."
            )
        return enter(self)

    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
