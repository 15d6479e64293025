"""A plan layer by layer: the cost of each layer, its order of multiplication, and its savings; integers only."""

from collections.abc import Sequence
from dataclasses import dataclass

from ntkgen.jacobian.cost import LayerPlan, building_macs, factor_numbers, pair_macs, pass_macs
from ntkgen.plan.order import count_factor_samples
from ntkgen.plan.plan import Plan
from ntkgen.plan.tiles import Tile


@dataclass(frozen=True)
class CostLine:
    """One line of an explained plan. FLOPs are two per multiply-add, and count the missing work only."""

    name: str
    shape: str
    order: str
    factor_bytes: int  # bytes of stored factors per sample
    flops: int
    explicit_flops: int  # FLOPs if only Jacobian rows were used, built once per sample


@dataclass(frozen=True)
class WorkCount:
    """The missing work of a plan, counted in samples and pairs of samples."""

    factor_samples: int  # samples whose factors are computed; a repeated sample counts again
    built_samples: int  # samples whose rows are built for a product
    pairs: int

    @classmethod
    def of(cls, plan: Plan, tiles: Sequence[Tile], cached_blocks: int, diagonal: Sequence[int] = ()) -> "WorkCount":
        """Count the work of some tiles, and of the diagonal of some row blocks before them."""
        built = pairs = 0
        for tile in tiles:
            for row, column in plan.pairs(tile):
                is_diagonal = row == column
                built += len(row) if is_diagonal else len(row) + len(column)
                pairs += plan.jacobian.computed_pairs(len(row), len(column), is_diagonal=is_diagonal)
        return cls(count_factor_samples(plan, tiles, cached_blocks, diagonal), built, pairs)


def explain(plan: Plan, work: WorkCount) -> list[CostLine]:
    """List the lines of a plan. The sum of their FLOPs is `projected_flops`."""
    jacobian, m, samples = plan.jacobian, plan.jacobian.num_outputs, plan.num_samples
    passes = pass_macs(plan.profile)
    lines = [CostLine("passes", f"1 + {m} per sample", "", 0, 2 * work.factor_samples * passes, 2 * samples * passes)]
    lines += [_layer_line(plan, layer, work) for layer in jacobian.layers]
    dense = m * jacobian.dense_params * jacobian.factor_bytes // max(1, jacobian.factor_numbers)
    flops = 2 * work.pairs * jacobian.dense_macs
    return [*lines, CostLine("all else", f"{jacobian.dense_params:,} parameters", "rows", dense, flops, flops)]


def _layer_line(plan: Plan, layer: LayerPlan, work: WorkCount) -> CostLine:
    shape, m = layer.shape, plan.jacobian.num_outputs
    building = building_macs(shape, m)
    built = work.factor_samples if layer.keeps_rows else work.built_samples if layer.order == "explicit" else 0
    explicit = pair_macs(LayerPlan(shape, "explicit", keeps_rows=True), m, plan.jacobian.reduction)
    kept = m * shape.num_params if layer.keeps_rows else factor_numbers(layer, m)
    groups = f"{shape.groups} × " if shape.groups > 1 else ""
    return CostLine(
        name=shape.name or "(the network itself)",
        shape=f"T {shape.positions}, {groups}{shape.inputs} → {shape.channels}",
        order=layer.order + (", rows kept" if layer.keeps_rows else ", pixels" if layer.uses_pixels else ""),
        factor_bytes=kept * plan.jacobian.factor_bytes // max(1, plan.jacobian.factor_numbers),
        flops=2 * (work.pairs * pair_macs(layer, m, plan.jacobian.reduction) + built * building),
        explicit_flops=2 * (work.pairs * explicit + plan.num_samples * building),
    )
