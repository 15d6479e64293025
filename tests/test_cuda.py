"""On a CUDA device: the CPU reference's kernels in every policy, equal bytes after an interruption, training."""

import json

import numpy as np
import pytest
import torch
from cases import CASES, TOLERANCES, reference_of, relative_error
from torch import nn

import ntkgen
from ntkgen import cli, pipeline
from ntkgen.engine.machine import memory_budget
from ntkgen.jacobian import measure
from ntkgen.jacobian.cost import ORDERS
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import POLICIES, exact_arithmetic, policy, reduced_products
from ntkgen.jacobian.products import Products, routes

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device here", allow_module_level=True)
pytestmark = pytest.mark.gpu


CUDA = torch.device("cuda")
# TF32 keeps 11 bits of every operand, bfloat16 8.
POLICY_TOLERANCES = {**TOLERANCES, "float64-accumulate": TOLERANCES["float32"], "tf32": 4e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("precision", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_every_case_equals_the_reference(name, precision):
    case = CASES[name]()
    kernel = ntkgen.ntk(case.module.to("cuda"), case.x.to("cuda"), precision=precision)
    assert kernel.device.type == "cuda"
    assert kernel.dtype == policy(precision).accumulate_dtype
    assert relative_error(kernel.cpu(), reference_of(name)) <= POLICY_TOLERANCES[precision]
    assert torch.equal(kernel, kernel.T)


@pytest.mark.parametrize("precision", POLICIES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["conv", "conv_groups", "reused_at_two_sizes", "residual_in_place", "transformer"])
def test_every_order_equals_the_reference(name, order, precision):
    case = CASES[name]()
    module, x = case.module.to("cuda"), case.x.to("cuda")
    orders = [order] * len(prepare(module, x, policy(precision)).profile.layers)
    kernel = ntkgen.ntk(module, x, precision=precision, orders=orders)
    assert relative_error(kernel.cpu(), reference_of(name)) <= POLICY_TOLERANCES[precision]
    assert torch.equal(kernel, kernel.T)


@pytest.mark.parametrize("precision", POLICIES)
def test_products_are_rounded_as_the_policy_says(precision):
    """Those of TF32 and bfloat16 are less exact than float32, and leave the switch of the process as it was."""
    chosen = policy(precision)
    work = Products(chosen, "mm")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 512, dtype=torch.float64, generator=generator) for n in (256, 128))
    expected = a @ b.T
    a, b = (side.to(CUDA, chosen.compute_dtype) for side in (a, b))
    with exact_arithmetic(CUDA):
        before = torch.backends.cuda.matmul.fp32_precision
        rounded = work.rounded(work.operand(a), work.operand(b))
        exact = work.exact(work.wide(a), work.wide(b))
        assert torch.backends.cuda.matmul.fp32_precision == before
    floor = 0 if chosen.rounding == "ieee" else 1e-5
    assert rounded.dtype == chosen.accumulate_dtype
    assert floor <= relative_error(rounded.cpu(), expected) < POLICY_TOLERANCES[precision]
    assert relative_error(exact.cpu(), expected) < 1e-6


def test_the_switch_of_reduced_products_is_as_before():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with reduced_products(CUDA, "tf32"):
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before
    with reduced_products(CUDA, "bf16"):  # its operands are rounded themselves
        assert matmul.fp32_precision == before


def test_the_rates_of_a_device_can_be_measured(monkeypatch):
    monkeypatch.setattr(measure, "TRIALS", 1)
    found = measure.measure(CUDA, policy("float32"))
    assert routes(CUDA) == (found.route,) == ("mm",)
    assert min(found.product, found.building, found.carrying, found.finishing, found.touching) > 0


def test_tf32_is_off_whatever_the_process_has_set():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 900, 10)).to("cuda")
    x = torch.randn(4, 3, 32, 32, device="cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        kernel = ntkgen.ntk(model, x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative_error(kernel.cpu(), ntkgen.reference_ntk(model, x)) <= TOLERANCES["float32"]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = np.arange(300) % 3
    images = np.random.default_rng(0).integers(0, 160, (300, 3, 32, 32)) + 40 * labels[:, None, None, None]
    np.savez("three.npz", x=images.astype(np.uint8), y=labels)

    def run_command(*args):
        code = cli.run([*args, "--dataset", "three.npz", "--device", "cuda", "--json"])
        return code, capsys.readouterr()

    return run_command


RESNET = ["compute", "--models", "resnet9", "--width", "16", "--epochs", "4", "--target-accuracy", "90", "--lr", "0.05"]
KERNEL = ["--allow-unconverged", "--subsample", "60", "--tile", "36", "--dtype", "float16", "float32", "float64"]


def test_training_in_mixed_precision_and_the_kernel_of_it(run):
    code, captured = run(*RESNET, *KERNEL)
    assert code == 0, captured.err
    result = json.loads(captured.out)
    assert result["train_accuracy"] > 60
    checkpoint = torch.load(result["checkpoint"], weights_only=True)
    assert all(value.device.type == "cpu" for value in checkpoint["state"].values())
    model = pipeline.zoo.build("resnet9", 3, seed=0, width=16)
    model.load_state_dict(checkpoint["state"])
    x = torch.from_numpy(np.load("three.npz")["x"][:60]).float() / 255
    store = ntkgen.open(result["store"])
    reference = ntkgen.reference_ntk(model, x[:5], x[50:55])
    for dtype in ("float16", "float32"):
        assert relative_error(store.kernel(dtype)[:15, 150:165], reference) <= TOLERANCES[dtype]


def test_an_interrupted_kernel_ends_with_equal_bytes(run, tmp_path, monkeypatch):
    command = ["compute", "--models", "resnet9", "--width", "16", "--epochs", "0", *KERNEL]
    assert run(*command, "--out", "straight")[0] == 0
    commit = pipeline.KernelStore.commit
    for stop in (1, 4):
        committed = []

        def interrupted(self, tile, values, committed=committed, stop=stop):
            if len(committed) == stop:
                raise KeyboardInterrupt
            committed.append(tile)
            commit(self, tile, values)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.KernelStore, "commit", interrupted)
            assert run(*command, "--out", "resumed")[0] == 130
    assert run(*command, "--out", "resumed")[0] == 0
    files = [path.relative_to(tmp_path / "straight") for path in (tmp_path / "straight").rglob("*") if path.is_file()]
    stored = [path for path in files if path.suffix != ".pt"]
    assert len(stored) > 3 * 25
    assert all((tmp_path / "straight" / f).read_bytes() == (tmp_path / "resumed" / f).read_bytes() for f in stored)


def test_the_budget_is_the_devices_memory():
    budget = memory_budget(torch.device("cuda"), None)
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0.3 * total < budget.planned_bytes < 0.5 * total
