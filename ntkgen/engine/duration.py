"""How long a kernel takes on this machine: one batch of each kind of work is measured, and the plan counts the rest."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.checks.certify import exact_operator
from ntkgen.files.folder import Folder, LocalFolder
from ntkgen.jacobian.choice import order_nanoseconds
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.outputs import output_map
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.plan.explain import Work
from ntkgen.plan.plan import Plan
from ntkgen.store.certificate import Sampling

# The projection may be wrong by this factor in both directions: a machine slows down when it is warm or shared.
UNCERTAINTY = 1.5
# Samples with which the products of the certificate are measured.
CERTIFIED_SAMPLES = 8
DISK_BYTES = 1 << 25


@dataclass(frozen=True)
class Duration:
    """Seconds that each kind of work is projected to take. Tiles are written while the next ones are computed."""

    training: float = 0.0  # an upper bound: training ends at its target
    factors: float = 0.0
    products: float = 0.0
    disk: float = 0.0
    certificate: float = 0.0

    @property
    def total(self) -> float:
        """Seconds from beginning to end."""
        return self.training + max(self.factors + self.products, self.disk) + self.certificate

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most seconds that the total is expected to be."""
        return self.total / UNCERTAINTY, self.total * UNCERTAINTY

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values."""
        return {**asdict(self), "total": self.total, "range": list(self.range)}


def kernel_duration(
    plan: Plan,
    work: Work,
    network: Network,
    x: Tensor,  # (samples, …), some samples of the kernel
    *,
    num_workers: int = 1,
) -> Duration:
    """Project the seconds of factors and products, from one batch of factors and the rates that the plan goes by."""
    jacobian = plan.jacobian
    batch = x[: jacobian.batch_size]
    with exact_arithmetic(network.device, plan.environment.threads):
        per_batch = _seconds(lambda: compute_factors(network, jacobian, batch), network.device)
    per_pair = sum(
        order_nanoseconds(layer, jacobian.num_outputs, plan.block_samples, jacobian.rates, jacobian.reduction)
        for layer in jacobian.layers
    )
    per_pair += 1000 * jacobian.dense_macs // jacobian.rates.product
    return Duration(
        factors=work.factor_samples * per_batch / jacobian.batch_size / num_workers,
        products=work.pairs * per_pair * 1e-9 / num_workers,
    )


def certificate_seconds(
    model: nn.Module,
    x: Tensor,  # (samples, …), some samples of the kernel
    num_samples: int,
    output: str,
    sampling: Sampling,
) -> float:
    """Project the seconds of a certificate of so many samples, from one product with a few of them."""
    few = x[:CERTIFIED_SAMPLES]
    logits = exact_operator(model, few).num_outputs
    chosen = output_map(output, logits)
    exact = exact_operator(model, few, transform=chosen.matrix)
    v = torch.ones(exact.shape[1], dtype=exact.dtype, device=exact.device)
    first = _seconds(lambda: exact @ v, exact.device, warm_up=False)  # it tries every batch, too
    product = _seconds(lambda: exact @ v, exact.device, warm_up=False)
    columns = sampling.num_probes * (1 if chosen.reduction == "none" else logits)
    per_sample = (columns * product + max(0.0, first - product)) / len(few)
    return num_samples * per_sample + sampling.num_pairs * (exact.num_outputs + 1) * product / len(few)


def disk_seconds(folder: Folder, num_bytes: int) -> float:
    """Project the seconds that a disk takes to write so many bytes, from a file that is removed again.

    In an object store nothing is measured, and the answer is zero.
    """
    if not isinstance(folder, LocalFolder) or not num_bytes:
        return 0.0
    there = next(path for path in (folder.path, *folder.path.parents) if path.is_dir())
    return num_bytes / DISK_BYTES * _write_seconds(there)


def _write_seconds(folder: Path) -> float:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            file.write(os.urandom(DISK_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return time.perf_counter() - started
    except OSError:  # a folder that cannot be written is refused elsewhere
        return 0.0


def _seconds(run: Callable[[], object], device: torch.device, *, warm_up: bool = True) -> float:
    """Time something; after once for the warm-up, unless that takes so long that it hardly matters."""
    for _ in range(2 if warm_up else 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        if seconds > 2:
            break
    return seconds
