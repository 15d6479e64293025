"""What a kernel is of, and whether a network is the one that a store was begun with."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.blocks import Block
from ntkgen.engine.machine import environment
from ntkgen.errors import FingerprintError, StoreError
from ntkgen.fingerprints import parameter_fingerprint
from ntkgen.inputs import Inputs
from ntkgen.jacobian.compute import pad_batch
from ntkgen.jacobian.evaluation import outputs_of
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.plan.tiles import TileGrid
from ntkgen.store.schema import side_arrays
from ntkgen.store.store import KernelStore

# How far the logits of the same network may be from the stored ones, relative to the largest: where the machine is
# the same, and where another one adds up in another order.
SAME_MACHINE = {torch.float64: 1e-12, torch.float32: 1e-6}
OTHER_MACHINE = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class KernelSpec:
    """How a kernel is computed and stored."""

    output: str = "full"
    precision: str = "float32"
    dtypes: tuple[str, ...] = ("float16", "float32")
    layout: str = "auto"
    tile_side: int | None = None
    memory_bytes: int | None = None
    replan: bool = False
    certify: bool = True  # compare the finished kernel with the exact one


def identity_of(model: nn.Module, inputs: Inputs, spec: KernelSpec, grid: TileGrid) -> dict[str, Any]:
    """Collect what a run that continues a store must agree with."""
    return {
        "parameters": parameter_fingerprint(model),
        "samples": inputs.fingerprint(),
        "output": spec.output,
        "precision": spec.precision,
        "tile_side": grid.side,
        "dtypes": list(spec.dtypes),
    }


def require_same_logits(store: KernelStore, network: Network, inputs: Inputs) -> None:
    """Refuse to continue, or to return, a store whose network gave other outputs for its samples.

    Equal parameters do not make equal networks: an activation or an epsilon is not among them. One batch that the
    store has is run again, as it was run for the store.

    Raises:
        FingerprintError: If its logits differ.
    """
    plan, grid = store.manifest.plan, store.grid
    missing = set(store.missing_blocks())
    there = next((index for index in range(plan.num_sides) if index not in missing), None)
    if there is None or not store.num_logits:
        return
    batch = next(iter(plan.side_blocks(there)[0].pieces(plan.jacobian.batch_size)))
    expected: Tensor | None = None
    with suppress(StoreError):  # a damaged array is written anew
        expected = torch.from_numpy(_stored_logits(store, batch, is_column=there >= grid.num_blocks))
    if expected is None or not bool(expected.isfinite().all()):
        return
    is_same_machine = not plan.environment.differences(environment(network.device, plan.environment.threads))
    samples = network.input(inputs.all[batch.start : batch.stop])
    with exact_arithmetic(network.device, plan.environment.threads), torch.no_grad():
        logits = outputs_of(network.module, pad_batch(samples, plan.jacobian.batch_size))
        found = logits[: len(samples)].cpu().double()
    tolerance = (SAME_MACHINE if is_same_machine else OTHER_MACHINE)[network.precision.compute_dtype]
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= tolerance * max(scale, 1e-30):
        raise FingerprintError(
            f"The store at {store.name} was made of another network with the same parameters: its outputs for the "
            f"first samples were expected to be the stored ones, and differ by {difference:.1e} (largest output "
            f"{scale:.1e}). Was an activation, an epsilon or the code of the network changed? Use a new path for this "
            "network, or the original network for this store."
        )


def _stored_logits(store: KernelStore, batch: Block, *, is_column: bool) -> Any:  # (samples, logits)
    name = side_arrays(store.grid)[1 if is_column else 0][1]
    first = store.grid.num_samples if is_column else 0
    return store.read(name)[batch.start - first : batch.stop - first]
