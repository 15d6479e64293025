"""Multiply-adds and bytes of each order of multiplication; integers only.

For one sample, a layer with T positions contributes to the Jacobian row of output o

    J[o] = Σ_t g_o[t] ⊗ a[t],        a: (T, k) inputs,  g_o: (T, c) cotangents,

and to the kernel between two samples ``K[o, o'] = Σ_tt' (a_t · a'_t') (g_ot · g'_o't')``. Three exact orders of
multiplication compute this sum:

    explicit    build J on both sides, one matrix product       q m² c k  + building
    gram        A = a a'ᵀ and G = g g'ᵀ, then Σ A ∘ G             q (T² k + m² T² c + m² T²)
    ordered     A = a a'ᵀ, H = A g', then ⟨g, H⟩                  q (T² k + m T² c + m² T c)

The last column counts the multiply-adds per pair of samples, for q groups of k inputs and c channels each. Some layers
have inputs that are windows of w pixels with stride 1. Their A follows from the Gram matrix X of the P pixels,
``A[t, t'] = Σ_δ X[t+δ, t'+δ]``, and T² k becomes P² k / w. For the reductions `trace` and `diagonal` of the m × m
blocks, m² becomes m.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from ntkgen.blocks import Block

Order = Literal["explicit", "gram", "ordered"]
ORDERS: tuple[Order, ...] = get_args(Order)

# The stored part of the m × m block of a pair of samples: the whole block, its trace, or its diagonal.
Reduction = Literal["none", "trace", "diagonal"]

# How autograd computes rows, quickest first; `fallback.py` explains them.
FallbackWay = Literal["function", "backward", "one by one"]
FALLBACK_WAYS: tuple[FallbackWay, ...] = get_args(FallbackWay)

# Bytes of one number of the factors, and of one number of the products, for each precision policy.
PRECISION_BYTES = {
    "float64": (8, 8),
    "float64-accumulate": (4, 8),
    "float32": (4, 4),
    "tf32": (4, 4),
    "bfloat16": (2, 4),
}
# Minimum number of parameters per product of stored rows.
KEPT_PARAMS = 512
# Maximum number of products in one sum. If the result is small, libraries add the products one after the other. A
# float32 sum of a million squares loses two digits in this way, and the diagonal of the kernel is such a sum.
LONGEST_SUM = 1 << 16
# Maximum number of float64 numbers in the Gram matrices of cotangents while the exact diagonal is computed.
DIAGONAL_NUMBERS = 1 << 20


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one layer with a weight matrix, for one sample."""

    name: str  # path of the module
    positions: int  # T, summed over the uses of the layer
    inputs: int  # k, per group
    channels: int  # c, per group
    groups: int = 1
    taps: int = 1  # w: pixels of a window if the inputs are windows of stride 1, otherwise 1
    pixels: int = 0  # P: positions of the input that the windows are taken from
    passes_back: bool = True  # whether gradients go on to earlier layers; false for the first layer

    @property
    def num_params(self) -> int:
        """Scalars in the weight, q c k."""
        return self.groups * self.channels * self.inputs


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is contracted. With ``keeps_rows`` a block stores its Jacobian rows instead of its factors."""

    shape: LayerShape
    order: Order
    keeps_rows: bool
    uses_pixels: bool = False  # A is computed from the Gram matrix of pixels; the inputs are stored as pixels

    @property
    def input_numbers(self) -> int:
        """Numbers per sample in the stored inputs."""
        shape = self.shape
        if self.uses_pixels:
            return shape.groups * shape.pixels * shape.inputs // shape.taps
        return shape.groups * shape.positions * shape.inputs

    @property
    def widest(self) -> int:
        """Rows of one sample in the Gram matrix of inputs, before windows are summed."""
        return max(self.shape.positions, self.shape.pixels) if self.uses_pixels else self.shape.positions

    @property
    def input_gram_macs(self) -> int:
        """Multiply-adds per pair of samples for A, in all groups."""
        shape = self.shape
        if self.uses_pixels:
            return shape.groups * shape.pixels**2 * (shape.inputs // shape.taps)
        return shape.groups * shape.positions**2 * shape.inputs


@dataclass(frozen=True)
class NetworkProfile:
    """The sizes of a network that determine its cost per sample, as integers."""

    num_outputs: int
    num_params: int
    layers: tuple[LayerShape, ...]
    dense_params: int  # biases, normalisations and parameters without a rule; they always have rows
    fallback: tuple[str, ...]  # those of them that are left to autograd
    activation_numbers: int  # numbers that the graph of one sample keeps for its backward passes
    input_numbers: int
    num_logits: int  # outputs of the network, before an output map
    fallback_way: FallbackWay = "one by one"  # how autograd computes the rows that are left to it
    fallback_samples: int = 1  # for how many samples at once


@dataclass(frozen=True)
class Rates:
    """The speed of a device in multiply-adds or numbers per microsecond, from a short measurement (`measure.py`)."""

    route: str = "mm"  # library of large products: `torch.mm` or oneDNN
    product: int = 80_000  # large matrix products
    building: int = 50_000  # Jacobian rows of one sample
    carrying: int = 60_000  # H = A g', long and thin
    finishing: int = 12_000  # ⟨g, H⟩, many small products
    touching: int = 2_000  # numbers written and read once


USUAL_RATES = Rates()


@dataclass(frozen=True)
class Sizes:
    """The sizes of the pieces into which the work on one block of samples is cut."""

    block_samples: int  # samples whose factors are kept together
    batch_size: int  # samples in one forward pass; an incomplete batch is padded to it
    panel_samples: int  # samples of the rows of a product that are computed together
    workspace_numbers: int  # maximum number of numbers in an intermediate of a contraction
    carried_numbers: int  # the same for H, which should fit into a cache
    rows_numbers: int  # the same for Jacobian rows that are built for a product


# Sizes for each type of device. They suit its caches, and keep a GPU busy. A batch is not larger than a block.
SIZES = {
    "cpu": Sizes(1, 32, 16, 1 << 22, 5 << 17, 1 << 26),
    "cuda": Sizes(1, 64, 64, 1 << 27, 1 << 26, 1 << 28),
    "mps": Sizes(1, 32, 32, 1 << 24, 1 << 22, 1 << 26),
}


def sizes_for(device_type: str, block_samples: int, batch_size: int, limit: int | None = None) -> Sizes:
    """Choose the sizes that suit a device. ``limit`` is the maximum number of numbers in an intermediate.

    >>> sizes_for("cpu", 8, 32).batch_size
    8
    """
    usual = SIZES.get(device_type, SIZES["cpu"])
    return dataclasses.replace(
        usual,
        block_samples=block_samples,
        batch_size=min(batch_size, block_samples),
        panel_samples=min(usual.panel_samples, block_samples),
        workspace_numbers=min(usual.workspace_numbers, limit or usual.workspace_numbers),
        carried_numbers=min(usual.carried_numbers, limit or usual.carried_numbers),
        rows_numbers=min(usual.rows_numbers, limit or usual.rows_numbers),
    )


@dataclass(frozen=True)
class JacobianPlan:
    """All settings that determine the bits of a block's factors and of a product of two blocks."""

    precision: str
    num_outputs: int
    layers: tuple[LayerPlan, ...]
    dense_params: int
    fallback: tuple[str, ...]
    sizes: Sizes
    rates: Rates = USUAL_RATES
    reduction: Reduction = "none"
    fallback_way: FallbackWay = "one by one"  # how autograd computes the rows that are left to it
    fallback_samples: int = 1  # for how many samples at once

    @property
    def one_by_one(self) -> "JacobianPlan":
        """The same plan, in which autograd gets one sample after the other."""
        return dataclasses.replace(self, fallback_way="one by one", fallback_samples=1)

    @property
    def batch_size(self) -> int:
        """Samples in one forward pass."""
        return self.sizes.batch_size

    @property
    def row_numbers(self) -> int:
        """Numbers per sample in the stored Jacobian rows."""
        kept = sum(plan.shape.num_params for plan in self.layers if plan.keeps_rows)
        return self.num_outputs * (self.dense_params + kept)

    @property
    def factor_numbers(self) -> int:
        """Numbers per sample in the stored factors and rows of a block."""
        pairs = (factor_numbers(plan, self.num_outputs) for plan in self.layers if not plan.keeps_rows)
        return self.row_numbers + sum(pairs) + self.num_outputs

    @property
    def factor_bytes(self) -> int:
        """Bytes per sample of the stored factors and rows of a block."""
        return self.factor_numbers * PRECISION_BYTES[self.precision][0]

    @property
    def pair_macs(self) -> int:
        """Multiply-adds per pair of samples, without those that build rows."""
        return self.dense_macs + sum(pair_macs(plan, self.num_outputs, self.reduction) for plan in self.layers)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds per pair of samples of biases, normalisations and parameters without a rule."""
        return block_products(self.num_outputs, self.reduction) * self.dense_params

    @property
    def built_macs(self) -> int:
        """Multiply-adds per sample that build rows again for each product of blocks."""
        layers = (plan for plan in self.layers if plan.order == "explicit" and not plan.keeps_rows)
        return sum(building_macs(plan.shape, self.num_outputs) for plan in layers)

    def panels(self, rows: int, cols: int, *, is_diagonal: bool) -> Iterator[tuple[Block, Block]]:
        """Cut a product into panels of rows. On the diagonal a panel has only the columns from its first row on.

        >>> plan = JacobianPlan("float32", 1, (), 0, (), Sizes(4, 4, 2, 1, 1, 1))
        >>> [(len(rows), len(cols)) for rows, cols in plan.panels(4, 4, is_diagonal=True)]
        [(2, 4), (2, 2)]
        """
        for panel in Block(0, rows).pieces(self.sizes.panel_samples):
            yield panel, Block(panel.start if is_diagonal else 0, cols)

    def computed_pairs(self, rows: int, cols: int, *, is_diagonal: bool) -> int:
        """Count the sample pairs that a product of two blocks computes."""
        return sum(len(i) * len(j) for i, j in self.panels(rows, cols, is_diagonal=is_diagonal))


def block_products(num_outputs: int, reduction: Reduction) -> int:
    """Count the products of Jacobian rows that one pair of samples needs."""
    return num_outputs**2 if reduction == "none" else num_outputs


def pair_macs(plan: LayerPlan, num_outputs: int, reduction: Reduction = "none") -> int:
    """Count the multiply-adds of one layer for one pair of samples.

    >>> shape = LayerShape("conv", positions=64, inputs=2304, channels=256)
    >>> [pair_macs(LayerPlan(shape, order, keeps_rows=False), 10) // 10**6 for order in ORDERS]
    [58, 114, 21]
    """
    q, t, c, m = plan.shape.groups, plan.shape.positions, plan.shape.channels, num_outputs
    products = block_products(m, reduction)
    if plan.order == "explicit":
        return products * plan.shape.num_params
    if plan.order == "gram":
        entrywise = t * t * (1 if reduction == "trace" else products)
        return plan.input_gram_macs + q * (products * t * t * c + entrywise)
    return plan.input_gram_macs + q * (m * t * t * c + m * m * t * c)


def factor_numbers(plan: LayerPlan, num_outputs: int) -> int:
    """Count the numbers in the stored inputs and cotangents of a layer for one sample.

    >>> factor_numbers(LayerPlan(LayerShape("fc", positions=1, inputs=84, channels=10), "gram", keeps_rows=False), 10)
    184
    """
    shape = plan.shape
    return plan.input_numbers + shape.groups * shape.positions * num_outputs * shape.channels


def building_macs(shape: LayerShape, num_outputs: int) -> int:
    """Count the multiply-adds that build one sample's Jacobian rows of a layer, m T c k per group."""
    return num_outputs * shape.positions * shape.num_params


def pass_macs(profile: NetworkProfile) -> int:
    """Count the multiply-adds of one sample's forward pass and of its m backward passes to the layers' outputs."""
    m = profile.num_outputs
    return sum(shape.positions * shape.num_params * (1 + m * shape.passes_back) for shape in profile.layers)


def factor_macs(profile: NetworkProfile, plan: JacobianPlan) -> int:
    """Count the multiply-adds of one sample's factors: its passes and its stored rows."""
    kept = (building_macs(layer.shape, plan.num_outputs) for layer in plan.layers if layer.keeps_rows)
    return pass_macs(profile) + sum(kept)


def product_macs(plan: JacobianPlan, rows: int, cols: int, *, is_diagonal: bool) -> int:
    """Count the multiply-adds of a product of two blocks of samples, including the rows that are built for it."""
    sides = rows if is_diagonal else rows + cols
    return plan.computed_pairs(rows, cols, is_diagonal=is_diagonal) * plan.pair_macs + sides * plan.built_macs


def contraction_numbers(plan: JacobianPlan) -> int:
    """Count the numbers that a product of two blocks needs besides its result, for the layer that needs the most."""
    sizes, m, block = plan.sizes, plan.num_outputs, plan.sizes.block_samples
    width = kept_width(plan, block)
    kept = (2 * block + sizes.panel_samples) * m * width if plan.row_numbers else 0
    product = sizes.panel_samples * m * block * m
    return product + max([kept, *(_layer_numbers(plan, layer) for layer in plan.layers if not layer.keeps_rows)])


def _layer_numbers(plan: JacobianPlan, layer: LayerPlan) -> int:
    """Count the numbers of one layer's intermediates. `contract` cuts them in the same way."""
    sizes, m, shape = plan.sizes, plan.num_outputs, layer.shape
    panel, t, c, k = sizes.panel_samples, shape.positions, shape.channels, shape.inputs
    if layer.order == "explicit":
        per_channel = 2 * sizes.block_samples * m * k
        width = min(c, built_channels(plan, layer, per_channel))
        return width * per_channel + panel * (m * width * (t + k) + k * t)
    if layer.order == "gram":
        per_pair = max(m * m * t * t, layer.widest**2)
        sides = min(sizes.block_samples, max(1, sizes.workspace_numbers // (panel * per_pair))) + panel
        return 3 * max(sizes.workspace_numbers, per_pair) + sides * (m * t * c + layer.input_numbers // shape.groups)
    height, width, outputs = ordered_pieces(plan, layer)
    grams = 3 * height * width * layer.widest**2
    inputs = (height + width) * layer.input_numbers // shape.groups
    finishing = height * (t * outputs * c + (t + 1) * m * m)
    return (panel + width) * m * t * c + inputs + grams + finishing


def kept_width(plan: JacobianPlan, samples: int) -> int:
    """Choose the number of parameters per product of stored rows."""
    width = max(KEPT_PARAMS, plan.sizes.rows_numbers // (2 * samples * plan.num_outputs))
    return max(1, min(width, LONGEST_SUM // _summed_outputs(plan)))


def built_channels(plan: JacobianPlan, layer: LayerPlan, per_channel: int) -> int:
    """Choose the number of channels whose rows are built at a time, from the numbers per channel."""
    longest = LONGEST_SUM // (layer.shape.inputs * _summed_outputs(plan))
    return max(1, min(plan.sizes.rows_numbers // per_channel, longest))


def _summed_outputs(plan: JacobianPlan) -> int:
    return plan.num_outputs if plan.reduction == "trace" else 1


def ordered_pieces(plan: JacobianPlan, layer: LayerPlan) -> tuple[int, int, int]:
    """Choose the left samples, the right samples and the right outputs of H per step of an ordered contraction."""
    sizes, m, shape = plan.sizes, plan.num_outputs, layer.shape
    one_output = shape.positions * shape.channels
    height = min(sizes.panel_samples, max(1, sizes.carried_numbers // (m * one_output)))
    outputs = min(m, max(1, sizes.carried_numbers // (height * one_output)))
    width = min(sizes.panel_samples, max(1, sizes.workspace_numbers // (height * layer.widest**2)))
    return height, width, outputs


def slices(length: int, step: int) -> Iterator[slice]:
    """Cut a range into slices of at most ``step`` numbers; a step below one counts as one.

    >>> [(part.start, part.stop) for part in slices(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, step)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
