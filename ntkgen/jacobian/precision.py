"""What is rounded where: compute dtype, accumulation dtype, and the switches that must not change them silently."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ntkgen.alone import alone
from ntkgen.errors import InputError, UnknownNameError

Rounding = Literal["ieee", "tf32", "bf16"]


@dataclass(frozen=True)
class Precision:
    """A policy: the dtypes of the network, of what is kept of a sample, of its products, and how those round."""

    name: str
    compute_dtype: torch.dtype  # the network, and its passes
    factor_dtype: torch.dtype  # inputs, cotangents and kept rows
    accumulate_dtype: torch.dtype  # intermediates (A, H, G, rows that are built for a product) and sums
    rounding: Rounding = "ieee"  # what large products may do to their operands


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
    """Look a policy up by name.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if name not in POLICIES:
        raise UnknownNameError("precision", name, POLICIES)
    return POLICIES[name]


def check_device(precision: Precision, device: torch.device) -> None:
    """Refuse a policy that a device cannot follow.

    Raises:
        InputError: If it has no float64, or no TF32.
    """
    if device.type == "mps" and torch.float64 in {precision.compute_dtype, precision.accumulate_dtype}:
        raise InputError(
            f"Apple's GPUs have no float64, which --precision {precision.name} needs: expected float32 on mps, or "
            "--device cpu. Use one."
        )
    if precision.rounding == "tf32" and device.type != "cuda":
        raise InputError(
            f"--precision tf32 is a way of NVIDIA's tensor cores: expected --device cuda, found {device.type}. Use "
            "--precision float32, which costs the same here."
        )


def widen(x: Tensor) -> Tensor:
    """Convert to float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@contextmanager
def exact_arithmetic(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Compute as the policy says, whatever the process has been set to, and leave the process as it was.

    Gradients on, inference mode and autocast off, no TF32 and no bfloat16 inside float32 products, deterministic cuDNN
    algorithms, and the number of threads that the plan records (matrix products differ bitwise between thread counts).
    These are switches of the process: another thread of it that computes too waits until this block ends.
    """
    with ExitStack() as stack:
        stack.enter_context(alone())
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_deterministic_cudnn())
        stack.enter_context(_ieee_float32(device))
        stack.enter_context(flushed_denormals())
        if threads is not None:
            stack.enter_context(fixed_threads(threads))
        yield


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Use so many threads, whose number decides the last bits of matrix products."""
    with alone():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Treat numbers below the smallest normal one as zero: a CPU needs a hundred times longer for each of them."""
    smallest = torch.tensor([torch.finfo(torch.float32).tiny], dtype=torch.float32, device="cpu")
    were_flushed = bool(smallest.mul(0.5).item() == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)


@contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """Use the same algorithm each time, chosen without a measurement."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


@contextmanager
def _ieee_float32(device: torch.device) -> Iterator[None]:
    """Switch reduced-precision float32 products off where the device's backends have them on.

    The other switches are not touched: what is set in one place is inherited in another.
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
            switch.fp32_precision = "none"  # inherited again, if it was
            if switch.fp32_precision != value:
                switch.fp32_precision = value


@contextmanager
def reduced_products(device: torch.device, rounding: Rounding) -> Iterator[None]:
    """Let float32 matrix products round their operands, where the device gains by it."""
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
