"""What is rounded where: compute dtype, accumulation dtype, and the switches that must not change them silently."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkgen.errors import UnknownNameError


@dataclass(frozen=True)
class Precision:
    """A policy: the dtype of network, factors and products, and the dtype in which products are accumulated."""

    name: str
    compute_dtype: torch.dtype
    accumulate_dtype: torch.dtype


POLICIES = {
    "float32": Precision("float32", torch.float32, torch.float32),
    "float64": Precision("float64", torch.float64, torch.float64),
}


def policy(name: str) -> Precision:
    """Look a policy up by name.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if name not in POLICIES:
        raise UnknownNameError("precision", name, POLICIES)
    return POLICIES[name]


def widen(x: Tensor) -> Tensor:
    """Convert to float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@contextmanager
def exact_arithmetic(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Compute as the policy says, whatever the process has been set to, and leave the process as it was.

    Gradients on, inference mode and autocast off, no TF32 and no bfloat16 inside float32 products, deterministic cuDNN
    algorithms, and the number of threads that the plan records (matrix products differ bitwise between thread counts).
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(
            torch.backends.cudnn.flags(
                enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
            )
        )
        stack.enter_context(_ieee_float32())
        stack.enter_context(flushed_denormals())
        if threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        yield


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Treat numbers below the smallest normal one as zero: a CPU needs a hundred times longer for each of them."""
    smallest = torch.finfo(torch.float32).tiny
    were_flushed = bool(torch.tensor([smallest]).mul(0.5).item() == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)


@contextmanager
def _ieee_float32() -> Iterator[None]:
    """Switch reduced-precision float32 products off in every backend that has such a switch."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn]
    switches = [
        switch
        for backend in backends
        for switch in (backend, *(getattr(backend, name, None) for name in ("matmul", "conv", "rnn")))
        if hasattr(switch, "fp32_precision")
    ]
    if not switches:  # torch before 2.9 has one switch for all
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    found = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, value in zip(switches, found, strict=True):
            switch.fp32_precision = value
