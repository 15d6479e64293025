"""Computation of a finished store from a module and its samples, for `ntkgen.compute` and the command line."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import nn
from zarr.abc.store import Store

from ntkgen.checks.certify import add_certificate, forget_certificate
from ntkgen.engine.computation import Computation, Execution, begin_anew, begin_or_continue
from ntkgen.engine.coordinator import open_pool
from ntkgen.engine.jobs import InlineLoader, Loader
from ntkgen.engine.machine import check_environment
from ntkgen.engine.run import TileComputer, run, run_diagonal, run_tiles
from ntkgen.errors import InputError, RuleError, StoreLockedError
from ntkgen.files.folder import Folder
from ntkgen.files.lock import ORPHAN_SECONDS, require_no_tile_writers, tile_lock, without_tile_writers, write_lock
from ntkgen.files.place import folder_of
from ntkgen.inputs import Inputs
from ntkgen.jacobian.adapter import Function, Given, Target
from ntkgen.jacobian.batches import ArrayLike, checked_labels
from ntkgen.jacobian.evaluation import require_plain_module
from ntkgen.jacobian.groups import PerLayer, as_groups
from ntkgen.jacobian.network import Network, more_excluded
from ntkgen.jacobian.precision import precision_of
from ntkgen.jacobian.samples import Batch
from ntkgen.jacobian.selection import Select
from ntkgen.plan.spec import KernelSpec
from ntkgen.plan.tiles import Part
from ntkgen.progress import Report, ignore_report
from ntkgen.store.describe import require_accurate
from ntkgen.store.opening import has_store, open_store
from ntkgen.store.rounding import check_dtypes
from ntkgen.store.schema import Samples
from ntkgen.store.store import KernelStore

if TYPE_CHECKING:
    from distributed import Client

# Type of the result of an attempt to compute on a store.
T = TypeVar("T")


def compute(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
    model: nn.Module,
    inputs: Batch,  # (n, …)
    against: Batch | None = None,  # (n', …)
    *,
    store: str | PathLike[str] | Store,
    labels: ArrayLike | None = None,  # (n,)
    function: Function | Sequence[Function] | None = None,
    select: Select | None = None,
    params: str | Sequence[str] | None = None,
    columns_function: Function | Sequence[Function] | None = None,
    output: str = KernelSpec.output,
    precision: str | None = None,
    per_layer: PerLayer | None = None,
    dtypes: str | Iterable[str] = KernelSpec.dtypes,
    layout: str = KernelSpec.layout,
    tile_side: int | None = KernelSpec.tile_side,
    memory_bytes: int | None = KernelSpec.memory_bytes,
    replan: bool = KernelSpec.replan,
    certify: bool = KernelSpec.certify,
    fsync: bool = True,
    workers: int | None = None,
    client: "Client | str | None" = None,
    report: Report = ignore_report,
) -> KernelStore:
    """Compute the empirical neural tangent kernel of a module into a Zarr store, or finish an interrupted computation.

    Args:
        model: Module that treats samples one by one. It is copied, and the computation runs on its device.
        inputs: Samples of the rows, in any form that `ntkgen.ntk` takes.
        against: Samples of the columns, for ``K = J J'ᵀ``. By default they are those of the rows, for ``K = J Jᵀ``.
        store: Store to create or to continue: a path, a URL (``s3://``, ``gs://``, ``az://``), or any Zarr store.
        labels: One integer per sample, stored beside the kernel. The default is -1.
        function: Function of the module and a batch, as for `ntkgen.ntk`. The store knows it by its qualified name.
        select: Outputs, as for `ntkgen.ntk`. The store knows a function by its qualified name.
        params: Patterns of names of parameters, as for `ntkgen.ntk`.
        columns_function: Function of the columns, if it is another one than that of the rows.
        output: Output map: ``full``, ``sum``, ``centered``, ``index:K``, ``trace`` or ``diagonal``.
        precision: Precision of the computation, as for `ntkgen.ntk`.
        per_layer: Groups of parameters whose kernels are stored too, as for `ntkgen.ntk`.
        dtypes: One or several dtypes of the stored kernel: ``float16``, ``float32`` and ``float64``.
        layout: ``upper`` stores one triangle, and ``full`` stores both. ``auto`` stores both up to 10 GB.
        tile_side: Number of rows of a tile, a multiple of the number of outputs. None chooses a suitable one.
        memory_bytes: Maximum memory in bytes. None plans blocks for 2/5 of all, and keeps factors in 80 % of the free.
        replan: Whether to continue on another kind of machine, with tiles that differ in their last bits.
        certify: Whether to store a certificate, the measured error bound of the finished kernel.
        fsync: Whether each tile is forced to disk, so that it survives a loss of power. False is quicker.
        workers: Number of worker processes on this machine. None computes in this process.
        client: Client of a running dask cluster whose workers compute, or the address of its scheduler.
        report: Function that is called with the stage, the amount done and the total amount.

    Raises:
        InputError: If samples, network, options or memory do not allow the computation.
        FingerprintError: If parameters, samples or settings differ from those of the store.
        InaccurateKernelError: If the certificate shows that the kernel is wrong. The store is complete and is kept.
    """
    chosen, kinds = precision_of(model, precision), check_dtypes(dtypes)
    spec = KernelSpec(output, chosen, kinds, layout, tile_side, memory_bytes, replan, certify, as_groups(per_layer))
    given = _given(model, inputs, against, labels, Target.of(function, select, params, columns_function))
    return _in_pool(given, workers, client, partial(_compute, _writable(store, fsync=fsync), labels, spec, report))


def _given(model: nn.Module, x: Batch, against: Batch | None, labels: ArrayLike | None, target: Target) -> Given:
    """Check network, samples and labels, before anything is started or written."""
    require_plain_module(model)
    given = Given.of(model, x, against, target)
    checked_labels(labels, len(given.rows))
    return given


def _in_pool(
    given: Given, workers: int | None, client: "Client | str | None", work: Callable[[Given, Execution], KernelStore]
) -> KernelStore:
    """Do some work with the workers of a cluster, or without workers in this process."""
    with open_pool(workers, client, str(_device_of(given.model))) as pool:
        return given.attempt(lambda given: work(given, Execution(pool)))


def _compute(
    folder: Folder, labels: ArrayLike | None, spec: KernelSpec, report: Report, given: Given, execution: Execution
) -> KernelStore:
    inputs = _inputs_of(given, labels)
    kernel = Computation(given.model, inputs, inputs.probe, spec, _device_of(given.model), execution=execution)
    return make(folder, kernel, InlineLoader(given.model, inputs), report)


def _device_of(model: nn.Module) -> torch.device:
    return next((param.device for param in model.parameters()), torch.device("cpu"))


def make(folder: Folder, kernel: Computation, load: Loader, report: Report = ignore_report) -> KernelStore:
    """Compute the missing tiles of a kernel, and certify it, which means to measure its error.

    If several processes compute parts of the kernel, the last one certifies it.

    Args:
        folder: Folder of the store.
        kernel: Kernel to compute.
        load: Function that loads network and samples on a worker of a cluster.
        report: Function that is called as the stages proceed.

    Raises:
        InaccurateKernelError: If the certificate of the finished kernel shows errors.
    """
    with _without_remains(folder):
        if kernel.execution.part is not None:
            store = _make_part(folder, kernel, kernel.execution.part, report)
        else:
            store = _make_whole(folder, kernel, load, report)
    require_accurate(store)  # at the end, when everything is committed and no lock is held
    return store


@contextmanager
def _without_remains(folder: Folder) -> Iterator[None]:
    """Remove a store that a computation has created, if the computation ends with wrong input and without a tile.

    Raises:
        InputError: The error of the computation.
    """
    is_new = False
    with suppress(OSError):  # a folder that cannot be read is refused later
        is_new = not has_store(folder) and not folder.sizes()
    try:
        yield
    except InputError:
        if is_new:
            with suppress(StoreLockedError), write_lock(folder), without_tile_writers(folder) as is_alone:
                if is_alone and has_store(folder) and _has_no_tile(open_store(folder)):
                    folder.clear()
        raise


def _has_no_tile(store: KernelStore) -> bool:
    return len(store.missing_tiles()) == store.grid.num_tiles


def _make_whole(folder: Folder, kernel: Computation, load: Loader, report: Report) -> KernelStore:
    with write_lock(folder):
        require_no_tile_writers(folder)
        store, network = begin_or_continue(folder, kernel)
        if not store.is_complete:
            forget_certificate(store)
            store = _without_wrong_rules(store, network, kernel, partial(_run, kernel=kernel, load=load, report=report))
            with without_tile_writers(folder, seconds=ORPHAN_SECONDS) as is_alone:
                if is_alone:  # killed workers leave partial files
                    folder.sweep()
        _certified(store, kernel, report)
    return store


def _without_wrong_rules(
    store: KernelStore,
    network: Network,
    kernel: Computation,
    attempt: Callable[[KernelStore, Network], T],
    *,
    is_alone: bool = True,
) -> T:
    """Compute on a store. If a layer rule is wrong for some batch, create the store again without the rule.

    Raises:
        RuleError: If a rule is wrong while other parts are running.
    """
    excluded = kernel.excluded
    while True:
        try:
            return attempt(store, network)
        except RuleError as error:
            if not is_alone:
                raise
            excluded = more_excluded(excluded, error)
            store, network = begin_anew(store, dataclasses.replace(kernel, excluded=excluded))


def _run(store: KernelStore, network: Network, kernel: Computation, load: Loader, report: Report) -> KernelStore:
    """Compute the missing parts of a store, in this process or on the workers of a cluster."""
    plan, machine = store.manifest.plan, kernel.machine()
    cached_blocks = plan.cached_blocks(machine.budget)
    if kernel.execution.pool is not None:
        kernel.execution.pool.run(store, load, cached_blocks=cached_blocks, report=report)
    else:
        check_environment(plan, kernel.device)
        run(network, kernel.inputs.all, store, cached_blocks=cached_blocks, report=report)
    return store


def _make_part(folder: Folder, kernel: Computation, part: Part, report: Report) -> KernelStore:
    """Compute a part of the tiles, while other processes compute the other parts.

    The first process creates the store and its diagonal, while the others wait. The last process certifies the kernel.
    """
    with ExitStack() as writing:
        with write_lock(folder, is_short=True, waiting=partial(report, "waiting", 0, 1)):
            with without_tile_writers(folder) as is_alone:
                store, network = begin_or_continue(folder, kernel, is_alone=is_alone)
            writing.enter_context(tile_lock(folder))
            missing = set(store.missing_tiles())
            tiles = [tile for tile in part.of(list(store.grid.tiles())) if tile in missing]
            if tiles:
                forget_certificate(store)
                attempt = partial(_computer_with_diagonal, kernel=kernel, report=report)
                computer = _without_wrong_rules(store, network, kernel, attempt, is_alone=is_alone)
        if tiles:
            run_tiles(computer, tiles, report)
    _finish_last(folder, kernel, report)
    return open_store(folder)


def _computer_with_diagonal(store: KernelStore, network: Network, kernel: Computation, report: Report) -> TileComputer:
    """Compute the missing blocks of the diagonal, and return the tile computer for the tiles."""
    plan = store.manifest.plan
    check_environment(plan, kernel.device)
    cached_blocks = plan.cached_blocks(kernel.machine().budget)
    computer = TileComputer(network, kernel.inputs.all, store, cached_blocks=cached_blocks)
    run_diagonal(computer, report)
    return computer


def _finish_last(folder: Folder, kernel: Computation, report: Report) -> None:
    """Mark a store complete, and certify it, unless other parts are running or missing.

    If others are running, the last of them does this, because each one waits for the lock and checks again.
    """
    waiting = partial(report, "waiting", 0, 1)
    with (
        suppress(StoreLockedError),  # a run of the whole kernel holds the lock, and finishes the store
        write_lock(folder, is_short=True, waiting=waiting),
        without_tile_writers(folder) as is_alone,
    ):
        store = open_store(folder, mode="r+")  # again, because other processes have changed it
        if is_alone:
            folder.sweep()  # removes partial files of killed processes
        if is_alone and not store.missing_tiles() and not store.missing_blocks():
            if not store.is_complete:
                store.finalize()
            _certified(store, kernel, report)


def _certified(store: KernelStore, kernel: Computation, report: Report) -> None:
    if kernel.spec.certify and store.manifest.certificate is None:
        add_certificate(store, kernel.model, kernel.inputs, report=report)


def _writable(store: str | PathLike[str] | Store, *, fsync: bool) -> Folder:
    """Convert a path, a URL or a Zarr store to a folder.

    Raises:
        InputError: If the Zarr store is read-only.
    """
    if isinstance(store, Store) and store.read_only:
        raise InputError(
            f"The {type(store).__name__} {store} is read-only: expected a store that the kernel can be written to. Was "
            "it opened to read a kernel? Open it with read_only=False, or pass its path."
        )
    return folder_of(store, fsync=fsync)


def _inputs_of(given: Given, labels: ArrayLike | None) -> Inputs:
    rows, columns = given.rows, given.columns
    row_labels = checked_labels(labels, len(rows))
    other = None if columns is None else Samples(np.arange(len(columns)), np.full(len(columns), -1))
    return Inputs(rows, Samples(np.arange(len(rows)), row_labels, other), columns, given.data)
