"""FLOPs and bytes of each order of multiplication, and the choice per layer; integers only.

For one sample, a layer with T positions contributes to the Jacobian row of output o

    J[o] = Σ_t g_o[t] ⊗ a[t],        a: (T, k) inputs,  g_o: (T, c) cotangents,

and to the kernel between two samples ``K[o, o'] = Σ_tt' (a_t · a'_t') (g_ot · g'_o't')``. Three exact orders do it:

    explicit    build J on both sides, one matrix product       q m² c k  + building
    gram        A = a a'ᵀ and G = g g'ᵀ, then Σ A ∘ G             q (T² k + m² T² c + m² T²)
    ordered     A = a a'ᵀ, H = A g', then ⟨g, H⟩                  q (T² k + m T² c + m² T c)

multiply-adds per sample pair, for q groups of k inputs and c channels each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ntkgen.errors import InputError

Order = Literal["explicit", "gram", "ordered"]
ORDERS: tuple[Order, ...] = get_args(Order)

# A number that is written and read once costs about as much as this many multiply-adds of a matrix product.
TOUCH_MACS = 12
# How many float64 numbers the Gram matrices of some cotangents may have while the exact diagonal is computed.
DIAGONAL_NUMBERS = 1 << 20


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one layer with a weight matrix, for one sample."""

    name: str  # path of the module
    positions: int  # T, summed over the uses of the layer
    inputs: int  # k, per group
    channels: int  # c, per group
    groups: int = 1

    @property
    def num_params(self) -> int:
        """Scalars in the weight, q c k."""
        return self.groups * self.channels * self.inputs


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is contracted. ``keeps_rows`` says that its Jacobian rows, not its factors, are kept of a block."""

    shape: LayerShape
    order: Order
    keeps_rows: bool


@dataclass(frozen=True)
class NetworkProfile:
    """What a network costs per sample, as integers."""

    num_outputs: int
    num_params: int
    layers: tuple[LayerShape, ...]
    dense_params: int  # biases, normalisations and parameters without a rule: always rows
    fallback: tuple[str, ...]  # the parameters among them that go through torch.func
    activation_numbers: int  # what the graph of one sample keeps for its backward passes
    input_numbers: int


@dataclass(frozen=True)
class JacobianPlan:
    """Everything that fixes the bits of a block's factors and of a product of two blocks."""

    num_outputs: int
    layers: tuple[LayerPlan, ...]
    dense_params: int
    fallback: tuple[str, ...]
    batch_size: int  # samples in one forward pass; a ragged batch is padded to it
    workspace_numbers: int  # how many numbers an intermediate of a contraction may have

    @property
    def row_numbers(self) -> int:
        """Numbers per sample in the kept Jacobian rows."""
        kept = sum(plan.shape.num_params for plan in self.layers if plan.keeps_rows)
        return self.num_outputs * (self.dense_params + kept)

    @property
    def factor_numbers(self) -> int:
        """Numbers per sample in everything that is kept of a block."""
        pairs = (factor_numbers(p.shape, self.num_outputs) for p in self.layers if not p.keeps_rows)
        return self.row_numbers + sum(pairs) + self.num_outputs

    @property
    def pair_macs(self) -> int:
        """Multiply-adds per pair of samples, without building rows."""
        dense = self.num_outputs**2 * self.dense_params
        return dense + sum(pair_macs(p.shape, self.num_outputs, p.order) for p in self.layers)


def pair_macs(shape: LayerShape, num_outputs: int, order: Order) -> int:
    """Count the multiply-adds of one layer for one pair of samples.

    >>> shape = LayerShape("conv", positions=64, inputs=2304, channels=256)
    >>> [pair_macs(shape, 10, order) // 10**6 for order in ORDERS]
    [58, 114, 21]
    """
    t, k, c, m = shape.positions, shape.inputs, shape.channels, num_outputs
    per_group = {
        "explicit": m * m * c * k,
        "gram": t * t * k + m * m * t * t * c + m * m * t * t,
        "ordered": t * t * k + m * t * t * c + m * m * t * c,
    }[order]
    return shape.groups * per_group


