"""The machine: its device, its memory, its rates, and its properties that determine the bits of a result."""

import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from ntkgen.errors import InputError, PlanError
from ntkgen.jacobian.cost import Rates
from ntkgen.jacobian.measure import rates_of
from ntkgen.jacobian.precision import fixed_threads
from ntkgen.plan.plan import Budget, Environment, Plan


def choose_device(name: str) -> torch.device:
    """Choose a device of this machine by its name: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        InputError: If this machine has no such device.
    """
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kind, _, index = name.partition(":")
    is_valid = re.fullmatch(r"\w+(:\d+)?", name) is not None
    if not is_valid or kind not in counts or int(index or 0) >= counts[kind]:
        devices = ", ".join(f"{kind} ({count})" for kind, count in counts.items() if count)
        raise InputError(
            f"There is no device {name!r} on this machine: expected auto or one of the devices found, {devices}. Is "
            "the name misspelt, or is a driver missing? Give one of these names."
        )
    return torch.device(name)


def environment(device: torch.device, threads: int | None = None) -> Environment:
    """Describe the properties of this machine that determine the bits of a result."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
    return Environment(device.type, name, torch.__version__, threads or torch.get_num_threads())


def _cpu_model() -> str:
    """Return the model of the processor. Matrix libraries choose their kernels by the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Machine:
    """A machine: its properties that determine the bits of a result, its memory, and the rates of its products."""

    environment: Environment
    budget: Budget
    rates: Rates


def describe_machine(
    device: torch.device, precision: str, memory_bytes: int | None, *, threads: int | None = None
) -> Machine:
    """Describe this machine for a computation with the given or the current number of threads."""
    budget = memory_budget(device, memory_bytes)
    with fixed_threads(threads or torch.get_num_threads()):
        return Machine(environment(device), budget, rates_of(device, precision))


def memory_budget(device: torch.device, requested: int | None, *, sharers: int = 1, limit: int | None = None) -> Budget:
    """Compute the memory of a computation: the requested bytes, its share of the device, or its process's limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    most = limit or total
    return Budget.of(requested, total_bytes=min(total // sharers, most), free_bytes=min(free // sharers, most))


def check_environment(plan: Plan, device: torch.device) -> None:
    """Require that this machine computes the same bytes as the machine of a plan."""
    check_plan(plan, environment(device))


def check_plan(plan: Plan, found: Environment) -> None:
    """Require that a machine computes the same bytes as that of a plan. The number of threads is set by the plan.

    Raises:
        PlanError: If the device, its type or the version of torch differ. The message names the differences.
    """
    if differences := plan.environment.differences(replace(found, threads=plan.environment.threads)):
        raise PlanError(
            "This machine cannot continue the store's plan with equal bytes: expected the device and the torch version "
            f"of the plan, found differences ({'; '.join(differences)}). The missing tiles would differ from the "
            "others in their last bits. Was the store begun on another machine? Use a machine like the first, or set "
            "`replan` to accept the differences."
        )
