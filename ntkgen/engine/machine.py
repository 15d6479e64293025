"""The machine: its device, memory and rates, and what the bits of a computation depend on."""

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
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device of this machine.

    Raises:
        InputError: If there is no such device here.
    """
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kind, _, index = name.partition(":")
    is_written_well = re.fullmatch(r"\w+(:\d+)?", name) is not None
    if not is_written_well or kind not in here or int(index or 0) >= here[kind]:
        found = ", ".join(f"{kind} ({count})" for kind, count in here.items() if count)
        raise InputError(f"There is no device {name!r} here: expected auto or one of those found, {found}.")
    return torch.device(name)


def environment(device: torch.device, threads: int | None = None) -> Environment:
    """Describe what the bits of a computation on this machine depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
    return Environment(device.type, name, torch.__version__, threads or torch.get_num_threads())


def _cpu_model() -> str:
    """Name the processor: matrix libraries choose their kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Machine:
    """What computes: what its bits depend on, its memory, and the rate of each product."""

    environment: Environment
    budget: Budget
    rates: Rates


def describe_machine(
    device: torch.device, precision: str, memory_bytes: int | None, *, threads: int | None = None
) -> Machine:
    """Describe this machine, computing with some threads."""
    budget = memory_budget(device, memory_bytes)
    with fixed_threads(threads or torch.get_num_threads()):
        return Machine(environment(device), budget, rates_of(device, precision))


def memory_budget(device: torch.device, requested: int | None, *, sharers: int = 1, limit: int | None = None) -> Budget:
    """Compute how many bytes a computation may take: the request, its share of the device, or its process's limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    most = limit or total
    return Budget.of(requested, total_bytes=min(total // sharers, most), free_bytes=min(free // sharers, most))


def check_environment(plan: Plan, device: torch.device) -> None:
    """Require that this machine repeats the bytes of a plan."""
    check_plan(plan, environment(device))


def check_plan(plan: Plan, found: Environment) -> None:
    """Require that a machine repeats the bytes of a plan. Threads are set as planned.

    Raises:
        PlanError: If device, its type or torch differ; the message names what does.
    """
    if differences := plan.environment.differences(replace(found, threads=plan.environment.threads)):
        raise PlanError(
            f"The store's plan cannot be repeated here ({'; '.join(differences)}): the tiles still missing would "
            "differ from the others in their last bits. Use a machine like the first, or set `replan` to accept that."
        )
