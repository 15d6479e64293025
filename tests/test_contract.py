"""Every way to multiply factors gives the one kernel; `ntkgen.ntk` against the reference, over all networks."""

import copy
import dataclasses
import math
from collections import Counter
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from cases import (
    CASES,
    CHOSEN,
    CPU,
    TOLERANCES,
    Call,
    chosen,
    chosen_cases,
    chosen_cases_in_turn,
    every_case,
    in_turn,
    reference_of,
    relative_error,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import layer_shapes, pieces, pieces_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import ntkgen
from ntkgen.blocks import Block
from ntkgen.errors import InputError, ShapeError, UnknownNameError
from ntkgen.jacobian import contract as contraction
from ntkgen.jacobian import dense, products
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.choice import plan_jacobian
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import contract, exact_diagonal, fill_kernel
from ntkgen.jacobian.cost import (
    DIAGONAL_NUMBERS,
    ORDERS,
    JacobianPlan,
    LayerPlan,
    LayerShape,
    Rates,
    contraction_numbers,
    product_macs,
)
from ntkgen.jacobian.factors import BlockFactors, PairFactor
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.jacobian.products import routes
from ntkgen.jacobian.reference import reference_ntk
from ntkgen.jacobian.windows import Axis, Windows

SHAPES = {
    "dense": LayerShape("dense", positions=1, inputs=5, channels=4),
    "convolution": LayerShape("convolution", positions=6, inputs=5, channels=4),
    "groups": LayerShape("groups", positions=4, inputs=3, channels=2, groups=3),
    "depthwise": LayerShape("depthwise", positions=4, inputs=3, channels=1, groups=4),
    "windows": LayerShape("windows", positions=9, inputs=12, channels=3, groups=2, taps=6, pixels=12),
}
WINDOWS = Windows((Axis(3, 3, 3, 1, 1), Axis(4, 3, 2, 1, 0)))  # 3 × 2 windows of 3 × 4 pixels, padded along one axis
WAYS = [
    *((name, order, False) for name in SHAPES for order in ORDERS),
    *(("windows", order, True) for order in ("gram", "ordered")),
]
REDUCTIONS = ("none", "trace", "diagonal")
OUTPUTS, DENSE = 3, 7
ROOMS = {
    "one by one": pieces_of(5, 1, 1, 1),
    "some by some": pieces_of(5, 1, 2, 300),
    "at once": pieces_of(5, 1, 16, 1 << 20),
}


def plan_of(layer, sizes=ROOMS["at once"], reduction="none", precision="float64", num_outputs=OUTPUTS):
    return JacobianPlan(precision, num_outputs, (layer,), DENSE, (), sizes, reduction=reduction)


def layer_of(name, order, uses_pixels=False):
    return LayerPlan(SHAPES[name], order, keeps_rows=False, uses_pixels=uses_pixels)


def random_factors(layer, samples, seed, num_outputs=OUTPUTS):
    """Factors as `compute_factors` lays them out, of numbers that no network gives."""
    generator = torch.Generator().manual_seed(seed)
    shape = layer.shape

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    kept = (shape.positions, shape.inputs)
    if layer.uses_pixels:
        kept = (shape.pixels, shape.inputs // shape.taps)
    elif layer.order == "explicit":
        kept = kept[::-1]
    pair = PairFactor(
        layer,
        normal(samples, shape.groups, *kept),
        normal(samples, num_outputs, shape.groups, shape.channels, shape.positions),
        WINDOWS if layer.uses_pixels else None,
    )
    return BlockFactors(normal(samples, num_outputs), normal(samples, num_outputs, DENSE), (pair,))


def unfolded(windows, pixels):
    """Copy every window out of its pixels, tap by tap, with zeros outside: (samples, groups, T, k)."""
    grid = pixels.unflatten(2, [axis.pixels for axis in windows.axes])
    out = pixels.new_zeros(*pixels.shape[:2], windows_count(windows), pixels.shape[3], windows.taps)
    positions = product(*(range(axis.positions) for axis in windows.axes))
    for t, position in enumerate(positions):
        for d, tap in enumerate(product(*(range(axis.taps) for axis in windows.axes))):
            where = [
                i + j * axis.dilation - axis.padding for i, j, axis in zip(position, tap, windows.axes, strict=True)
            ]
            if all(0 <= index < axis.pixels for index, axis in zip(where, windows.axes, strict=True)):
                out[:, :, t, :, d] = grid[(slice(None), slice(None), *where)]
    return out.flatten(3)


def windows_count(windows):
    return math.prod(axis.positions for axis in windows.axes)


def inputs_of(pair):
    """(samples, groups, T, k), whatever is kept."""
    if pair.plan.uses_pixels:
        return unfolded(pair.windows, pair.inputs)
    return pair.inputs.mT if pair.plan.order == "explicit" else pair.inputs


def by_definition(left, right):
    """K[i o, j p] = r_io · r_jp + Σ_q Σ_tu (a_iqt · a_jqu) (g_ioqt · g_jpqu)."""
    (one,), (other,) = left.pairs, right.pairs
    kernel = torch.einsum("iod,jpd->iojp", left.rows, right.rows)
    kernel = kernel + torch.einsum(
        "iqtk,jquk,ioqct,jpqcu->iojp", inputs_of(one), inputs_of(other), one.cotangents, other.cotangents
    )
    return kernel.flatten(2).flatten(0, 1)


def reduced(kernel, num_outputs, reduction):
    """What a reduction leaves of the blocks of a kernel."""
    m = num_outputs
    blocks = kernel.view(len(kernel) // m, m, kernel.shape[1] // m, m)
    if reduction == "none":
        return kernel
    return torch.einsum("iojo->oij" if reduction == "diagonal" else "iojo->ij", blocks)


every_way = pytest.mark.parametrize(("name", "order", "uses_pixels"), WAYS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_reduced_way = pytest.mark.parametrize(  # no ordered contraction is planned where the result is reduced
    ("name", "order", "uses_pixels", "reduction"),
    [(*way, reduction) for way in WAYS for reduction in REDUCTIONS if way[1] != "ordered" or reduction == "none"],
)
every_room = pytest.mark.parametrize("room", ROOMS)


@every_reduced_way
@every_room
@pytest.mark.numeric
def test_every_order_is_the_definition(name, order, uses_pixels, reduction, room):
    layer = layer_of(name, order, uses_pixels)
    left, right = random_factors(layer, 5, seed=0), random_factors(layer, 4, seed=1)
    found = contract(left, right, plan_of(layer, ROOMS[room], reduction))
    assert relative_error(found, reduced(by_definition(left, right), OUTPUTS, reduction)) < 1e-14


@every_reduced_way
@every_room
def test_a_block_with_itself_is_exactly_symmetric(name, order, uses_pixels, reduction, room):
    layer = layer_of(name, order, uses_pixels)
    block = random_factors(layer, 5, seed=0)
    found = contract(block, block, plan_of(layer, ROOMS[room], reduction))
    assert torch.equal(found, found.mT)
    assert relative_error(found, reduced(by_definition(block, block), OUTPUTS, reduction)) < 1e-14


@given(
    layer_shapes(6, groups=2).filter(lambda shape: shape.taps == 1),
    st.sampled_from(ORDERS),
    st.sampled_from(REDUCTIONS),
    pieces(7, 700),
    st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4)),
)
def test_every_order_is_the_definition_however_the_work_is_cut(shape, order, reduction, sizes, counts):
    assume(order != "ordered" or reduction == "none")
    rows, columns, m = counts
    layer = LayerPlan(shape, order, keeps_rows=False)
    left, right = random_factors(layer, rows, 0, num_outputs=m), random_factors(layer, columns, 1, num_outputs=m)
    plan = plan_of(layer, sizes, reduction, num_outputs=m)
    for other in (left, right):
        found = contract(left, other, plan)
        assert relative_error(found, reduced(by_definition(left, other), m, reduction)) < 1e-14


@every_reduction
def test_kept_rows_are_multiplied_some_parameters_at_a_time(reduction):
    """Never fewer than 512 at a time: of 1500 there are three parts."""
    layer = layer_of("dense", "gram")
    blocks = [random_factors(layer, samples, seed=samples) for samples in (4, 3)]
    generator = torch.Generator().manual_seed(2)
    left, right = (
        dataclasses.replace(b, rows=torch.randn(len(b), OUTPUTS, 1500, generator=generator, dtype=torch.float64))
        for b in blocks
    )
    for other in (left, right):
        found = contract(left, other, plan_of(layer, ROOMS["one by one"], reduction))
        assert relative_error(found, reduced(by_definition(left, other), OUTPUTS, reduction)) < 1e-14


# the diagonal ---------------------------------------------------------------------------------------------------------


@every_way
def test_the_exact_diagonal_is_the_diagonal(name, order, uses_pixels):
    block = random_factors(layer_of(name, order, uses_pixels), 5, seed=0)
    diagonal = exact_diagonal(block)
    assert diagonal.shape == (5, OUTPUTS)
    assert relative_error(diagonal.flatten(), by_definition(block, block).diagonal()) < 1e-14


@every_way
@pytest.mark.parametrize("room", [1, 100])
def test_the_exact_diagonal_does_not_depend_on_how_many_outputs_are_made_at_a_time(
    name, order, uses_pixels, room, monkeypatch
):
    block = random_factors(layer_of(name, order, uses_pixels), 5, seed=0)
    expected = exact_diagonal(block)
    monkeypatch.setattr(contraction, "DIAGONAL_NUMBERS", room)
    assert relative_error(exact_diagonal(block), expected) < 1e-14


def test_the_exact_diagonal_of_more_positions_than_there_is_room_for():
    """A picture of 33 × 33 has more pairs of positions than numbers are made at a time: they are made all the same."""
    positions = math.isqrt(DIAGONAL_NUMBERS) + 1
    layer = LayerPlan(LayerShape("large", positions, inputs=2, channels=1), "gram", keeps_rows=False)
    block = random_factors(layer, 1, seed=0, num_outputs=2)
    assert relative_error(exact_diagonal(block).flatten(), by_definition(block, block).diagonal()) < 1e-12


def test_the_exact_diagonal_is_float64_from_float32_factors():
    block = random_factors(layer_of("convolution", "gram"), 5, seed=0)
    (pair,) = block.pairs
    single = BlockFactors(
        block.logits.float(), block.rows.float(), (PairFactor(pair.plan, pair.inputs.float(), pair.cotangents.float()),)
    )
    double = BlockFactors(
        single.logits.double(),
        single.rows.double(),
        (PairFactor(pair.plan, single.pairs[0].inputs.double(), single.pairs[0].cotangents.double()),),
    )
    assert torch.equal(exact_diagonal(single), exact_diagonal(double))
    assert exact_diagonal(single).dtype == torch.float64


# what is executed -----------------------------------------------------------------------------------------------------


class Executed(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, and of what is multiplied entry by entry."""

    def __init__(self):
        super().__init__()
        self.macs, self.calls = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        if name in {"mm", "bmm"}:
            self.macs += args[0].numel() * args[1].shape[-1]
        elif name in {"addmm", "addmm_", "baddbmm", "baddbmm_"}:
            self.macs += args[1].numel() * args[2].shape[-1]
        elif name == "_linear_pointwise":
            self.macs += args[0].numel() * args[1].shape[0]
        elif name in {"mul", "addcmul", "addcmul_"}:
            self.macs += result.numel()
        return result


@every_reduced_way
@pytest.mark.parametrize("room", chosen(ROOMS, ["some by some"]))
@pytest.mark.parametrize("is_diagonal", chosen([True, False], [False]))
def test_as_many_multiply_adds_are_done_as_planned(name, order, uses_pixels, reduction, room, is_diagonal):
    """On the diagonal only those above the staircase; rows are built for each product, and there only once."""
    layer = layer_of(name, order, uses_pixels)
    left, right = random_factors(layer, 5, seed=0), random_factors(layer, 4, seed=1)
    plan = plan_of(layer, ROOMS[room], reduction)
    with Executed() as executed:
        contract(left, left if is_diagonal else right, plan)
    assert executed.macs == product_macs(plan, 5, 5 if is_diagonal else 4, is_diagonal=is_diagonal)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64-accumulate"])
def test_as_many_multiply_adds_are_done_in_every_precision(order, precision):
    layer = layer_of("windows", order, uses_pixels=order != "explicit")
    plan, dtype = plan_of(layer, precision=precision), policy(precision).factor_dtype
    blocks = [rounded(random_factors(layer, count, seed=count), dtype) for count in (5, 4)]
    with exact_arithmetic(CPU), Executed() as executed:
        contract(*blocks, plan)
    assert executed.macs == product_macs(plan, 5, 4, is_diagonal=False)


def rounded(block, dtype):
    """The same factors in another dtype."""
    pairs = (
        dataclasses.replace(pair, inputs=pair.inputs.to(dtype), cotangents=pair.cotangents.to(dtype))
        for pair in block.pairs
    )
    return BlockFactors(block.logits.float(), block.rows.to(dtype), tuple(pairs))


@pytest.mark.skipif("onednn" not in routes(CPU), reason="torch was built without oneDNN")
@every_way
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64-accumulate"])
@pytest.mark.numeric
def test_the_other_route_is_taken_for_float32_and_gives_the_same_kernel(
    name, order, uses_pixels, precision, monkeypatch
):
    monkeypatch.setattr(products, "ONEDNN_MACS", 1)
    layer = layer_of(name, order, uses_pixels)
    blocks = [rounded(random_factors(layer, n, seed=n), policy(precision).factor_dtype) for n in (5, 4)]
    plan = plan_of(layer, precision=precision)
    other = dataclasses.replace(plan, rates=Rates(route="onednn"))
    with exact_arithmetic(CPU):
        expected = contract(*blocks, plan)
        with Executed() as executed:
            found = contract(*blocks, other)
    assert relative_error(found, expected) < 1e-6
    assert bool(executed.calls["_linear_pointwise"]) == (
        precision == "float32" or (precision == "bfloat16" and order == "ordered")  # H is never rounded
    )
    assert executed.macs == product_macs(plan, 5, 4, is_diagonal=False)


class Alive(TorchDispatchMode):
    """Watches how many numbers are in memory, in tensors that were made meanwhile, after every operation."""

    def __init__(self, dtype):
        super().__init__()
        self.itemsize, self.storages, self.peak = dtype.itemsize, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and not any(shares(result, other) for other in args):
            storage = result.untyped_storage()
            self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes() // self.itemsize)
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(numbers for _, numbers in self.storages.values()))
        return result


def shares(one, other):
    return isinstance(other, torch.Tensor) and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# Samples of a panel, numbers of an intermediate, precision.
ALIVE = [(4, 1_000, "float64"), (1, 30_000, "float64"), (4, 1_000, "bfloat16"), (1, 1, "float64"), (4, 1, "float64")]


@in_turn(
    "way work",
    [way if at % 3 == 0 else pytest.param(way, marks=pytest.mark.slow) for at, way in enumerate(WAYS)],
    ALIVE,
)
def test_no_more_numbers_are_alive_than_are_counted(way, work):
    """The result is added. A block with itself has four copies of it at the end, without intermediates."""
    (name, order, uses_pixels), (panel, numbers, precision) = way, work
    layer = layer_of(name, order, uses_pixels)
    plan = plan_of(layer, pieces_of(10, 1, panel, numbers), precision=precision)
    plan = dataclasses.replace(plan, dense_params=0)  # whose rows would be more than all else
    chosen = policy(precision)
    blocks = (rounded(random_factors(layer, 10, seed=seed), chosen.factor_dtype) for seed in (0, 1))
    left, right = (dataclasses.replace(block, rows=block.rows[..., :0]) for block in blocks)
    whole = (10 * OUTPUTS) ** 2
    with exact_arithmetic(CPU):
        for other in (left, right):
            with Alive(chosen.accumulate_dtype) as alive:
                contract(left, other, plan)
            at_the_end = 4 * whole if other is left else 0
            assert alive.peak <= max(contraction_numbers(plan) + whole, at_the_end)


@pytest.mark.parametrize("numbers", [1, 10_000, 1_000_000])
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_no_more_numbers_are_alive_than_are_counted_for_kept_rows(numbers, precision):
    chosen = policy(precision)
    plan = JacobianPlan(precision, OUTPUTS, (), 1500, (), pieces_of(10, 1, 4, numbers))
    left, right = (
        BlockFactors(torch.zeros(10, OUTPUTS), torch.zeros(10, OUTPUTS, 1500, dtype=chosen.factor_dtype), ())
        for _ in range(2)
    )
    with exact_arithmetic(CPU), Alive(chosen.accumulate_dtype) as alive:
        contract(left, right, plan)
    assert alive.peak <= contraction_numbers(plan) + (10 * OUTPUTS) ** 2


# every network, cut in every way --------------------------------------------------------------------------------------


@cache
def network_of(name, precision):
    case = CASES[name]()
    return prepare(case.module, case.x, policy(precision)), case.x


def plan_case(network, precision, sizes, order=None, reduction="none"):
    orders = [order] * len(network.profile.layers) if order else ()
    return plan_jacobian(network.profile, sizes, precision=precision, reduction=reduction, orders=orders)


def kernel_of(name, precision, sizes, order=None, reduction="none"):
    """The kernel of a case, its samples cut into blocks, its layers in one order."""
    network, x = network_of(name, precision)
    plan = plan_case(network, precision, sizes, order, reduction)
    blocks = Block(0, len(x)).pieces(sizes.block_samples)
    factors = BlockCache(lambda block: compute_factors(network, plan, x[block.start : block.stop]), capacity=2)
    with exact_arithmetic(CPU):
        return fill_kernel(blocks, blocks, factors, plan)


CUTS = [
    pieces_of(1, 1, 1, 1),
    pieces_of(2, 1, 1, 2),
    pieces_of(3, 2, 2, 3),
    pieces_of(8, 3, 2, 40),
    pieces_of(2, 2, 3, 900),
]


@chosen_cases_in_turn("name order", [None, *ORDERS])
@pytest.mark.numeric
def test_slices_of_any_size_give_the_same_kernel(name, order):
    """With room for one number, or two, or three, every loop over samples, outputs and channels takes single steps."""
    whole = kernel_of(name, "float32", pieces_of(8, 8, 16, 1 << 22))
    for sizes in CUTS:
        found = kernel_of(name, "float32", sizes, order)
        assert torch.equal(found, found.T)
        assert (found - whole).abs().max() <= 1e-6 * whole.diagonal().max(), sizes


@chosen_cases_in_turn("name reduction order", ["trace", "diagonal"], [None, "explicit", "gram"])
def test_reductions_are_those_of_the_reference(name, reduction, order):
    expected = reference_of(name)
    m = len(expected) // len(network_of(name, "float64")[1])
    for sizes in (pieces_of(2, 2, 1, 30), pieces_of(8, 8, 16, 1 << 22)):
        found = kernel_of(name, "float64", sizes, order, reduction)
        assert torch.equal(found, found.mT)
        assert relative_error(found, reduced(expected, m, reduction)) < TOLERANCES["float64"]


def test_the_ordered_contraction_has_no_reduction_to_be_forced():
    with pytest.raises(InputError, match="explicit or gram"):
        kernel_of("conv", "float64", ROOMS["at once"], "ordered", "trace")


@every_reduction
def test_a_rectangle_of_blocks_is_reduced_like_a_square(reduction):
    network, x = network_of("conv", "float64")
    plan = plan_case(network, "float64", pieces_of(2, 2, 1, 30), None, reduction)
    blocks = [Block(0, 1), Block(1, 3)], [Block(2, 4)]
    factors = BlockCache(lambda block: compute_factors(network, plan, x[block.start : block.stop]), capacity=2)
    with exact_arithmetic(CPU):
        found = fill_kernel(*blocks, factors, plan)
    expected = reference_of("conv")[: 3 * 3, 2 * 3 :]
    assert relative_error(found, reduced(expected, 3, reduction)) < TOLERANCES["float64"]


# ntkgen.ntk against the reference -------------------------------------------------------------------------------------


@cache
def rectangle_of(name):
    case = CASES[name]()
    return reference_ntk(case.module, *case.halves)


# Relative Frobenius error that a policy may have against the reference; of bfloat16, 8 bits in every factor.
POLICY_TOLERANCES = {**TOLERANCES, "float64-accumulate": TOLERANCES["float32"], "bfloat16": 2e-2}
PRECISIONS = ["float64", "float32", "float64-accumulate", "bfloat16"]


@every_case
@pytest.mark.numeric
def test_equals_the_reference(name):
    require_the_reference(name, None, "float64")


@chosen_cases_in_turn("name order precision", [None, *ORDERS], PRECISIONS)
@pytest.mark.numeric
def test_equals_the_reference_in_every_order_and_precision(name, order, precision):
    require_the_reference(name, order, precision)


def require_the_reference(name, order, precision):
    case = CASES[name]()
    num_layers = len(network_of(name, precision)[0].profile.layers)
    options = {"precision": precision, "orders": [order] * num_layers if order else ()}
    square = ntkgen.ntk(case.module, case.x, **options)
    rectangle = ntkgen.ntk(case.module, *case.halves, **options)
    assert square.dtype == rectangle.dtype == policy(precision).accumulate_dtype
    assert torch.equal(square, square.T)
    assert relative_error(square, reference_of(name)) < POLICY_TOLERANCES[precision]
    assert relative_error(rectangle, rectangle_of(name)) < POLICY_TOLERANCES[precision]


@pytest.mark.parametrize("order", ORDERS)
def test_a_forced_order_is_the_one_that_is_used(order, monkeypatch):
    used = []
    for name in ORDERS:
        original = getattr(contraction, f"_add_{name}")
        monkeypatch.setattr(
            contraction, f"_add_{name}", lambda *args, f=original, n=name: (used.append(n), f(*args))[1]
        )
    case = CASES["conv"]()
    ntkgen.ntk(case.module, case.x, orders=[order] * 3)
    assert set(used) == {order}


OWN_FLOATS = {
    "casts": lambda self, x: self.out(torch.tanh(self.cell(x.float()))),
    "makes zeros": lambda self, x: self.out(torch.tanh(self.cell(x)) @ torch.ones(5, 5)),
}


@pytest.mark.parametrize("what", OWN_FLOATS)
@pytest.mark.numeric
def test_a_network_that_can_only_be_run_in_float32_is_run_in_float32(what):
    model = Call(OWN_FLOATS[what], cell=torch.nn.Linear(4, 5), out=torch.nn.Linear(5, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in model(x).flatten()]
    J = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    assert relative_error(ntkgen.ntk(model, x), J @ J.T) < TOLERANCES["float32"]
    assert prepare(model, x, policy("float32")).fallback == ()


# algebra --------------------------------------------------------------------------------------------------------------


@chosen_cases_in_turn("name precision", PRECISIONS)
@pytest.mark.numeric
def test_is_symmetric_to_the_last_bit_and_positive_semidefinite(name, precision):
    case = CASES[name]()
    K = ntkgen.ntk(case.module, case.x, precision=precision)
    assert torch.equal(K, K.T)
    eigenvalues = torch.linalg.eigvalsh(K.double())
    assert eigenvalues[0] >= -10 * POLICY_TOLERANCES[precision] * eigenvalues[-1].abs()


@chosen_cases
def test_kernels_of_complementary_parameters_add_up(name):
    case = CASES[name]()
    halves = []
    for kept in (0, 1):
        module = copy.deepcopy(case.module)
        trainable = [param for param in module.parameters() if param.requires_grad]
        for index, param in enumerate(trainable):
            param.requires_grad_(index % 2 == kept)
        halves.append(ntkgen.ntk(module, case.x, precision="float64"))
    assert relative_error(halves[0] + halves[1], reference_of(name)) < TOLERANCES["float64"]
    assert min(half.norm() for half in halves) > 0 or name == "jacobian_of_zeros"


@chosen_cases
def test_permuting_samples_permutes_rows_and_columns(name):
    case = CASES[name]()
    K = ntkgen.ntk(case.module, case.x, precision="float64")
    n, m = len(case.x), len(K) // len(case.x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    rows = (order[:, None] * m + torch.arange(m)).flatten()
    permuted = ntkgen.ntk(case.module, case.x[order], precision="float64")
    assert relative_error(permuted, K[rows][:, rows]) < 1e-13


@pytest.mark.parametrize("name", ["mlp", "conv", "separate_heads"])
def test_a_row_is_one_output_of_one_sample(name):
    """The kernels of the outputs taken one by one are the diagonals of the blocks, and their traces add up."""
    case = CASES[name]()
    K = ntkgen.ntk(case.module, case.x, precision="float64")
    m = len(K) // len(case.x)
    trace = 0.0
    for output in range(m):
        one = Call(lambda self, x, o=output: self.model(x)[:, o : o + 1], model=case.module)
        alone = ntkgen.ntk(one, case.x, precision="float64")
        assert relative_error(alone, K[output::m, output::m]) < 1e-13
        trace += alone.trace()
    assert K.trace() == pytest.approx(float(trace), rel=1e-13)


@pytest.mark.parametrize("name", chosen(CASES, CHOSEN[::3]))
@pytest.mark.numeric
def test_does_not_depend_on_how_the_work_is_cut(name, monkeypatch):
    case = CASES[name]()
    monkeypatch.setattr(dense, "JOINT_NUMBERS", 0)  # which treats one output after the other
    whole = ntkgen.ntk(case.module, case.x)
    computed = []

    def compute(network, plan, x):
        computed.append((len(x), plan.batch_size))
        return compute_factors(network, plan, x)

    monkeypatch.setattr(dense, "compute_factors", compute)
    size = dense.plan_ntk(case.module, case.x).jacobian.factor_bytes
    for block, batch_size in ((1, 1), (1, 2), (2, 1), (3, 2)):
        monkeypatch.setattr(dense, "BLOCK_BYTES", block * size)
        monkeypatch.setattr(dense, "batch_size_for", lambda _, size=batch_size: size)
        computed.clear()
        pieces = ntkgen.ntk(case.module, case.x)
        assert max(computed)[0] == min(block, len(case.x))
        assert max(computed)[1] == min(block, batch_size, len(case.x))
        assert torch.equal(pieces, pieces.T)
        assert (pieces - whole).abs().max() <= 1e-6 * whole.diagonal().max()


@pytest.mark.parametrize("order", [None, *ORDERS])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.numeric
def test_a_diagonal_of_a_million_squares_is_as_exact_as_any(order, samples):
    model = nn.Sequential(nn.Conv2d(512, 512, 2, bias=False), nn.Flatten(), nn.Linear(512, 3))
    x = torch.rand(samples, 512, 2, 2, generator=torch.Generator().manual_seed(0))
    orders = [order, "gram"] if order else ()
    exact = ntkgen.ntk(model, x, precision="float64")
    assert (ntkgen.ntk(model, x, orders=orders) - exact).abs().max() < 1e-6 * exact.diagonal().max()


@pytest.mark.parametrize("name", chosen(CASES, CHOSEN[::4]))
@pytest.mark.numeric
def test_does_not_depend_on_how_many_threads_compute(name):
    case, before = CASES[name](), torch.get_num_threads()
    alone = ntkgen.ntk(case.module, case.x)
    try:
        torch.set_num_threads(2)
        together = ntkgen.ntk(case.module, case.x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, together.T)
    assert (together - alone).abs().max() <= 1e-6 * alone.diagonal().max()


# the mode that the process is in --------------------------------------------------------------------------------------


@pytest.fixture
def medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision(before)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", ["mlp", "conv", "tied_weights"])
@pytest.mark.parametrize("mode", MODES)
def test_gives_the_same_bits_in_every_mode(name, mode):
    case = CASES[name]()
    square, rectangle = ntkgen.ntk(case.module, case.x), ntkgen.ntk(case.module, *case.halves)
    with MODES[mode]():
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        assert torch.equal(ntkgen.ntk(case.module, case.x), square)
        assert torch.equal(ntkgen.ntk(case.module, *case.halves), rectangle)
        after = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    assert after == before


def test_takes_samples_that_were_made_in_inference_mode():
    case = CASES["mlp"]()
    with torch.inference_mode():
        x = case.x * 1
    assert torch.equal(ntkgen.ntk(case.module, x), ntkgen.ntk(case.module, case.x))


def test_gives_the_same_bits_where_float32_products_may_be_rounded(medium):
    case = CASES["conv"]()
    found = ntkgen.ntk(case.module, case.x)
    torch.set_float32_matmul_precision("highest")
    expected = ntkgen.ntk(case.module, case.x)
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(found, expected)


def test_gives_the_same_bits_under_another_default_dtype():
    case = CASES["transformer"]()
    expected = ntkgen.ntk(case.module, case.x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(ntkgen.ntk(case.module, case.x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_lies_where_the_network_does():
    case = CASES["mlp"]()
    assert ntkgen.ntk(case.module, case.x).device == CPU


# errors ---------------------------------------------------------------------------------------------------------------

X = torch.ones(3, 4)
WRONG = {
    "no rows": ((X[:0],), {}, InputError, "empty batch"),
    "no columns": ((X, X[:0]), {}, InputError, "empty batch"),
    "other shapes": ((X, torch.ones(3, 5)), {}, ShapeError, r"different shapes, \(4,\) and \(5,\)"),
    "precision": ((X,), {"precision": "flaot32"}, UnknownNameError, "'flaot32'. Did you mean float32"),
    "order": ((X,), {"orders": ["gramm"]}, UnknownNameError, "'gramm'. Did you mean gram"),
    "number of orders": ((X,), {"orders": ["gram"] * 3}, InputError, "3 orders were given for 1 layers"),
    "a set": (({1.0},), {}, InputError, "must be a torch.Tensor, a NumPy array or a list of numbers, and is a set"),
    "a data set": ((TensorDataset(torch.ones(2, 4)),), {}, InputError, "and is a TensorDataset.*Stack its samples"),
    "a loader": (
        (DataLoader(TensorDataset(torch.ones(2, 4))),),
        {},
        InputError,
        "and is a DataLoader.*Is it a data set",
    ),
    "a graph": ((SimpleNamespace(edge_index=torch.ones(2, 3)),), {}, InputError, "pass the numbers of its nodes"),
    "a packed sequence": (
        (pack_sequence([torch.ones(3, 4), torch.ones(2, 4)]),),
        {},
        InputError,
        "is a packed sequence.*Pad them with pad_packed_sequence",
    ),
    "a packed sequence out of order": (
        (pack_sequence([torch.ones(2, 4), torch.ones(3, 4)], enforce_sorted=False),),
        {},
        InputError,
        "is a packed sequence",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_refused_in_one_line(what):
    args, options, error, message = WRONG[what]
    with pytest.raises(error, match=message) as raised:
        ntkgen.ntk(torch.nn.Linear(4, 2), *args, **options)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, InputError)
