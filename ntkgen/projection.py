"""The projection of a planned kernel: its expected cost and duration."""

import dataclasses
from typing import Any

from ntkgen.checks.choice import KernelSize, compares_whole, whole_passes
from ntkgen.checks.sampling import usual_sampling
from ntkgen.engine.computation import prepare_kernel
from ntkgen.engine.duration import Duration, certificate_seconds, kernel_duration, storage_rates, whole_seconds
from ntkgen.engine.jobs import seconds_at_planned_rate
from ntkgen.jacobian.outputs import output_map
from ntkgen.pipeline import PlannedKernel, computation_of
from ntkgen.plan.explain import WorkCount, explain
from ntkgen.plan.order import projected_flops
from ntkgen.plan.tiles import Tile
from ntkgen.store.opening import has_store, open_store
from ntkgen.training import checkpoint as checkpoints
from ntkgen.training.fit import seconds_to_train

# Minimum estimated duration of a run for which a projection is measured. The measurement itself takes seconds.
MEASURED_FROM_SECONDS = 20.0


def _missing(planned: PlannedKernel) -> tuple[list[Tile], list[int]]:
    """List the tiles and the blocks of the diagonal that are not stored yet."""
    if not has_store(planned.store):
        return list(planned.plan.grid.tiles()), list(range(planned.plan.grid.num_sides))
    store = open_store(planned.store)
    return store.missing_tiles(), store.missing_blocks()


def duration_of(planned: PlannedKernel) -> Duration:
    """Project how long a kernel takes on this machine, by measuring one batch of each kind of missing work.

    This includes the certificate, which is the measured error bound of a kernel.
    """
    tiles, diagonal = _missing(planned)
    plan, kernel, spec = planned.plan, computation_of(planned), planned.kernel.spec
    work = WorkCount.of(plan, tiles, plan.cached_blocks(planned.budget), diagonal)
    pool, part = planned.setup.execution.pool, planned.setup.execution.part
    num_workers = (1 if pool is None else pool.num_workers) * (1 if part is None else part.count)
    duration = Duration(training=_training_seconds(planned))
    if tiles or diagonal:
        network = prepare_kernel(kernel).network
        rates = storage_rates(planned.store, spec.dtypes)
        duration = dataclasses.replace(
            kernel_duration(plan, work, network, kernel.inputs.x, num_workers=num_workers),
            training=duration.training,
            storing=planned.missing_bytes * rates.write,
        )
        if spec.certify and part is None:
            sampling = usual_sampling(spec.output, plan.profile.num_logits)
            chosen = output_map(spec.output, plan.profile.num_logits)
            if compares_whole(sampling, size := KernelSize.of(plan)):
                seconds = whole_seconds(kernel.model, kernel.inputs, chosen, whole_passes(size))
            else:
                seconds = certificate_seconds(kernel.model, kernel.inputs.x, len(kernel.inputs.all), chosen, sampling)
            duration = dataclasses.replace(duration, certificate=seconds + planned.disk_bytes * rates.read)
    return duration


def _training_seconds(planned: PlannedKernel) -> float:
    """Project the duration of the remaining epochs. It is zero for a trained network."""
    checkpoint = checkpoints.load(planned.checkpoint) if planned.checkpoint.exists else None
    if not planned.recipe.num_epochs or (checkpoint is not None and checkpoint.is_finished):
        return 0.0
    left = 1.0 if checkpoint is None else 1 - checkpoint.epoch / planned.recipe.num_epochs
    return left * seconds_to_train(planned.model, planned.data, planned.recipe)


def takes_minutes(planned: PlannedKernel) -> bool:
    """Decide by the rate of the plan's products whether a kernel takes long enough for a measured projection."""
    tiles, diagonal = _missing(planned)
    flops = projected_flops(planned.plan, tiles, planned.plan.cached_blocks(planned.budget), diagonal)
    return seconds_at_planned_rate(planned.plan, flops) > MEASURED_FROM_SECONDS


def project(planned: PlannedKernel, *, explained: bool = False) -> dict[str, Any]:
    """Return the projected cost and duration of a planned kernel. With ``explained``, add the cost of each layer."""
    plan, path = planned.plan, planned.store
    cached_blocks = plan.cached_blocks(planned.budget)
    tiles, diagonal = _missing(planned)
    work = WorkCount.of(plan, tiles, cached_blocks, diagonal)
    parts = {"parts": [dataclasses.asdict(part) for part in explain(plan, work)]} if explained else {}
    return {
        "store": str(path),
        "model": planned.training.model,
        "dataset": planned.data.name,
        "num_samples": plan.grid.num_samples,
        "num_col_samples": plan.grid.num_col_samples,
        "num_outputs": plan.grid.num_outputs,
        "num_params": plan.profile.num_params,
        "rows": plan.grid.num_rows,
        "cols": plan.grid.num_cols,
        "output": planned.kernel.spec.output,
        "dtypes": list(planned.kernel.spec.dtypes),
        "layout": planned.layout,
        "tile_side": plan.grid.side,
        "tiles": plan.grid.num_tiles,
        "tiles_missing": len(tiles),
        "disk_bytes": planned.disk_bytes,
        "projected_bytes": plan.projected_bytes(cached_blocks),
        "projected_flops": projected_flops(plan, tiles, cached_blocks, diagonal),
        "factor_samples": work.factor_samples,
        "precision": plan.precision,
        "product_route": plan.jacobian.rates.route,
        "seconds": duration_of(planned).to_json(),
        **parts,
    }
