"""Projection of a kernel's duration on this machine: one batch of each kind of work is timed and extrapolated."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import torch
from torch import Tensor, nn

from ntkgen.checks.certify import exact_operator
from ntkgen.checks.pairs import affordable_outputs
from ntkgen.checks.rows import ExactRows
from ntkgen.checks.sampling import Sampling
from ntkgen.files.folder import Folder, LocalFolder
from ntkgen.inputs import Inputs
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import contract
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.outputs import OutputMap
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.plan.explain import WorkCount
from ntkgen.plan.plan import Plan
from ntkgen.store.rounding import count_underflow, to_stored

Result = TypeVar("Result")

# Factor by which the real duration may be shorter or longer. A machine slows down when it is warm or shared.
UNCERTAINTY = 1.5
# Number of samples for timing the products of the certificate (the measured error bound), and maximum number of samples
# of a timed block.
CERTIFIED_SAMPLES, BLOCK_SAMPLES = 8, 128
# Duration of a first pass, in seconds, above which no second pass is timed.
SLOW_SECONDS = 2.0
# Number of entries of the tile for timing disk writes and reads.
STORED_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Duration:
    """Projected duration of each kind of work, in seconds.

    Tiles are written while the next ones are computed, but rounding and checksums use the same processor. Therefore the
    durations are added.
    """

    training: float = 0.0  # an upper bound: training ends at its target
    factors: float = 0.0
    products: float = 0.0
    storing: float = 0.0  # rounding, checksums and the disk
    certificate: float = 0.0

    @property
    def total(self) -> float:
        """Total duration in seconds."""
        return self.training + self.factors + self.products + self.storing + self.certificate

    @property
    def range(self) -> tuple[float, float]:
        """Shortest and longest expected total duration in seconds."""
        return self.total / UNCERTAINTY, self.total * UNCERTAINTY

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {**asdict(self), "total": self.total, "range": list(self.range)}


def kernel_duration(
    plan: Plan,
    work: WorkCount,
    network: Network,
    x: Tensor,  # (samples, …), some samples of the kernel
    *,
    num_workers: int = 1,
) -> Duration:
    """Project the duration of factors and products by timing one batch of factors and one product of two blocks."""
    jacobian = plan.jacobian
    batch = x[: jacobian.batch_size]
    samples = min(plan.block_samples, BLOCK_SAMPLES)
    with exact_arithmetic(network.device, plan.environment.threads):
        per_batch, factors = _timed(lambda: compute_factors(network, jacobian, batch), network.device)
        block = factors.repeated(samples)
        per_product, _ = _timed(lambda: contract(block, block.repeated(samples), jacobian).cpu(), network.device)
    return Duration(
        factors=work.factor_samples * per_batch / jacobian.batch_size / num_workers,
        products=work.pairs * per_product / samples**2 / num_workers,
    )


def certificate_seconds(
    model: nn.Module,
    x: Tensor,  # (samples, …), some samples of the kernel
    num_samples: int,
    chosen: OutputMap,
    sampling: Sampling,
) -> float:
    """Project the duration of a certificate by random vectors, by timing one product with a few samples."""
    few = x[:CERTIFIED_SAMPLES]
    exact = exact_operator(model, few, transform=chosen.matrix)
    v = torch.ones(exact.shape[1], dtype=exact.dtype, device=exact.device)
    first, _ = _timed(lambda: exact @ v, exact.device, warm_up=False)  # includes the operator's trial of every batch
    product, _ = _timed(lambda: exact @ v, exact.device, warm_up=False)
    columns = sampling.num_probes * (1 if chosen.reduction == "none" else exact.num_outputs)
    per_sample = (columns * product + max(0.0, first - product)) / len(few)
    return num_samples * per_sample + sampling.num_pairs * (exact.num_outputs + 1) * product / len(few)


def whole_seconds(model: nn.Module, inputs: Inputs, chosen: OutputMap, passes: float) -> float:
    """Project the duration of a certificate that compares the whole kernel, by timing the passes of one sample."""
    exact = ExactRows.of(model, inputs, chosen)
    outputs = range(min(len(exact.matrix), affordable_outputs(exact.num_params)))
    rows, params = exact.empty(len(outputs), exact.num_params), list(exact.params.values())
    seconds, _ = _timed(lambda: exact.fill(rows, inputs.x[0], outputs, params), exact.matrix.device)
    return passes * seconds / len(outputs)


@dataclass(frozen=True)
class StorageRates:
    """Seconds per byte for writing a kernel to disk, and for reading it again."""

    write: float
    read: float


def storage_rates(folder: Folder, dtypes: Sequence[str]) -> StorageRates:
    """Measure how fast tiles are rounded, written and read, with a temporary file.

    Writing to an object store is not measured. Its duration is taken as zero.
    """
    values = np.random.default_rng(0).normal(size=STORED_NUMBERS).astype(np.float32)
    started = time.perf_counter()
    chunks = []
    for dtype in dtypes:
        if dtype == "float16":
            count_underflow(values, 8.0)
        chunks.append(to_stored(values, dtype, 8.0).tobytes())
        google_crc32c.value(chunks[-1])
    rounding = time.perf_counter() - started
    num_bytes = sum(map(len, chunks))
    writing = _write_seconds(folder, chunks)
    started = time.perf_counter()
    for chunk in chunks:
        google_crc32c.value(chunk)
        np.frombuffer(chunk, np.uint8).copy()
    return StorageRates((rounding + writing) / num_bytes, (time.perf_counter() - started) / num_bytes)


def _write_seconds(folder: Folder, chunks: Sequence[bytes]) -> float:
    if not isinstance(folder, LocalFolder):
        return 0.0
    existing = next(path for path in (folder.path, *folder.path.parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            started = time.perf_counter()
            for chunk in chunks:
                file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            return time.perf_counter() - started
    except OSError:  # `require_writable` refuses such a folder
        return 0.0


def _timed(run: Callable[[], Result], device: torch.device, *, warm_up: bool = True) -> tuple[float, Result]:
    """Time a function, and return the seconds and the result.

    The function runs once before as a warm-up, because a first pass can take twice as long as the later ones. If the
    warm-up takes longer than `SLOW_SECONDS`, its own duration is returned.
    """
    if warm_up:
        seconds, result = _timed_once(run, device)
        if seconds > SLOW_SECONDS:
            return seconds, result
        del result  # two results may not fit into memory
    return _timed_once(run, device)


def _timed_once(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result
