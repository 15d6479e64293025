"""Measure the errors of each precision in small eigenvalues and log-determinants, compared with float64.

    uv run python scripts/bench/precision.py [--json] [--cases mlp lenet] [--eta lenet resnet9 vgg11]

Two kernels are computed with every precision of the device. The first is that of a wide MLP (GELU, 2 × 512) after long
training on the first two principal components of the digits. It is ill-conditioned. The second is that of a LeNet,
trained on the digits to 99.5 %. The script prints for each precision:

- the relative Frobenius error and the largest relative error of an eigenvalue, compared with float64,
- the number of negative eigenvalues,
- the log-determinant per row in nats, and its difference from float64,
- the time in seconds.

It also prints the flips: the number of signs of ReLU inputs and of maxima of pooling windows that differ between passes
in float32 and in float64. They depend on the processor. Finally it prints η = ‖J̃ − J‖₂ / ‖J‖₂ of untrained networks,
where J̃ is the Jacobian in float32. The relative error of an eigenvalue λ with `float64-accumulate` is about
2 η √(λ_max / λ).
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

import ntkgen
from ntkgen.cli.options import Command, ManyOption
from ntkgen.cli.session import start_process
from ntkgen.data import dataset as data
from ntkgen.errors import InputError
from ntkgen.jacobian.evaluation import evaluation_copy
from ntkgen.jacobian.precision import POLICIES, check_device
from ntkgen.jacobian.reference import jacobian_rows, trainable
from ntkgen.training import fit as training
from ntkgen.training import zoo
from ntkgen.training.recipe import LEARNING_RATE, Recipe

NUM_SAMPLES = 200
TRIALS = 3
MLP_STEPS = 3000
ETA_SAMPLES = 4


def mlp() -> tuple[nn.Module, Tensor]:
    """Train a wide MLP for many steps by full-batch Adam on two principal components of the digits."""
    digits = data.load("digits")
    images = digits.raw(torch.arange(NUM_SAMPLES)).flatten(1).double()
    x = 10 * torch.linalg.svd(images - images.mean(0), full_matrices=False)[0][:, :2].float()
    labels = digits.labels[:NUM_SAMPLES]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(MLP_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model, x


def lenet() -> tuple[nn.Module, Tensor]:
    """Train a LeNet on the digits to 99.5 %, as the command line does."""
    import tempfile
    from pathlib import Path

    digits = data.load("digits")
    model = zoo.build("lenet", 10, seed=0)
    rate = LEARNING_RATE[training.has_batch_norm(model)]
    recipe = Recipe(
        model="lenet",
        dataset="digits",
        data_fingerprint=digits.fingerprint(),
        seed=0,
        width=None,
        learning_rate=rate,
    )
    with tempfile.TemporaryDirectory() as folder:
        training.train(model, digits, recipe, Path(folder) / "lenet.pt", target_accuracy=99.5)
    return model, digits.inputs(torch.arange(NUM_SAMPLES))


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"mlp": mlp, "lenet": lenet}


def num_flips(model: nn.Module, x: Tensor) -> int:
    """Count the signs of ReLU inputs and the positions of maxima that differ between float32 and float64."""
    single, double = (
        _decisions(evaluation_copy(model, dtype), x.to(dtype)) for dtype in (torch.float32, torch.float64)
    )
    return sum(int((one != other).sum()) for one, other in zip(single, double, strict=True))


@torch.no_grad()
def _decisions(model: nn.Module, x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def decided(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.ReLU):
            found.append(args[0] > 0)
        if isinstance(module, nn.MaxPool2d):
            largest, places = nn.functional.max_pool2d(args[0], module.kernel_size, module.stride, return_indices=True)
            found.append(torch.where(largest > 0, places, 0))  # a ReLU blocks the gradient of zeros

    for module in model.modules():
        module.register_forward_pre_hook(decided)
    model(x)
    return found


def compare(case: str) -> list[dict[str, Any]]:
    """Compute the kernel of a case with every precision, and compare its spectrum with that of float64."""
    model, x = CASES[case]()
    flips = num_flips(model, x)
    exact = np.linalg.eigvalsh(ntkgen.ntk(model, x, precision="float64").numpy())
    reference = ntkgen.ntk(model, x, precision="float64").numpy()
    rows = []
    for name, policy in POLICIES.items():
        try:
            check_device(policy, torch.device("cpu"))
        except InputError:
            continue
        seconds = []
        for _ in range(TRIALS):
            start = time.perf_counter()
            kernel = ntkgen.ntk(model, x, precision=name)
            seconds.append(time.perf_counter() - start)
        rows.append(
            {"case": case, "precision": name, "rows": len(exact), "condition": exact[-1] / exact[0], "flips": flips}
            | differences(kernel.double().numpy(), reference, exact)
            | {"seconds": statistics.median(seconds), "seconds_all": seconds}
        )
    stored = reference.astype(np.float32).astype(np.float64)
    rows.append(
        {"case": case, "precision": "float64, stored as float32", "rows": len(exact), "condition": exact[-1] / exact[0]}
        | {"flips": flips}
        | differences(stored, reference, exact)
    )
    return rows


def differences(
    kernel: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Compare a kernel and its spectrum with the reference and its spectrum."""
    found = np.linalg.eigvalsh(kernel)
    logdets = [float(np.log(np.abs(values)).mean()) for values in (found, exact)]
    return {
        "relative_error": float(np.linalg.norm(kernel - reference) / np.linalg.norm(reference)),
        "largest_eigenvalue_error": float(np.abs(found / exact - 1).max()),
        "negative_eigenvalues": int((found < 0).sum()),
        "logdet_per_row": logdets[0],
        "logdet_difference_per_row": logdets[0] - logdets[1],
    }


