"""The computation of one kernel: prepare its network, choose its grid, and open or create its store."""

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
from ntkgen.jacobian.groups import ParameterGroup, groups_of
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
    """Where tiles are computed: all in this process, by the workers of a ``pool``, or one ``part`` in this process."""

    pool: WorkerPool | None = None
    part: Part | None = None


LOCAL = Execution()


@dataclass(frozen=True)
class Computation:
    """The description of one kernel: network, samples, settings, device and execution."""

    model: nn.Module
    inputs: Inputs
    probe: Tensor  # samples for trial runs of the network
    spec: KernelSpec
    device: torch.device
    provenance: Provenance = field(default_factory=Provenance)
    execution: Execution = LOCAL
    excluded: frozenset[str] = frozenset()  # parameters whose layer rule is wrong for some batch

    def machine(self) -> Machine:
        """Describe the machine that computes the tiles: this one, or those of the workers."""
        if self.execution.pool is not None:
            return self.execution.pool.machine(self.spec.precision, self.spec.memory_bytes)
        return describe_machine(self.device, self.spec.precision, self.spec.memory_bytes)


@dataclass(frozen=True)
class PreparedKernel:
    """A kernel whose network is prepared: its groups of parameters, its grid, and a function that makes its plan."""

    network: Network
    groups: tuple[ParameterGroup, ...]  # those that have a kernel of their own
    grid: TileGrid
    plan: Callable[[], Plan]


def prepare_kernel(kernel: Computation) -> PreparedKernel:
    """Prepare the network of a kernel for its output map. The plan is made later, because that measures the machine."""
    spec = kernel.spec
    network, chosen = prepare_mapped(
        kernel.model, kernel.probe, spec.precision, spec.output, device=kernel.device, excluded=kernel.excluded
    )
    groups = () if spec.per_layer is None else groups_of(network.module, spec.per_layer)
    num_rows, num_planes = _rows_and_planes(network.profile.num_outputs, chosen.reduction)
    num_samples, others = kernel.inputs.counts
    grid = make_grid(
        num_samples,
        num_rows,
        spec.tile_side,
        num_col_samples=others,
        num_planes=num_planes,
        num_groups=len(groups),
    )

    def plan() -> Plan:
        machine = kernel.machine()
        choices = Choices(spec.precision, machine.rates, reduction=chosen.reduction)
        new = make_plan(network.profile, grid, choices, budget=machine.budget, environment=machine.environment)
        new.cached_blocks(machine.budget)  # raises if less memory is free than planned
        return new

    return PreparedKernel(network, groups, grid, plan)


def _rows_and_planes(num_outputs: int, reduction: Reduction) -> tuple[int, int]:
    return {"none": (num_outputs, 1), "trace": (1, 1), "diagonal": (1, num_outputs)}[reduction]


def layout_of(spec: KernelSpec, grid: TileGrid) -> str:
    """Choose the layout ``upper`` or ``full``. A rectangular kernel has no triangles.

    Raises:
        InputError: If the layout ``upper`` is requested for a rectangular kernel.
    """
    if grid.is_symmetric:
        return resolve_layout(spec.layout, grid.num_rows, spec.dtypes, grid.num_groups)
    if spec.layout == "upper":
        raise InputError(
            "The layout 'upper' stores one triangle of a symmetric kernel: expected 'full' or 'auto' for a rectangular "
            "kernel, found 'upper'. Are the columns other samples than the rows by mistake? Use `layout` auto, or "
            "leave out the samples of the columns."
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
    """Open a store to continue it, or create it. The caller must hold the lock of the store.

    Raises:
        FingerprintError: If parameters, samples or settings differ from those of the store.
    """
    if not has_store(folder):
        plan = plan_anew()
        manifest = Manifest(identity, provenance, plan, spec.dtypes, layout_of(spec, plan.grid))
        return create_store(folder, manifest, inputs.samples)
    store = open_store(folder, mode="r+")
    check_identity(str(folder), store.manifest, identity)
    check_layout(store, spec.layout)
    if spec.replan and not store.is_complete:  # stored tiles are kept, and new ones can differ by rounding errors
        changed = dataclasses.replace(store.manifest, plan=plan_anew(), replanned=store.manifest.replanned + 1)
        store.set_manifest(changed)
    return store


def check_layout(store: KernelStore, layout: str) -> None:
    """Refuse the layout ``full`` for a store of the layout ``upper``. A store of the layout ``full`` fits any request.

    Raises:
        FingerprintError: If the layout ``full`` is requested, and the store has the layout ``upper``.
    """
    if layout == "full" and store.manifest.layout == "upper":
        raise FingerprintError(
            f"The store at {store.name} holds one triangle: expected the layout full, found upper. Was it made without "
            "`layout` full? Finish it without that setting, then run `ntkgen mirror` to write the other triangle."
        )


def begin_or_continue(folder: Folder, kernel: Computation, *, is_alone: bool = True) -> tuple[KernelStore, Network]:
    """Open or create the store of a kernel, and prepare the network by its plan. The caller must hold the lock.

    Raises:
        FingerprintError: If network, parameters, samples or settings differ from those of the store.
    """
    if has_store(folder):  # exclude the same parameters as the first run
        planned = open_store(folder).manifest.plan.profile.fallback
        kernel = dataclasses.replace(kernel, excluded=kernel.excluded.union(planned))
    prepared = prepare_kernel(kernel)
    prepared.network.warn_of_cost(len(kernel.inputs.all))
    identity = identity_of(kernel.model, kernel.inputs, kernel.spec, prepared.grid, prepared.groups)
    store = open_or_create(folder, kernel.spec, identity, kernel.inputs, kernel.provenance, prepared.plan)
    if is_alone:
        tidy(store, kernel.inputs.samples)
    require_same_network(store, prepared.network, kernel.inputs)
    return store, prepared.network


def begin_anew(store: KernelStore, kernel: Computation) -> tuple[KernelStore, Network]:
    """Replace a store without tiles by a new one whose plan excludes some layer rules.

    Raises:
        RuleError: If the store has a tile, which a wrong rule may have affected.
    """
    if len(store.missing_tiles()) < store.grid.num_tiles:
        raise RuleError(sorted(kernel.excluded))
    store.folder.clear()
    return begin_or_continue(store.folder, kernel)
