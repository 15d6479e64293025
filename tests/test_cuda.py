"""On a CUDA device: the CPU reference's kernels, equal bytes after an interruption, mixed-precision training."""

import json

import numpy as np
import pytest
import torch
from cases import CASES, TOLERANCES, reference_of, relative_error
from torch import nn

import ntkgen
from ntkgen import cli, pipeline
from ntkgen.kernel import engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_equals_the_reference(name, precision):
    case = CASES[name]()
    kernel = ntkgen.ntk(case.module.to("cuda"), case.x.to("cuda"), precision=precision)
    assert kernel.device.type == "cuda"
    assert relative_error(kernel.cpu(), reference_of(name)) <= TOLERANCES[precision]
    assert torch.equal(kernel, kernel.T)


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
    budget = engine.memory_budget(torch.device("cuda"), None)
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0.3 * total < budget.planned_bytes < 0.5 * total
