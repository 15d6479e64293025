"""A module and its samples → a finished store: what `ntkgen.compute` and the command line share."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkgen.checkpoint import parameter_fingerprint
from ntkgen.errors import InputError, ShapeError
from ntkgen.jacobian.measure import rates_of
from ntkgen.jacobian.network import Network, prepare
from ntkgen.jacobian.outputs import output_map
from ntkgen.jacobian.precision import policy
from ntkgen.kernel import engine
from ntkgen.kernel.arrays import Samples
from ntkgen.kernel.certify import add_certificate, forget_certificate
from ntkgen.kernel.inputs import Inputs
from ntkgen.kernel.manifest import Manifest, check_identity, resolve_layout
from ntkgen.kernel.plan import Choices, Plan, make_plan
from ntkgen.kernel.rounding import check_dtypes
from ntkgen.kernel.store import KernelStore, create_store, open_store
from ntkgen.kernel.tiles import TileGrid, make_grid
from ntkgen.lock import write_lock

# So many samples are looked at for two different ones to try a network on.
PROBE_SAMPLES = 16


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


def compute(
    model: nn.Module,
    inputs: Tensor,  # (n, …)
    against: Tensor | None = None,  # (n', …)
    *,
    store: str | PathLike[str],
    labels: Tensor | None = None,  # (n,)
    report: engine.Report = lambda *_: None,
    **settings: Any,
) -> KernelStore:
    """Compute the empirical neural tangent kernel of a module into a Zarr store, tile by tile, or finish it.

    ``K = J Jᵀ`` of the inputs, of (n m × n m), or with other samples to compare ``against`` ``K = J J'ᵀ``. An
    interrupted computation goes on with the same call; a store of other parameters, samples or settings is refused.
    The module is copied and never changed; it is computed on the module's device.

    Args:
        model: Any module that maps (samples, …) to (samples, outputs) and treats samples one by one.
        inputs: The samples of the rows.
        against: The samples of the columns; those of the rows where it is left out.
        store: Where the store is, or is to be.
        labels: Integers to be stored beside the kernel; -1 where they are left out.
        report: Called with the stage, what is done and how much there is.
        **settings: The fields of `KernelSpec`: ``output``, ``precision``, ``dtypes``, ``layout``, ``tile_side``,
            ``memory_bytes``, ``replan``, ``certify``.

    Raises:
        InputError: If there is no sample, or a setting that does not exist.
        ShapeError: If labels or samples do not fit each other.
        FingerprintError: If the store is of something else.
        BudgetError: If the memory is too small.
        ModelError: If the kernel of this network is not defined.
    """
    spec = _spec_of(settings)
    given = _inputs_of(inputs, against, labels)
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    path = Path(store)
    network, plan_anew = ready(model, given.x[:PROBE_SAMPLES], spec, given.counts, device)
    budget = engine.memory_budget(device, spec.memory_bytes)
    with write_lock(path):
        opened = open_or_create(path, spec, identity_of(model, given, spec, network), given, {}, plan_anew)
        if not opened.is_complete:
            plan = opened.manifest.plan
            engine.check_environment(plan, device)
            cached = plan.cached_blocks(budget)
            forget_certificate(opened)
            engine.run(network, given.all, opened, cached_blocks=cached, report=report)
        if spec.certify and opened.manifest.certificate is None:
            add_certificate(opened, model, given, report=report)
    return opened


def _spec_of(settings: Mapping[str, Any]) -> KernelSpec:
    known = {field.name for field in dataclasses.fields(KernelSpec)}
    if unknown := set(settings) - known:
        raise InputError(
            f"There is no setting {sorted(unknown)[0]!r}: expected one of {', '.join(sorted(known))}. Is it misspelt, "
            "or an option of the command line under another name?"
        )
    spec = KernelSpec(**settings)
    return dataclasses.replace(spec, dtypes=check_dtypes(spec.dtypes))


def _inputs_of(x: Tensor, against: Tensor | None, labels: Tensor | None) -> Inputs:
    for side in (x, against):
        if side is not None and (not isinstance(side, Tensor) or not len(side)):
            raise InputError(
                f"A kernel needs samples: expected a torch.Tensor with at least one, found {type(side).__name__} "
                f"of length {len(side)}. Pass some, or leave out what it is compared against."
            )
    if against is not None and against.shape[1:] != x.shape[1:]:
        raise ShapeError(
            f"Rows and columns hold samples of different shapes, {tuple(x.shape[1:])} and {tuple(against.shape[1:])}, "
            "but one network is to take both. Were they prepared in the same way?"
        )
    if labels is not None and len(labels) != len(x):
        raise ShapeError(
            f"{len(labels)} labels were given for {len(x)} samples: expected one for each. Is one of them a part of a "
            "larger set? Give the same part of both."
        )
    marks = np.full(len(x), -1) if labels is None else labels.cpu().numpy().astype(np.int64)
    other = None if against is None else Samples(np.arange(len(against)), np.full(len(against), -1))
    return Inputs(x, Samples(np.arange(len(x)), marks, other), against)


def ready(
    model: nn.Module, probe: Tensor, spec: KernelSpec, counts: tuple[int, int | None], device: torch.device
) -> tuple[Network, Callable[[], Plan]]:
    """Prepare a network for the outputs that a spec asks for, and a way to plan its kernel."""
    network = prepare(model, probe, policy(spec.precision), device)
    chosen = output_map(spec.output, network.profile.num_logits)
    network = network.seen_through(chosen.matrix)
    choices = Choices(spec.precision, rates_of(device, spec.precision), reduction=chosen.reduction)
    grid = _grid(network, spec, counts)

    def plan() -> Plan:
        budget = engine.memory_budget(device, spec.memory_bytes)
        made = make_plan(network.profile, grid, choices, budget=budget, environment=engine.environment(device))
        made.cached_blocks(budget)  # raises where less is free than was planned with
        return made

    return network, plan


def _grid(network: Network, spec: KernelSpec, counts: tuple[int, int | None]) -> TileGrid:
    reduction = output_map(spec.output, network.profile.num_logits).reduction
    outputs = network.profile.num_outputs
    num_rows, num_planes = {"none": (outputs, 1), "trace": (1, 1), "diagonal": (1, outputs)}[reduction]
    return make_grid(counts[0], num_rows, spec.tile_side, num_col_samples=counts[1], num_planes=num_planes)


def layout_of(spec: KernelSpec, grid: TileGrid) -> str:
    """Choose between one triangle and both; a rectangular kernel has no triangles.

    Raises:
        InputError: If one triangle of a rectangular kernel is asked for.
    """
    if grid.is_symmetric:
        return resolve_layout(spec.layout, grid.num_rows, spec.dtypes)
    if spec.layout == "upper":
        raise InputError(
            "The layout 'upper' stores one triangle of a symmetric kernel: expected 'full' or 'auto' for a rectangular "
            "one, whose columns are other samples than its rows. Use --layout auto."
        )
    return "full"


def identity_of(model: nn.Module, inputs: Inputs, spec: KernelSpec, network: Network) -> dict[str, Any]:
    """Collect what a run that continues a store must agree with."""
    grid = _grid(network, spec, inputs.counts)
    return {
        "parameters": parameter_fingerprint(model),
        "samples": inputs.fingerprint(),
        "output": spec.output,
        "precision": spec.precision,
        "tile_side": grid.side,
        "dtypes": list(spec.dtypes),
        "layout": layout_of(spec, grid),
    }


def open_or_create(
    path: Path,
    spec: KernelSpec,
    identity: Mapping[str, Any],
    inputs: Inputs,
    provenance: Mapping[str, Any],
    plan_anew: Callable[[], Plan],
) -> KernelStore:
    """Open a store to continue it, or create it; only under its lock.

    Raises:
        FingerprintError: If there is one that was made of something else.
    """
    if not path.exists():
        plan = plan_anew()
        manifest = Manifest(identity, provenance, plan, spec.dtypes, layout_of(spec, plan.grid))
        return create_store(path, manifest, inputs.samples)
    store = open_store(path, mode="r+")
    check_identity(path, store.manifest, identity)
    store.repair(inputs.samples)
    if spec.replan and not store.is_complete:  # the tiles that are there stay, within the stated bound
        changed = dataclasses.replace(store.manifest, plan=plan_anew(), replanned=store.manifest.replanned + 1)
        store.set_manifest(changed)
    return store
