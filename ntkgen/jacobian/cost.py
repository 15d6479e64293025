"""Multiply-adds and bytes of each order of multiplication; integers only.

For one sample, a layer with T positions contributes to the Jacobian row of output o

    J[o] = Σ_t g_o[t] ⊗ a[t],        a: (T, k) inputs,  g_o: (T, c) cotangents,

and to the kernel between two samples ``K[o, o'] = Σ_tt' (a_t · a'_t') (g_ot · g'_o't')``. Three exact orders do it:

    explicit    build J on both sides, one matrix product       q m² c k  + building
    gram        A = a a'ᵀ and G = g g'ᵀ, then Σ A ∘ G             q (T² k + m² T² c + m² T²)
    ordered     A = a a'ᵀ, H = A g', then ⟨g, H⟩                  q (T² k + m T² c + m² T c)

multiply-adds per sample pair, for q groups of k inputs and c channels each. Where the inputs are windows of w pixels
moved in steps of one, A follows from the Gram matrix of the P pixels, ``A[t, t'] = Σ_δ X[t+δ, t'+δ]``, and T² k becomes
P² k / w. Reductions of the m × m blocks (`trace`, `diagonal`) need m where the whole blocks need m².
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from ntkgen.blocks import Block

Order = Literal["explicit", "gram", "ordered"]
ORDERS: tuple[Order, ...] = get_args(Order)

# What is kept of the m × m block of a pair of samples: all of it, its trace, or its diagonal.
Reduction = Literal["none", "trace", "diagonal"]

# Bytes of one number of the factors, and of the products, of each precision policy.
PRECISION_BYTES = {
    "float64": (8, 8),
    "float64-accumulate": (4, 8),
    "float32": (4, 4),
    "tf32": (4, 4),
    "bfloat16": (2, 4),
}
# Of so many parameters at least kept rows are multiplied at a time.
KEPT_PARAMS = 512
# So many products are summed in one go at most. A library adds them up one after the other where the result is small:
# a float32 sum of a million squares has lost two digits, and the diagonal of the kernel is such a sum.
LONGEST_SUM = 1 << 16
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
    taps: int = 1  # w: the inputs are windows of so many pixels, moved in steps of one; 1: they are not
    pixels: int = 0  # P: positions of the input that the windows are cut from
    passes_back: bool = True  # gradients go on to earlier layers; those of the first one stop at its output

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
    uses_pixels: bool = False  # A from the Gram matrix of pixels; the inputs are kept as pixels

    @property
    def input_numbers(self) -> int:
        """Numbers per sample in the inputs as they are kept."""
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
    """What a network costs per sample, as integers."""

    num_outputs: int
    num_params: int
    layers: tuple[LayerShape, ...]
    dense_params: int  # biases, normalisations and parameters without a rule: always rows
    fallback: tuple[str, ...]  # the parameters among them that go through autograd
    activation_numbers: int  # what the graph of one sample keeps for its backward passes
    input_numbers: int
    num_logits: int  # what the network returns, before an output map


@dataclass(frozen=True)
class Rates:
    """How fast a device is, in multiply-adds or numbers per microsecond, by a short measurement (`measure.py`)."""

    route: str = "mm"  # how large products are made: `torch.mm`, or oneDNN's product
    product: int = 80_000  # large matrix products
    building: int = 50_000  # Jacobian rows of one sample
    carrying: int = 60_000  # H = A g', long and thin
    finishing: int = 12_000  # ⟨g, H⟩, many small products
    touching: int = 2_000  # numbers written and read once


USUAL_RATES = Rates()


@dataclass(frozen=True)
class Sizes:
    """Into what pieces the work on one block of samples is cut."""

    block_samples: int  # samples whose factors are kept together
    batch_size: int  # samples in one forward pass; a ragged batch is padded to it
    panel_samples: int  # rows of a product that are made together; on the diagonal, the step of the staircase
    workspace_numbers: int  # how many numbers an intermediate of a contraction may have
    carried_numbers: int  # the same for H, which should stay in a cache
    rows_numbers: int  # the same for Jacobian rows that are built for a product


# What suits each device's caches and, of a GPU, its appetite. A batch is not larger than a block.
SIZES = {
    "cpu": Sizes(1, 32, 16, 1 << 22, 5 << 17, 1 << 26),
    "cuda": Sizes(1, 64, 64, 1 << 27, 1 << 26, 1 << 28),
    "mps": Sizes(1, 32, 32, 1 << 24, 1 << 22, 1 << 26),
}


def sizes_for(device_type: str, block_samples: int, batch_size: int, limit: int | None = None) -> Sizes:
    """Cut the work on blocks of so many samples as suits a device, no intermediate having more numbers than a limit.

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
    """Everything that fixes the bits of a block's factors and of a product of two blocks."""

    precision: str
    num_outputs: int
    layers: tuple[LayerPlan, ...]
    dense_params: int
    fallback: tuple[str, ...]
    sizes: Sizes
    rates: Rates = USUAL_RATES
    reduction: Reduction = "none"

    @property
    def batch_size(self) -> int:
        """Samples in one forward pass."""
        return self.sizes.batch_size

    @property
    def row_numbers(self) -> int:
        """Numbers per sample in the kept Jacobian rows."""
        kept = sum(plan.shape.num_params for plan in self.layers if plan.keeps_rows)
        return self.num_outputs * (self.dense_params + kept)

    @property
    def factor_numbers(self) -> int:
        """Numbers per sample in everything that is kept of a block."""
        pairs = (factor_numbers(plan, self.num_outputs) for plan in self.layers if not plan.keeps_rows)
        return self.row_numbers + sum(pairs) + self.num_outputs

    @property
    def factor_bytes(self) -> int:
        """Bytes per sample of everything that is kept of a block."""
        return self.factor_numbers * PRECISION_BYTES[self.precision][0]

    @property
    def pair_macs(self) -> int:
        """Multiply-adds per pair of samples, without building rows."""
        return self.dense_macs + sum(pair_macs(plan, self.num_outputs, self.reduction) for plan in self.layers)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds per pair of samples of biases, normalisations and parameters without a rule."""
        return block_products(self.num_outputs, self.reduction) * self.dense_params

    @property
    def built_macs(self) -> int:
        """Multiply-adds per sample and product of blocks for the rows that are built anew for each."""
        layers = (plan for plan in self.layers if plan.order == "explicit" and not plan.keeps_rows)
        return sum(building_macs(plan.shape, self.num_outputs) for plan in layers)

    def panels(self, rows: int, cols: int, *, is_diagonal: bool) -> Iterator[tuple[Block, Block]]:
        """Cut a product of so many by so many samples into panels; on the diagonal, those above the staircase.

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
    """Count the products of rows that one pair of samples needs."""
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
    """Count the numbers in a layer's inputs and cotangents of one sample, as they are kept.

    >>> factor_numbers(LayerPlan(LayerShape("fc", positions=1, inputs=84, channels=10), "gram", keeps_rows=False), 10)
    184
    """
    shape = plan.shape
    return plan.input_numbers + shape.groups * shape.positions * num_outputs * shape.channels


