"""The measured speed of a device. It is measured once for each device and version of torch, and stored in a file."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkgen.jacobian.cost import Rates
from ntkgen.jacobian.precision import Precision, policy
from ntkgen.jacobian.products import Products, routes, rows_of

TRIALS = 5


@cache
def rates_of(device: torch.device, precision: str) -> Rates:
    """Look up the rates of a device for a precision policy, or measure them in a fraction of a second.

    The rates are stored in ``$XDG_CACHE_HOME/ntkgen/rates.json`` (``~/.cache`` by default). With the environment
    variable ``NTKGEN_RATES=default`` the built-in rates are used. Without a home directory no rates are stored.
    """
    if os.environ.get("NTKGEN_RATES") == "default":
        return Rates()
    file = _file()
    key = f"{_device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, {precision}"
    known = {} if file is None else _read(file)
    if key not in known:
        known[key] = dataclasses.asdict(measure(device, policy(precision)))
        if file is not None:
            _write(file, known)
    return Rates(**known[key])


def _file() -> Path | None:
    """Return the path of the stored rates, or None for a user without a home directory, as in some containers."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return caches / "ntkgen" / "rates.json"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in known.items() if _are_rates(value)} if isinstance(known, dict) else {}


def _are_rates(value: object) -> bool:
    """Check whether a value from a file is a set of rates. The file may be damaged, or from another version."""
    if not isinstance(value, dict) or set(value) != {field.name for field in dataclasses.fields(Rates)}:
        return False
    return all(isinstance(rate, int) and rate > 0 for name, rate in value.items() if name != "route")


def _write(file: Path, known: dict[str, dict[str, Any]]) -> None:
    with contextlib.suppress(OSError):  # without a stored value the next run measures again
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
        draft.replace(file)


def measure(device: torch.device, precision: Precision) -> Rates:
    """Measure the rates of a device, on products like those of a middle layer of a residual network.

    Rates are rounded to one digit, so that two measurements on one machine mostly agree and give the same plans.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=precision.accumulate_dtype, device=device)

    generator = torch.Generator(device).manual_seed(0)
    rows, columns = random(160, 2048), random(1280, 2048)
    gram, right, left = random(256, 64), random(2560, 64), random(256, 10, 256)
    cotangents, inputs = random(4, 1, 160, 256), random(4, 1, 1152, 256)
    speed: dict[str, int] = {}
    for route in routes(device):
        products = Products(precision, route)
        operands = products.operand(rows), products.operand(columns)
        speed[route] = _rate(device, 160 * 1280 * 2048, partial(products.rounded, *operands))
    best = max(speed, key=lambda route: speed[route])
    products = Products(precision, best)
    carried = products.exact(gram, right).view(256, 10, 256)
    return Rates(
        route=best,
        product=speed[best],
        building=_rate(device, 4 * 160 * 1152 * 256, lambda: rows_of(cotangents, inputs, best)),
        carrying=_rate(device, 256 * 64 * 2560, lambda: products.exact(gram, right)),
        finishing=_rate(device, 256 * 10 * 10 * 256, lambda: torch.bmm(left, carried.mT)),
        touching=_rate(device, rows.numel() + columns.numel(), lambda: (rows.add(1.0), columns.add(1.0))),
    )


def _rate(device: torch.device, work: int, run: Callable[[], object]) -> int:
    """Return the amount of work per microsecond, from the median time of several runs."""
    times = []
    for _ in range(TRIALS + 1):  # the first run is a warm-up
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return int(float(f"{work / max(sorted(times[1:])[TRIALS // 2], 1e-7) / 1e6:.1g}"))
