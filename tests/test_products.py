"""Products by every route and in every policy: rounded where it says so, exact elsewhere, and the process untouched."""

import pytest
import torch
from cases import CPU, chosen, relative_error

from ntkgen.jacobian import products
from ntkgen.jacobian.precision import POLICIES, exact_arithmetic, policy
from ntkgen.jacobian.products import LARGE_MACS, Products, matmul_nt, routes, rows_of

ROUTES = routes(CPU)
every_route = pytest.mark.parametrize("route", ROUTES)
CPU_POLICIES = [name for name in POLICIES if name != "tf32"]
every_policy = pytest.mark.parametrize("precision", CPU_POLICIES)
# One rounding of each operand, and in sums of 200 terms; of bfloat16, both operands lose all but 8 bits.
PRODUCT_TOLERANCES = {"float64": 1e-15, "float64-accumulate": 1e-15, "float32": 1e-6}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.numeric
def test_the_plain_route_is_there_and_comes_first():
    assert ROUTES[0] == "mm"
    assert set(ROUTES) <= {"mm", "onednn"}


@pytest.mark.numeric
def test_a_torch_without_onednn_has_the_plain_route(monkeypatch):
    def missing(*_):
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(products, "_onednn", missing)
    assert routes(CPU) == ("mm",)


@pytest.mark.numeric
def test_a_route_that_gives_other_numbers_is_not_taken(monkeypatch):
    monkeypatch.setattr(products, "_onednn", lambda a, b: a @ b.mT + 1)
    assert routes(CPU) == ("mm",)


@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (40, 1, 30), (64, 200, 64), (0, 3, 2)])
@pytest.mark.numeric
def test_every_route_multiplies_with_the_transpose(route, dtype, shape):
    rows, k, columns = shape
    a, b = normal(rows, k, dtype=dtype), normal(columns, k, seed=1, dtype=dtype)
    with exact_arithmetic(CPU):
        found = matmul_nt(a, b, route)
    assert found.dtype == dtype
    assert relative_error(found, a.double() @ b.double().mT) < (1e-6 if dtype == torch.float32 else 1e-15)


@every_route
@pytest.mark.numeric
def test_operands_need_not_be_contiguous(route):
    a, b = normal(30, 40, dtype=torch.float32).mT, normal(50, 60, dtype=torch.float32)[::2, 5:35]
    with exact_arithmetic(CPU):
        assert relative_error(matmul_nt(a, b, route), a.double() @ b.double().mT) < 1e-6


@every_route
@every_policy
@pytest.mark.numeric
def test_products_are_rounded_as_the_policy_says(route, precision):
    chosen = policy(precision)
    work = Products(chosen, route)
    a, b = normal(30, 200, dtype=chosen.factor_dtype), normal(20, 200, seed=1, dtype=chosen.factor_dtype)
    expected = a.double() @ b.double().mT
    with exact_arithmetic(CPU):
        found = work.rounded(work.operand(a), work.operand(b))
        exact = work.exact(work.wide(a), work.wide(b))
    assert found.dtype == exact.dtype == work.wide(a).dtype == chosen.accumulate_dtype
    assert relative_error(found, expected) < PRODUCT_TOLERANCES.get(precision, 1e-6)  # of bfloat16 operands: exact
    assert relative_error(exact, expected) < PRODUCT_TOLERANCES.get(precision, 1e-6)


@every_route
@pytest.mark.numeric
def test_a_bfloat16_operand_is_rounded_once_and_an_exact_one_never(route):
    work = Products(policy("bfloat16"), route)
    a, b = normal(30, 200, dtype=torch.float32), normal(20, 200, seed=1, dtype=torch.float32)
    expected = a.double() @ b.double().mT
    with exact_arithmetic(CPU):
        rounded = relative_error(work.rounded(work.operand(a), work.operand(b)), expected)
        exact = relative_error(work.exact(a, b), expected)
    assert 1e-4 < rounded < 2**-8
    assert exact < 1e-6


@pytest.mark.numeric
def test_what_is_wide_keeps_every_bit_of_float32():
    work = Products(policy("float64-accumulate"), "mm")
    a = torch.tensor([[1.0, 2.0**-23, 2.0**-40]])
    assert work.wide(a).dtype == work.operand(a).dtype == torch.float64
    assert work.rounded(work.operand(a), work.operand(a)).item() == 1 + 2.0**-46 + 2.0**-80


# rows -----------------------------------------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 4, 5, 6), (1, 1, 1, 1, 1), (2, 3, 1, 9, 1)])
@pytest.mark.parametrize("large", [LARGE_MACS, 1], ids=["small", "large"])
@pytest.mark.numeric
def test_rows_are_the_sums_of_outer_products(route, dtype, shape, large, monkeypatch):
    """Whether a sample's rows are made one by one or all at once."""
    monkeypatch.setattr(products, "LARGE_MACS", large)
    samples, groups, channels, k, positions = shape
    g, a = normal(samples, groups, channels, positions, dtype=dtype), normal(samples, groups, k, positions, dtype=dtype)
    with exact_arithmetic(CPU):
        rows = rows_of(g, a, route)
    assert rows.dtype == dtype
    expected = torch.einsum("sgct,sgkt->sgck", g.double(), a.double())
    assert relative_error(rows.double(), expected) < {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, 1e-2)


@every_route
@pytest.mark.parametrize("rows", chosen([1, 10, 64], [10]))
@pytest.mark.numeric
def test_long_sums_of_squares_keep_their_digits(route, rows):
    """A library adds half a million squares one after the other where there are few results, and loses two digits."""
    a = normal(rows, 1 << 19, dtype=torch.float32)
    product = matmul_nt(a, a.clone(), route)
    assert relative_error(product, a.double() @ a.double().mT) < 1e-6
