"""One kernel to compute: its network prepared, its grid, and its store opened or created."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.engine.coordinator import WorkerPool
from ntkgen.engine.identity import identity_of, require_same_network
from ntkgen.engine.machine import Machine, describe_machine
from ntkgen.errors import FingerprintError, InputError, RuleError
from ntkgen.files.folder import Folder
from ntkgen.inputs import Inputs
from ntkgen.jacobian.cost import Reduction
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.outputs import prepare_mapped
from ntkgen.plan.plan import Choices, Plan, make_plan
from ntkgen.plan.spec import KernelSpec
from ntkgen.plan.tiles import Part, TileGrid, make_grid
from ntkgen.store.manifest import Manifest, check_identity, resolve_layout
from ntkgen.store.opening import create_store, has_store, open_store
from ntkgen.store.provenance import Provenance
from ntkgen.store.store import KernelStore
from ntkgen.store.tidy import tidy


@dataclass(frozen=True)
class Execution:
    """What computes the tiles: this process, the workers of a ``pool``, or this process a ``part`` of the tiles."""

    pool: WorkerPool | None = None
    part: Part | None = None


LOCAL = Execution()


@dataclass(frozen=True)
class Computation:
    """One kernel: its network and samples, how it is stored, and what computes it."""

    model: nn.Module
    inputs: Inputs
    probe: Tensor  # samples for the trial of the network
    spec: KernelSpec
    device: torch.device
    provenance: Provenance = field(default_factory=Provenance)
    execution: Execution = LOCAL
    excluded: frozenset[str] = frozenset()  # parameters whose rule does not hold for some batch

    def machine(self) -> Machine:
        """Describe the machine that computes the tiles: this one, or those of the workers."""
        if self.execution.pool is not None:
            return self.execution.pool.machine(self.spec.precision, self.spec.memory_bytes)
        return describe_machine(self.device, self.spec.precision, self.spec.memory_bytes)


@dataclass(frozen=True)
class PreparedKernel:
    """A kernel whose network is prepared: its tile grid, and a function that plans it for what computes it."""

    network: Network
    grid: TileGrid
    plan: Callable[[], Plan]


def prepare_kernel(kernel: Computation) -> PreparedKernel:
    """Prepare the network of a kernel for its output map. Nothing is planned yet: plans measure the machine."""
    spec = kernel.spec
    network, chosen = prepare_mapped(
        kernel.model, kernel.probe, spec.precision, spec.output, device=kernel.device, excluded=kernel.excluded
    )
    grid = _grid(network.profile.num_outputs, chosen.reduction, spec.tile_side, kernel.inputs.counts)

    def plan() -> Plan:
        machine = kernel.machine()
        choices = Choices(spec.precision, machine.rates, reduction=chosen.reduction)
        made = make_plan(network.profile, grid, choices, budget=machine.budget, environment=machine.environment)
        made.cached_blocks(machine.budget)  # raises if less memory is free than planned
        return made

    return PreparedKernel(network, grid, plan)


def _grid(num_outputs: int, reduction: Reduction, tile_side: int | None, counts: tuple[int, int | None]) -> TileGrid:
    num_rows, num_planes = {"none": (num_outputs, 1), "trace": (1, 1), "diagonal": (1, num_outputs)}[reduction]
    return make_grid(counts[0], num_rows, tile_side, num_col_samples=counts[1], num_planes=num_planes)


def layout_of(spec: KernelSpec, grid: TileGrid) -> str:
    """Choose between one triangle and both. A rectangular kernel has no triangles.

    Raises:
        InputError: If one triangle of a rectangular kernel is asked for.
    """
    if grid.is_symmetric:
        return resolve_layout(spec.layout, grid.num_rows, spec.dtypes)
    if spec.layout == "upper":
        raise InputError(
            "The layout 'upper' stores one triangle of a symmetric kernel: expected 'full' or 'auto' for a rectangular "
            "one, whose columns are other samples than its rows. Use `layout` auto."
        )
    return "full"


def open_or_create(
    folder: Folder,
    spec: KernelSpec,
    identity: Mapping[str, Any],
    inputs: Inputs,
    provenance: Provenance,
    plan_anew: Callable[[], Plan],
) -> KernelStore:
    """Open a store to continue it, or create it. The caller holds its lock.

    Raises:
        FingerprintError: If the store is of other parameters, samples or settings.
    """
    if not has_store(folder):
        plan = plan_anew()
        manifest = Manifest(identity, provenance, plan, spec.dtypes, layout_of(spec, plan.grid))
        return create_store(folder, manifest, inputs.samples)
    store = open_store(folder, mode="r+")
    check_identity(str(folder), store.manifest, identity)
    check_layout(store, spec.layout)
    if spec.replan and not store.is_complete:  # the tiles that are there stay, within the stated bound
        changed = dataclasses.replace(store.manifest, plan=plan_anew(), replanned=store.manifest.replanned + 1)
        store.set_manifest(changed)
    return store


def check_layout(store: KernelStore, layout: str) -> None:
    """Refuse to write both triangles into a store of one. A store of both serves either request.

    Raises:
        FingerprintError: If both triangles are asked for by name, and one is stored.
    """
    if layout == "full" and store.manifest.layout == "upper":
        raise FingerprintError(
            f"The store at {store.name} holds one triangle (layout upper), and both are asked for. Was it made "
            "without `layout` full? Finish it without that setting, then `ntkgen mirror` writes the other triangle."
        )


def begin_or_continue(folder: Folder, kernel: Computation, *, is_alone: bool = True) -> tuple[KernelStore, Network]:
    """Open the store of a kernel, or create it, with the network prepared as its plan says. The caller holds its lock.

    Raises:
        FingerprintError: If the store is of other parameters, samples or settings, or of another network.
    """
    if has_store(folder):  # as it was begun
        planned = open_store(folder).manifest.plan.profile.fallback
        kernel = dataclasses.replace(kernel, excluded=kernel.excluded.union(planned))
    prepared = prepare_kernel(kernel)
    identity = identity_of(kernel.model, kernel.inputs, kernel.spec, prepared.grid)
    store = open_or_create(folder, kernel.spec, identity, kernel.inputs, kernel.provenance, prepared.plan)
    if is_alone:
        tidy(store, kernel.inputs.samples)
    require_same_network(store, prepared.network, kernel.inputs)
    return store, prepared.network


def begin_anew(store: KernelStore, kernel: Computation) -> tuple[KernelStore, Network]:
    """Replace a store that has no tile yet by one whose plan excludes some rules.

    Raises:
        RuleError: If it has a tile, which the rule may have spoilt.
    """
    if len(store.missing_tiles()) < store.grid.num_tiles:
        raise RuleError(sorted(kernel.excluded))
    store.folder.clear()
    return begin_or_continue(store.folder, kernel)