def building_macs(shape: LayerShape, num_outputs: int) -> int:
    """Count the multiply-adds that build one sample's Jacobian rows of a layer, m T c k per group."""
    return num_outputs * shape.positions * shape.num_params


def pass_macs(profile: NetworkProfile) -> int:
    """Count the multiply-adds of one sample's passes through its layers, one forward and m back to their outputs."""
    m = profile.num_outputs
    return sum(shape.positions * shape.num_params * (1 + m * shape.passes_back) for shape in profile.layers)


def factor_macs(profile: NetworkProfile, plan: JacobianPlan) -> int:
    """Count the multiply-adds of one sample's factors: its passes, and the kept rows."""
    kept = (building_macs(layer.shape, plan.num_outputs) for layer in plan.layers if layer.keeps_rows)
    return pass_macs(profile) + sum(kept)


def product_macs(plan: JacobianPlan, rows: int, cols: int, *, is_diagonal: bool) -> int:
    """Count the multiply-adds of a product of two blocks of samples, rows that are built for it included."""
    sides = rows if is_diagonal else rows + cols
    return plan.computed_pairs(rows, cols, is_diagonal=is_diagonal) * plan.pair_macs + sides * plan.built_macs


def contraction_numbers(plan: JacobianPlan) -> int:
    """Count the numbers that a product of two blocks needs beside its result, at the worst of its layers."""
    sizes, m, block = plan.sizes, plan.num_outputs, plan.sizes.block_samples
    width = kept_width(plan, block)
    kept = (2 * block + sizes.panel_samples) * m * width if plan.row_numbers else 0
    product = sizes.panel_samples * m * block * m
    return product + max([kept, *(_layer_numbers(plan, layer) for layer in plan.layers if not layer.keeps_rows)])


def _layer_numbers(plan: JacobianPlan, layer: LayerPlan) -> int:
    """Count the numbers of one layer's intermediates, which `contract` cuts in the same way."""
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
    """Cut kept rows of so many samples: the parameters that are multiplied at a time."""
    width = max(KEPT_PARAMS, plan.sizes.rows_numbers // (2 * samples * plan.num_outputs))
    return max(1, min(width, LONGEST_SUM // _summed_outputs(plan)))


def built_channels(plan: JacobianPlan, layer: LayerPlan, per_channel: int) -> int:
    """Cut rows that are built for a product, of so many numbers per channel: the channels that are built at a time."""
    longest = LONGEST_SUM // (layer.shape.inputs * _summed_outputs(plan))
    return max(1, min(plan.sizes.rows_numbers // per_channel, longest))


def _summed_outputs(plan: JacobianPlan) -> int:
    return plan.num_outputs if plan.reduction == "trace" else 1


def ordered_pieces(plan: JacobianPlan, layer: LayerPlan) -> tuple[int, int, int]:
    """Cut the ordered contraction of a layer: left samples, right samples, and right outputs of H at a time."""
    sizes, m, shape = plan.sizes, plan.num_outputs, layer.shape
    one_output = shape.positions * shape.channels
    height = min(sizes.panel_samples, max(1, sizes.carried_numbers // (m * one_output)))
    outputs = min(m, max(1, sizes.carried_numbers // (height * one_output)))
    width = min(sizes.panel_samples, max(1, sizes.workspace_numbers // (height * layer.widest**2)))
    return height, width, outputs


def slices(length: int, step: int) -> Iterator[slice]:
    """Cut a range into slices of at most so many, but of one at least.

    >>> [(part.start, part.stop) for part in slices(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, step)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