def intermediate_numbers(shape: LayerShape, num_outputs: int, order: Order) -> int:
    """Count the numbers of the largest intermediate that one pair of samples needs (for explicit: one sample's rows).

    >>> intermediate_numbers(LayerShape("fc", positions=1, inputs=84, channels=10), 10, "gram")
    101
    """
    t, m = shape.positions, num_outputs
    return {
        "explicit": m * shape.num_params,
        "gram": t * t + m * m * t * t,
        "ordered": (1 + m) * t * t + 2 * m * t * shape.channels,  # A per output, and g' per left sample, are copies
    }[order]


def factor_numbers(shape: LayerShape, num_outputs: int) -> int:
    """Count the numbers in a layer's inputs and cotangents of one sample.

    >>> factor_numbers(LayerShape("fc", positions=1, inputs=84, channels=10), 10)
    184
    """
    return shape.groups * shape.positions * (shape.inputs + num_outputs * shape.channels)


def building_macs(shape: LayerShape, num_outputs: int) -> int:
    """Count the multiply-adds that build one sample's Jacobian rows of a layer, m T c k per group."""
    return num_outputs * shape.positions * shape.num_params


def choose_layer(shape: LayerShape, num_outputs: int, block_samples: int) -> LayerPlan:
    """Choose the cheapest exact order for one layer, counting the intermediates' traffic and the building of rows.

    Rows are kept, not rebuilt for each product, where they are no larger than the factors.

    >>> choose_layer(LayerShape("stem", 1024, 27, 64), 10, 64).order
    'explicit'
    >>> choose_layer(LayerShape("late", 16, 4608, 512), 10, 64).order
    'ordered'
    """
    keeps_rows = num_outputs * shape.num_params <= factor_numbers(shape, num_outputs)
    building = 0 if keeps_rows else 2 * building_macs(shape, num_outputs) // block_samples

    def cost(order: Order) -> int:
        if order == "explicit":
            return pair_macs(shape, num_outputs, order) + building
        touched = shape.groups * intermediate_numbers(shape, num_outputs, order)
        return pair_macs(shape, num_outputs, order) + TOUCH_MACS * touched

    order = min(ORDERS, key=cost)
    return LayerPlan(shape, order, keeps_rows=keeps_rows and order == "explicit")


def plan_jacobian(
    profile: NetworkProfile,
    *,
    block_samples: int,
    batch_size: int,
    workspace_numbers: int,
    orders: Sequence[Order] = (),
) -> JacobianPlan:
    """Fix how a network's factors are computed and contracted. ``orders``, one per layer, overrides the choice.

    Raises:
        InputError: If there are not as many orders as layers.
    """
    chosen = tuple(choose_layer(shape, profile.num_outputs, block_samples) for shape in profile.layers)
    if orders and len(orders) != len(chosen):
        raise InputError(
            f"{len(orders)} orders were given for {len(chosen)} layers with a weight matrix: expected one for each, "
            f"in the order {', '.join(layer.shape.name for layer in chosen)}. Give as many, or none."
        )
    if orders:
        chosen = tuple(
            plan if plan.order == order else LayerPlan(plan.shape, order, keeps_rows=False)
            for plan, order in zip(chosen, orders, strict=True)
        )
    return JacobianPlan(
        num_outputs=profile.num_outputs,
        layers=chosen,
        dense_params=profile.dense_params,
        fallback=profile.fallback,
        batch_size=batch_size,
        workspace_numbers=workspace_numbers,
    )


def factor_macs(profile: NetworkProfile, plan: JacobianPlan) -> int:
    """Count the multiply-adds of one sample's factors: one forward pass, m backward passes, and the kept rows."""
    passes = sum(shape.positions * shape.num_params for shape in profile.layers) * (1 + profile.num_outputs)
    return passes + sum(building_macs(p.shape, plan.num_outputs) for p in plan.layers if p.keeps_rows)


def slice_samples(numbers_per_pair: int, limit: int, rows: int, cols: int) -> tuple[int, int]:
    """Cut a product of sample blocks into slices whose intermediate has at most ``limit`` numbers (one pair at least).

    Columns are cut before rows are, so that the right operand of every product stays long.

    >>> slice_samples(100, 2000, rows=8, cols=10)
    (2, 10)
    >>> slice_samples(100, 250, rows=8, cols=10)
    (1, 2)
    """
    pairs = max(1, limit // numbers_per_pair)
    return (max(1, min(rows, pairs // cols)), min(cols, pairs))
