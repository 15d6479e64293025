"""Every way to multiply factors gives the one kernel; `ntkgen.ntk` against the reference, over all networks."""

import copy
from functools import cache

import pytest
import torch
from cases import CASES, CPU, TOLERANCES, Call, every_case, reference_of, relative_error
from torch.utils.flop_counter import FlopCounterMode

import ntkgen
from ntkgen.errors import InputError, ShapeError, UnknownNameError
from ntkgen.jacobian import contract as contraction
from ntkgen.jacobian import dense, factors
from ntkgen.jacobian.contract import contract, exact_diagonal, gram, jacobian_matrix, ordered
from ntkgen.jacobian.cost import ORDERS, JacobianPlan, LayerPlan, LayerShape, building_macs
from ntkgen.jacobian.factors import BlockFactors, PairFactor
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import policy
from ntkgen.jacobian.reference import reference_ntk

SHAPES = {
    "dense": LayerShape("dense", positions=1, inputs=5, channels=4),
    "convolution": LayerShape("convolution", positions=6, inputs=5, channels=4),
    "groups": LayerShape("groups", positions=4, inputs=3, channels=2, groups=3),
    "depthwise": LayerShape("depthwise", positions=4, inputs=3, channels=1, groups=4),
}
OUTPUTS, DENSE = 3, 7


def plan_of(shape, order, workspace=1 << 20):
    layer = LayerPlan(shape, order, keeps_rows=False)
    return JacobianPlan(OUTPUTS, (layer,), DENSE, (), batch_size=1, workspace_numbers=workspace)


def random_factors(shape, order, samples, seed):
    generator = torch.Generator().manual_seed(seed)
    q, t = shape.groups, shape.positions

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    pair = PairFactor(
        LayerPlan(shape, order, keeps_rows=False),
        normal(samples, q, t, shape.inputs),
        normal(samples, OUTPUTS, q, t, shape.channels),
    )
    return BlockFactors(normal(samples, OUTPUTS), normal(samples, OUTPUTS, DENSE), (pair,))


def by_definition(left, right):
    """K[i o, j p] = r_io · r_jp + Σ_q Σ_tu (a_iqt · a_jqu) (g_ioqt · g_jpqu)."""
    (one,), (other,) = left.pairs, right.pairs
    kernel = torch.einsum("iod,jpd->iojp", left.rows, right.rows)
    kernel = kernel + torch.einsum(
        "iqtk,jquk,ioqtc,jpquc->iojp", one.inputs, other.inputs, one.cotangents, other.cotangents
    )
    return kernel.flatten(2).flatten(0, 1)


every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_order = pytest.mark.parametrize("order", ORDERS)


@every_shape
@every_order
@pytest.mark.parametrize("workspace", [1, 500, 1 << 20], ids=["pair by pair", "some pairs", "at once"])
def test_every_order_is_the_definition(shape, order, workspace):
    left, right = random_factors(shape, order, 5, seed=0), random_factors(shape, order, 4, seed=1)
    found = contract(left, right, plan_of(shape, order, workspace))
    assert relative_error(found, by_definition(left, right)) < 1e-14


@every_shape
@every_order
def test_a_block_with_itself_is_exactly_symmetric(shape, order):
    block, plan = random_factors(shape, order, 5, seed=0), plan_of(shape, order, workspace=500)
    found = contract(block, block, plan)
    assert torch.equal(found, found.T)
    assert relative_error(found, by_definition(block, block)) < 1e-14


@every_shape
@every_order
def test_the_exact_diagonal_is_the_diagonal(shape, order):
    block = random_factors(shape, order, 5, seed=0)
    diagonal = exact_diagonal(block)
    assert diagonal.shape == (5, OUTPUTS)
    assert relative_error(diagonal.flatten(), by_definition(block, block).diagonal()) < 1e-14


def test_the_exact_diagonal_is_float64_from_float32_factors():
    block = random_factors(SHAPES["convolution"], "gram", 5, seed=0)
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


