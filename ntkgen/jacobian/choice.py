"""The choice of the exact order of multiplication of each layer, by its estimated time; integers only."""

from collections.abc import Iterator, Sequence

from ntkgen.errors import InputError
from ntkgen.jacobian.cost import (
    ORDERS,
    USUAL_RATES,
    JacobianPlan,
    LayerPlan,
    LayerShape,
    NetworkProfile,
    Order,
    Rates,
    Reduction,
    Sizes,
    block_products,
    building_macs,
    factor_numbers,
    pair_macs,
    pass_macs,
)

# Time of the calls for one group of a layer in a product of two blocks, in nanoseconds.
GROUP_CALLS = 100_000
# Maximum size of the rows that are kept of a layer with several groups, relative to its factors.
GROUPED_ROWS = 16


def order_nanoseconds(plan: LayerPlan, num_outputs: int, block_samples: int, rates: Rates, reduction: Reduction) -> int:
    """Estimate the time of one layer for one pair of samples, from its multiply-adds and its memory accesses."""
    groups = plan.shape.groups
    calls = 0 if plan.keeps_rows or groups == 1 else GROUP_CALLS * groups // block_samples**2
    return calls + _arithmetic_nanoseconds(plan, num_outputs, block_samples, rates, reduction)


def _arithmetic_nanoseconds(
    plan: LayerPlan, num_outputs: int, block_samples: int, rates: Rates, reduction: Reduction
) -> int:
    shape, m = plan.shape, num_outputs
    q, t, c = shape.groups, shape.positions, shape.channels
    products = block_products(m, reduction)
    if plan.order == "explicit":
        built = 0 if plan.keeps_rows else 2000 * building_macs(shape, m) // (rates.building * block_samples)
        return 1000 * products * shape.num_params // rates.product + built
    sums = 4 * q * t * t if plan.uses_pixels else 0
    grams = 1000 * plan.input_gram_macs // rates.product + 1000 * (q * t * t + sums) // rates.touching
    if plan.order == "gram":
        outer = q * t * t * (1 if reduction == "trace" else products)
        return grams + 1000 * (q * products * t * t * c) // rates.product + 3000 * outer // rates.touching
    carried = 1000 * q * m * t * t * c // rates.carrying + 1000 * q * m * t * c // rates.touching
    return grams + carried + 1000 * q * m * m * t * c // rates.finishing


def candidates(shape: LayerShape, num_outputs: int, reduction: Reduction) -> Iterator[LayerPlan]:
    """List the ways to contract a layer.

    Its rows are kept if they are not larger than its factors. Those of a layer with many groups, such as a depthwise
    convolution, may be kept too if they are not much larger, because all groups are then multiplied at once.
    """
    explicit = LayerPlan(shape, "explicit", keeps_rows=False)
    rows, factors = num_outputs * shape.num_params, factor_numbers(explicit, num_outputs)
    yield LayerPlan(shape, "explicit", keeps_rows=rows <= factors)
    if shape.groups > 1 and factors < rows <= GROUPED_ROWS * factors:
        yield LayerPlan(shape, "explicit", keeps_rows=True)
    for order in ORDERS[1:]:
        if order == "ordered" and reduction != "none":
            continue  # H has m outputs, while gram needs a single product
        yield LayerPlan(shape, order, keeps_rows=False)
        if shape.taps > 1:
            yield LayerPlan(shape, order, keeps_rows=False, uses_pixels=True)


def choose_layer(
    shape: LayerShape,
    num_outputs: int,
    block_samples: int,
    rates: Rates = USUAL_RATES,
    reduction: Reduction = "none",
) -> LayerPlan:
    """Choose the exact order with the shortest estimated time for one layer.

    >>> choose_layer(LayerShape("stem", 1024, 27, 64), 10, 64).order
    'explicit'
    >>> choose_layer(LayerShape("late", 16, 4608, 512), 10, 64).order
    'ordered'
    """
    return min(
        candidates(shape, num_outputs, reduction),
        key=lambda plan: order_nanoseconds(plan, num_outputs, block_samples, rates, reduction),
    )


def _forced(shape: LayerShape, order: Order, num_outputs: int, reduction: Reduction) -> LayerPlan:
    """Choose the cheaper way of a given order. Explicit rows are then built again for each product.

    Raises:
        InputError: If the order cannot be used with the reduction.
    """
    ways = [plan for plan in candidates(shape, num_outputs, reduction) if plan.order == order]
    if not ways:
        raise InputError(
            f"The order {order!r} cannot be forced on a kernel whose output is reduced to its {reduction}: expected "
            "explicit or gram, which are never slower for it. Give one of these two, or no orders."
        )
    plan = min(ways, key=lambda way: way.input_gram_macs)
    return LayerPlan(shape, order, keeps_rows=False, uses_pixels=plan.uses_pixels)


def plan_jacobian(
    profile: NetworkProfile,
    sizes: Sizes,
    *,
    precision: str,
    rates: Rates = USUAL_RATES,
    reduction: Reduction = "none",
    orders: Sequence[Order] = (),
) -> JacobianPlan:
    """Decide how the factors of a network are contracted. ``orders``, one per layer, overrides the choice.

    Raises:
        InputError: If the number of orders is not the number of layers, or an order cannot be used.
    """
    m = profile.num_outputs
    if orders and len(orders) != len(profile.layers):
        raise InputError(
            f"{len(orders)} orders were given for {len(profile.layers)} layers with a weight matrix: expected one for "
            f"each of {', '.join(shape.name for shape in profile.layers)}. Give one order per layer, or no orders."
        )
    chosen = tuple(choose_layer(shape, m, sizes.block_samples, rates, reduction) for shape in profile.layers)
    if orders:
        chosen = tuple(
            plan if plan.order == order else _forced(plan.shape, order, m, reduction)
            for plan, order in zip(chosen, orders, strict=True)
        )
    return JacobianPlan(
        precision=precision,
        num_outputs=m,
        layers=chosen,
        dense_params=profile.dense_params,
        fallback=profile.fallback,
        sizes=sizes,
        rates=rates,
        reduction=reduction,
        fallback_way=profile.fallback_way,
        fallback_samples=profile.fallback_samples,
    )


def minimal_macs(profile: NetworkProfile, num_samples: int) -> int:
    """Count the fewest multiply-adds of any exact plan with these orders, for a square kernel.

    The count includes the passes of every sample once and every pair of samples once. Rows of explicit layers are
    built once per sample. Each layer uses the order with the fewest multiply-adds.
    """
    m, pairs = profile.num_outputs, num_samples * (num_samples + 1) // 2

    def least(shape: LayerShape) -> int:
        totals = []
        for plan in candidates(shape, m, "none"):
            built = building_macs(shape, m) if plan.order == "explicit" else 0
            totals.append(built * num_samples + pair_macs(plan, m) * pairs)
        return min(totals)

    dense = m * m * profile.dense_params * pairs
    return pass_macs(profile) * num_samples + dense + sum(map(least, profile.layers))