def eta(name: str) -> dict[str, Any]:
    """Measure η = ‖J̃ − J‖₂ / ‖J‖₂ of an untrained network, with one parameter tensor at a time."""
    x = torch.randn(ETA_SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = zoo.build(name, 10, seed=0)
    single, double = (evaluation_copy(model, dtype) for dtype in (torch.float32, torch.float64))
    error = whole = torch.zeros(())
    for param in trainable(double):
        rows = [
            jacobian_rows(module, {param: trainable(module)[param]}, x.to(dtype)).flatten(0, 1).double()
            for module, dtype in ((single, torch.float32), (double, torch.float64))
        ]
        error = error + (rows[0] - rows[1]) @ (rows[0] - rows[1]).T
        whole = whole + rows[1] @ rows[1].T
    norms = [float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()) for gram in (error, whole)]
    return {"model": name, "samples": ETA_SAMPLES, "eta": norms[0] / norms[1]}


@click.command(cls=Command)
@click.option("--cases", cls=ManyOption, default=tuple(CASES), type=click.Choice(list(CASES)), help="Kernels.")
@click.option("--eta", "networks", cls=ManyOption, default=("lenet", "resnet9", "vgg11"), help="Networks for η.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def main(cases: tuple[str, ...], networks: tuple[str, ...], *, as_json: bool) -> None:
    """Print a table per case, and η per network."""
    for case in cases:
        rows = compare(case)
        if as_json:
            print("\n".join(json.dumps(row) for row in rows), flush=True)
            continue
        print(f"\n{case}: {rows[0]['rows']} rows, condition {rows[0]['condition']:.1e}, {rows[0]['flips']} flips\n")
        print("| precision | relative error | largest eigenvalue error | negative | log-det per row | difference | s |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['precision']} | {row['relative_error']:.1e} | {row['largest_eigenvalue_error']:.1e} | "
                f"{row['negative_eigenvalues']} | {row['logdet_per_row']:.6f} | "
                f"{row['logdet_difference_per_row']:+.1e} | {row.get('seconds', float('nan')):.2f} |",
                flush=True,
            )
    for name in networks:
        found = eta(name)
        print(
            json.dumps(found) if as_json else f"η of {name}, {found['samples']} samples: {found['eta']:.1e}", flush=True
        )


if __name__ == "__main__":
    start_process()
    main()