def addmm_flops(_out, left, right, *_args, **_options):
    """Two per multiply-add; torch counts this for `addmm` and not for `addmm_`."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("name", ["convolution", "groups", "depthwise"])
@every_order
def test_as_many_multiply_adds_are_done_as_planned(name, order):
    shape = SHAPES[name]
    left, right = random_factors(shape, order, 5, seed=0), random_factors(shape, order, 4, seed=1)
    plan = plan_of(shape, order)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        contract(left, right, plan)
    building = building_macs(shape, OUTPUTS) * (5 + 4) if order == "explicit" else 0
    assert counter.get_total_flops() == 2 * (5 * 4 * plan.pair_macs + building)


def test_a_block_with_itself_builds_its_rows_once(monkeypatch):
    built = []

    def counted(a, g):
        built.append(len(a))
        return jacobian_matrix(a, g)

    monkeypatch.setattr(contraction, "jacobian_matrix", counted)
    block = random_factors(SHAPES["convolution"], "explicit", 5, seed=0)
    contract(block, block, plan_of(SHAPES["convolution"], "explicit"))
    assert built == [5]


@pytest.mark.parametrize("order", ORDERS)
def test_no_intermediate_is_larger_than_the_workspace(order, monkeypatch):
    shape, limit, made = SHAPES["convolution"], 2000, []

    def product(function):
        def counted(a1, g1, a2, g2):
            t, m, c = a1.shape[1], g1.shape[1], g1.shape[3]
            pairs = len(a1) * len(a2)
            made.append(pairs * (t * t + (m * m * t * t if function is gram else m * t * c)))
            return function(a1, g1, a2, g2)

        return counted

    def built(a, g):
        rows = jacobian_matrix(a, g)
        made.append(rows.numel())
        return rows

    for function in (gram, ordered):
        monkeypatch.setattr(contraction, function.__name__, product(function))
    monkeypatch.setattr(contraction, "jacobian_matrix", built)
    left, right = random_factors(shape, order, 9, seed=0), random_factors(shape, order, 7, seed=1)
    contract(left, right, plan_of(shape, order, limit))
    assert len(made) > 1
    assert max(made) <= limit


# ntkgen.ntk against the reference -------------------------------------------------------------------------------------


@cache
def rectangle_of(name):
    case = CASES[name]()
    return reference_ntk(case.module, *case.halves)


@every_case
@pytest.mark.parametrize("order", [None, *ORDERS])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_equals_the_reference(name, order, precision):
    case = CASES[name]()
    num_layers = len(prepare(case.module, case.x, policy(precision)).profile.layers)
    options = {"precision": precision, "orders": [order] * num_layers if order else ()}
    square = ntkgen.ntk(case.module, case.x, **options)
    rectangle = ntkgen.ntk(case.module, *case.halves, **options)
    assert square.dtype == rectangle.dtype == getattr(torch, precision)
    assert relative_error(square, reference_of(name)) < TOLERANCES[precision]
    assert relative_error(rectangle, rectangle_of(name)) < TOLERANCES[precision]


@pytest.mark.parametrize("order", ["gram", "ordered"])
def test_a_forced_order_is_the_one_that_is_used(order, monkeypatch):
    used = []
    for name in ("gram", "ordered"):
        original = getattr(contraction, name)
        monkeypatch.setattr(contraction, name, lambda *args, f=original, n=name: (used.append(n), f(*args))[1])
    case = CASES["conv"]()
    ntkgen.ntk(case.module, case.x, orders=[order] * 3)
    assert set(used) == {order}


OWN_FLOATS = {
    "casts": lambda self, x: self.out(torch.tanh(self.cell(x.float()))),
    "makes zeros": lambda self, x: self.out(torch.tanh(self.cell(x)) @ torch.ones(5, 5)),
}


@pytest.mark.parametrize("what", OWN_FLOATS)
def test_a_network_that_can_only_be_run_in_float32_is_run_in_float32(what):
    model = Call(OWN_FLOATS[what], cell=torch.nn.Linear(4, 5), out=torch.nn.Linear(5, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in model(x).flatten()]
    J = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    assert relative_error(ntkgen.ntk(model, x), J @ J.T) < TOLERANCES["float32"]
    assert prepare(model, x, policy("float32")).fallback == ()


# algebra --------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_is_symmetric_to_the_last_bit_and_positive_semidefinite(name, precision):
    case = CASES[name]()
    K = ntkgen.ntk(case.module, case.x, precision=precision)
    assert torch.equal(K, K.T)
    eigenvalues = torch.linalg.eigvalsh(K.double())
    assert eigenvalues[0] >= -10 * TOLERANCES[precision] * eigenvalues[-1].abs()


@every_case
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


@every_case
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


@every_case
def test_does_not_depend_on_how_the_work_is_cut(name, monkeypatch):
    case = CASES[name]()
    whole = ntkgen.ntk(case.module, case.x)
    computed = []

    def compute_factors(network, plan, x):
        computed.append(len(x))
        return original(network, plan, x)

    original = factors.compute_factors
    monkeypatch.setattr(factors, "compute_factors", compute_factors)
    monkeypatch.setattr(dense, "BLOCK_BYTES", 1)
    for batch_size, workspace in ((1, 1), (2, 300), (3, 1 << 22)):
        monkeypatch.setattr(dense, "BATCH_SIZE", batch_size)
        monkeypatch.setattr(dense, "WORKSPACE_NUMBERS", workspace)
        computed.clear()
        pieces = ntkgen.ntk(case.module, case.x)
        assert max(computed) == min(batch_size, len(case.x))
        assert torch.equal(pieces, pieces.T)
        assert (pieces - whole).abs().max() <= 1e-6 * whole.diagonal().max()


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
    "a NumPy array": ((X.numpy(),), {}, InputError, "must be a torch.Tensor, and is a ndarray"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_refused_in_one_line(what):
    args, options, error, message = WRONG[what]
    with pytest.raises(error, match=message) as raised:
        ntkgen.ntk(torch.nn.Linear(4, 2), *args, **options)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, InputError)
