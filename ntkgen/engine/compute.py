"""A module and its samples → a finished store: what `ntkgen.compute` and the command line share."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from zarr.abc.store import Store

from ntkgen.checks.certify import add_certificate, forget_certificate
from ntkgen.engine.coordinator import Team, open_team
from ntkgen.engine.identity import KernelSpec, identity_of, require_same_network
from ntkgen.engine.jobs import InlineLoader, Loader
from ntkgen.engine.machine import Machine, check_environment, describe_machine
from ntkgen.engine.run import Bench, run, run_diagonal, run_tiles
from ntkgen.errors import FingerprintError, InputError, RuleError, StoreLockedError
from ntkgen.files.folder import Folder
from ntkgen.files.lock import ORPHAN_SECONDS, require_no_tile_writers, tile_lock, without_tile_writers, write_lock
from ntkgen.files.place import folder_of
from ntkgen.inputs import Inputs
from ntkgen.jacobian.batches import ArrayLike, checked_batches, checked_labels
from ntkgen.jacobian.evaluation import require_plain_module
from ntkgen.jacobian.network import Network, more_excluded, prepare
from ntkgen.jacobian.outputs import output_map
from ntkgen.jacobian.precision import policy
from ntkgen.plan.plan import Choices, Plan, make_plan
from ntkgen.plan.tiles import Part, TileGrid, make_grid
from ntkgen.progress import Report, ignore_report
from ntkgen.store.describe import require_accurate
from ntkgen.store.manifest import Manifest, check_identity, resolve_layout
from ntkgen.store.opening import create_store, has_store, open_store
from ntkgen.store.rounding import check_dtypes
from ntkgen.store.schema import Samples
from ntkgen.store.store import KernelStore
from ntkgen.store.tidy import tidy

# What an attempt at a store gives.
T = TypeVar("T")


@dataclass(frozen=True)
class Hands:
    """Who computes the tiles: this process; ``team``, the workers of a cluster; or this process a ``part`` of them."""

    team: Team | None = None
    part: Part | None = None


ALONE = Hands()


@dataclass(frozen=True)
class KernelJob:
    """A kernel to be made: of what, how, where, and by whom."""

    model: nn.Module
    inputs: Inputs
    probe: Tensor  # some samples to try the network on
    spec: KernelSpec
    device: torch.device
    provenance: Mapping[str, Any] = field(default_factory=dict)
    hands: Hands = ALONE
    excluded: frozenset[str] = frozenset()  # parameters whose rule was found not to hold for some batch

    def machine(self) -> Machine:
        """Describe what computes the tiles: this process, or the workers."""
        if self.hands.team is not None:
            return self.hands.team.machine(self.spec.precision, self.spec.memory_bytes)
        return describe_machine(self.device, self.spec.precision, self.spec.memory_bytes)


def compute(
    model: nn.Module,
    inputs: ArrayLike,  # (n, …)
    against: ArrayLike | None = None,  # (n', …)
    *,
    store: str | PathLike[str] | Store,
    labels: ArrayLike | None = None,  # (n,)
    report: Report = ignore_report,
    **settings: Any,
) -> KernelStore:
    """Compute the empirical neural tangent kernel of a module into a Zarr store, tile by tile, or finish it.

    ``K = J Jᵀ`` of the inputs, of (n m × n m), or with other samples to compare ``against`` ``K = J J'ᵀ``. An
    interrupted computation goes on with the same call; a store of other parameters, samples or settings is refused.
    The module is copied and never changed; it is computed on the module's device.

    Args:
        model: Any module that maps (samples, …) to (samples, outputs) and treats samples one by one.
        inputs: The samples of the rows: a tensor, a NumPy array or nested lists of numbers.
        against: The samples of the columns; those of the rows where it is left out.
        store: Where the store is, or is to be: a path, a URL (``s3://``, ``gs://``, ``az://``), or any Zarr store.
        labels: One integer per sample, to be stored beside the kernel; -1 where they are left out.
        report: Called with the stage, what is done and how much there is.
        **settings: The fields of `KernelSpec`: ``output``, ``precision``, ``dtypes``, ``layout``, ``tile_side``,
            ``memory_bytes``, ``replan``, ``certify``. Beside these ``fsync=False`` to be quicker and not safe from a
            loss of power; and ``workers``, so many processes, or ``client``, a `dask.distributed.Client`, to compute on
            several at a time.

    Raises:
        InputError: If there is no sample, or what is not numbers, or a setting that does not exist.
        ShapeError: If labels or samples do not fit each other.
        FingerprintError: If the store is of something else.
        BudgetError: If the memory is too small.
        ModelError: If the kernel of this network is not defined.
        InaccurateKernelError: If the finished kernel is not what it should be, whenever it is asked for. The store is
            complete, and can be opened.
    """
    require_plain_module(model)
    if isinstance(store, Store) and store.read_only:
        raise InputError(
            f"The {type(store).__name__} {store} is read-only: expected a store that the kernel can be written to. Was "
            "it opened to read a kernel? Open it with read_only=False, or pass its path."
        )
    folder = folder_of(store, fsync=settings.pop("fsync", True))
    workers, client = settings.pop("workers", None), settings.pop("client", None)
    spec, given = _spec_of(settings), _inputs_of(inputs, against, labels)
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    job = KernelJob(model, given, given.probe, spec, device)
    with open_team(workers, client, str(device)) as team:
        return make(folder, dataclasses.replace(job, hands=Hands(team)), InlineLoader(model, given), report)


def make(folder: Folder, job: KernelJob, load: Loader, report: Report = ignore_report) -> KernelStore:
    """Make a kernel, or what is missing of it, and certify it; of a part, that when it is the last one.

    Args:
        folder: Where the store is, or is to be.
        job: What is to be made.
        load: How a worker of a cluster comes by the network and its samples.
        report: Called as the stages proceed.

    Raises:
        InaccurateKernelError: If the certificate finds the finished kernel wrong, now or when it was made.
    """
    if job.hands.part is not None:
        store = _make_part(folder, job, job.hands.part, report)
    else:
        store = _make_whole(folder, job, load, report)
    require_accurate(store)  # last: everything is committed, and no lock is held
    return store


def _make_whole(folder: Folder, job: KernelJob, load: Loader, report: Report) -> KernelStore:
    with write_lock(folder):
        require_no_tile_writers(folder)
        store, network = _opened(folder, job)
        if not store.is_complete:
            forget_certificate(store)
            store = _without_wrong_rules(store, network, job, partial(_run, job=job, load=load, report=report))
            with without_tile_writers(folder, seconds=ORPHAN_SECONDS) as is_alone:
                if is_alone:  # a worker that was killed has left what it was writing
                    folder.sweep()
        _certified(store, job, report)
    return store


def _without_wrong_rules(
    store: KernelStore,
    network: Network,
    job: KernelJob,
    attempt: Callable[[KernelStore, Network], T],
    *,
    is_alone: bool = True,
) -> T:
    """Compute on a store; where a batch shows that a rule does not hold, begin the store anew without it.

    Raises:
        RuleError: If that shows while other parts are at work.
    """
    excluded = job.excluded
    while True:
        try:
            return attempt(store, network)
        except RuleError as error:
            if not is_alone:
                raise
            excluded = more_excluded(excluded, error)
            store, network = begin_anew(store, dataclasses.replace(job, excluded=excluded))


def begin_anew(store: KernelStore, job: KernelJob) -> tuple[KernelStore, Network]:
    """Replace a store that has no tile yet by one whose plan excludes some rules.

    Raises:
        RuleError: If it has a tile: which ones such a rule has spoilt is not known.
    """
    if len(store.missing_tiles()) < store.grid.num_tiles:
        raise RuleError(sorted(job.excluded))
    store.folder.clear()
    return _opened(store.folder, job)


def _opened(folder: Folder, job: KernelJob, *, is_alone: bool = True) -> tuple[KernelStore, Network]:
    if has_store(folder):  # as it was begun
        planned = open_store(folder).manifest.plan.profile.fallback
        job = dataclasses.replace(job, excluded=job.excluded.union(planned))
    network, plan_anew = ready(job)
    grid = _grid(network, job.spec, job.inputs.counts)
    identity = identity_of(job.model, job.inputs, job.spec, grid)
    store = open_or_create(folder, job.spec, identity, job.inputs, job.provenance, plan_anew)
    if is_alone:
        tidy(store, job.inputs.samples)
    require_same_network(store, network, job.inputs)
    return store, network


def _run(store: KernelStore, network: Network, job: KernelJob, load: Loader, report: Report) -> KernelStore:
    """Compute what is missing of a store, in this process or on the workers of a cluster."""
    plan, machine = store.manifest.plan, job.machine()
    cached_blocks = plan.cached_blocks(machine.budget)
    if job.hands.team is not None:
        job.hands.team.run(store, load, cached_blocks=cached_blocks, report=report)
    else:
        check_environment(plan, job.device)
        run(network, job.inputs.all, store, cached_blocks=cached_blocks, report=report)
    return store


def _make_part(folder: Folder, job: KernelJob, part: Part, report: Report) -> KernelStore:
    """Compute a part of the tiles beside other processes that compute the others.

    Who comes first makes the store and its diagonal, for which the others wait; who is the last certifies the kernel.
    """
    with ExitStack() as writing:
        with write_lock(folder, is_short=True, waiting=partial(report, "waiting", 0, 1)):
            with without_tile_writers(folder) as is_alone:
                store, network = _opened(folder, job, is_alone=is_alone)
            writing.enter_context(tile_lock(folder))
            missing = set(store.missing_tiles())
            tiles = [tile for tile in part.of(list(store.grid.tiles())) if tile in missing]
            if tiles:
                forget_certificate(store)
                attempt = partial(_bench_with_diagonal, job=job, report=report)
                bench = _without_wrong_rules(store, network, job, attempt, is_alone=is_alone)
        if tiles:
            run_tiles(bench, tiles, bench.cached_blocks, report)
    _finish_last(folder, job, report)
    return open_store(folder)


def _bench_with_diagonal(store: KernelStore, network: Network, job: KernelJob, report: Report) -> Bench:
    """Compute what is missing of the diagonal, and keep what has computed it."""
    plan = store.manifest.plan
    check_environment(plan, job.device)
    cached_blocks = plan.cached_blocks(job.machine().budget)
    bench = Bench(network, job.inputs.all, store, cached_blocks=cached_blocks)
    run_diagonal(bench, report)
    return bench


def _finish_last(folder: Folder, job: KernelJob, report: Report) -> None:
    """Mark a store complete, and certify it, unless other parts are at work or missing.

    Who finds others at work leaves it to them: they wait for the lock, and look after him.
    """
    waiting = partial(report, "waiting", 0, 1)
    with (
        suppress(StoreLockedError),  # a whole run has begun, which finishes it
        write_lock(folder, is_short=True, waiting=waiting),
        without_tile_writers(folder) as is_alone,
    ):
        store = open_store(folder, mode="r+")  # as others have left it
        if is_alone:
            folder.sweep()  # what parts that were killed have left
        if is_alone and not store.missing_tiles() and not store.missing_blocks():
            if not store.is_complete:
                store.finalize()
            _certified(store, job, report)


def _certified(store: KernelStore, job: KernelJob, report: Report) -> None:
    if job.spec.certify and store.manifest.certificate is None:
        add_certificate(store, job.model, job.inputs, report=report)


def _spec_of(settings: Mapping[str, Any]) -> KernelSpec:
    known = {field.name for field in dataclasses.fields(KernelSpec)}
    if unknown := set(settings) - known:
        raise InputError(
            f"There is no setting {sorted(unknown)[0]!r}: expected one of {', '.join(sorted(known))}, fsync, workers, "
            "client. Is it misspelt, or an option of the command line under another name?"
        )
    spec = KernelSpec(**settings)
    return dataclasses.replace(spec, dtypes=check_dtypes(spec.dtypes))


def _inputs_of(x: ArrayLike, against: ArrayLike | None, labels: ArrayLike | None) -> Inputs:
    rows, columns = checked_batches(x, against)
    marks = checked_labels(labels, len(rows))
    other = None if columns is None else Samples(np.arange(len(columns)), np.full(len(columns), -1))
    return Inputs(rows, Samples(np.arange(len(rows)), marks, other), columns)


def ready(job: KernelJob) -> tuple[Network, Callable[[], Plan]]:
    """Prepare a network for the outputs that are asked for, and a way to plan its kernel for what computes it."""
    spec = job.spec
    network = prepare(job.model, job.probe, policy(spec.precision), job.device, job.excluded)
    chosen = output_map(spec.output, network.profile.num_logits)
    network = network.seen_through(chosen.matrix)
    grid = _grid(network, spec, job.inputs.counts)

    def plan() -> Plan:
        machine = job.machine()
        choices = Choices(spec.precision, machine.rates, reduction=chosen.reduction)
        made = make_plan(network.profile, grid, choices, budget=machine.budget, environment=machine.environment)
        made.cached_blocks(machine.budget)  # raises where less is free than was planned with
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


def open_or_create(
    folder: Folder,
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
    """Refuse to make both triangles in a store of one; both hold what one does.

    Raises:
        FingerprintError: If both triangles are asked for by name, and one is stored.
    """
    if layout == "full" and store.manifest.layout == "upper":
        raise FingerprintError(
            f"The store at {store.name} holds one triangle (layout upper), and both are asked for. Was it made "
            "without --layout full? Finish it without, then `ntkgen mirror` writes the other triangle."
        )
