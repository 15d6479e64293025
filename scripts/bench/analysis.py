"""Time `ntkgen analyze` for a kernel that does not fit in memory, and compare its results with known values.

    uv run python scripts/bench/analysis.py [--rows 20000] [--memory 1GB] [--trials 3] [--json]

The kernel is H diag(λ) H with a reflection H = I − 2vvᵀ, so that all its eigenvalues are known. They are
λᵢ = 100 i^−0.4, with larger values for the first five, as in kernels of networks. The kernel is written as float32 to a
raw file and imported. Each question runs as a command in its own process, within the memory limit. The speed of large
float64 products of NumPy is measured between the trials. ``--json`` prints one object per question with question, rows,
seconds (all trials), peak_bytes and error (relative error of the result). It also has passes, or for the
log-determinant gflops, product_gflops and ratio.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ntkgen.cli.options import Bytes
from ntkgen.store.foreign import SourceDescription
from ntkgen.store.importing import import_kernel
from ntkgen.store.store import KernelStore

FloatArray = npt.NDArray[np.float64]

OUTPUTS, TOP = 10, 50
PRODUCT_SIDE, PRODUCTS = 4096, 3
QUESTIONS: dict[str, list[str]] = {
    "spectrum": ["--top", str(TOP)],
    "density": [],
    "logdet": [],
}
SETTING = "import sys; from ntkgen import cli; sys.exit(cli.run(sys.argv[1:]))"


def eigenvalues(num_rows: int) -> FloatArray:
    """Return eigenvalues in descending order, with a decay like that of kernels of networks."""
    values = 100 * np.arange(1, num_rows + 1) ** -0.4
    values[:5] *= [3000, 200, 50, 20, 5]
    return np.sort(values)[::-1]


def fill(folder: Path, values: FloatArray, *, tile_side: int | None = None) -> KernelStore:
    """Store H diag(λ) H as float32, in blocks of rows: K_ij = d_i δ_ij − 2 (w_i v_j + v_i w_j) + 4 (v·w) v_i v_j."""
    rng, rows = np.random.default_rng(0), len(values)
    d, v = rng.permutation(values), rng.normal(size=rows)
    v /= np.linalg.norm(v)
    w = d * v
    left, right = np.stack([v, w], 1), np.stack([4 * float(v @ w) * v - 2 * w, -2 * v])
    raw = folder / "ntk_float32.bin"
    file = np.memmap(raw, np.float32, "w+", shape=(rows, rows))
    for at in range(0, rows, 1000):
        part = slice(at, min(at + 1000, rows))
        K = left[part] @ right
        K[np.arange(len(K)), np.arange(rows)[part]] += d[part]
        file[part] = K
    file.flush()
    del file
    store = import_kernel(raw, folder / "k.zarr", SourceDescription(rows // OUTPUTS, OUTPUTS, tile_side=tile_side))
    raw.unlink()
    return store


def product_gflops() -> float:
    """Measure the speed of large float64 products of NumPy in a new process, as for the commands."""
    code = (
        "import time, numpy as np\n"
        f"A = np.random.default_rng(0).normal(size=({PRODUCT_SIDE},) * 2); A @ A\n"
        f"for _ in range({PRODUCTS}):\n"
        "    start = time.perf_counter(); A @ A; print(time.perf_counter() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return 2 * PRODUCT_SIDE**3 / min(map(float, done.stdout.split())) / 1e9


def ask(store: KernelStore, question: str, memory: int) -> dict[str, Any]:
    """Run the command of a question in a new process, without saved results."""
    for file in Path(f"{store.name}.analysis").glob("*.json"):
        file.unlink()
    command = ["analyze", question, store.name, *QUESTIONS[question], "--memory", str(memory), "--json"]
    done = subprocess.run([sys.executable, "-c", SETTING, *command], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def error_of(result: dict[str, Any], question: str, values: FloatArray) -> float:
    """Return the largest relative error of the numbers in a result."""
    if question == "spectrum":
        known = np.array([*values[:TOP], values.sum(), np.linalg.norm(values)])
        found = np.array([*result["eigenvalues"], result["trace"], result["frobenius_norm"]])
        return float(np.abs(found / known - 1).max())
    if question == "logdet":
        return abs(float(result["logdet"]) / float(np.log(values).sum()) - 1)
    places, width = np.log10(values), result["bandwidth"]
    away = (np.array(result["log10_eigenvalues"])[:, None] - places) / width
    known = np.exp(-(away**2) / 2).mean(1) / (width * np.sqrt(2 * np.pi))
    return float(np.abs(np.array(result["density"]) - known).max() / known.max())


def measured(store: KernelStore, question: str, values: FloatArray, memory: int, trials: int) -> dict[str, Any]:
    """Run the command of a question several times and summarise its results."""
    products, results = [product_gflops()], []
    for _ in range(trials):
        results.append(ask(store, question, memory))
        products.append(product_gflops())
    found = {
        "question": question,
        "rows": len(values),
        "seconds": [result["seconds"] for result in results],
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "error": max(error_of(result, question, values) for result in results),
    }
    if question == "logdet":
        speed = statistics.median(result["gflops"] for result in results)
        product = statistics.median(products)
        return found | {"gflops": speed, "product_gflops": product, "ratio": speed / product}
    return found | {"passes": max(result["passes"] for result in results)}


def line(found: dict[str, Any]) -> str:
    """Format a result as one line of text."""
    seconds = found["seconds"]
    words = f"{found['question']:>9}  {statistics.median(seconds):7.1f} s ({min(seconds):.1f}–{max(seconds):.1f})"
    words += f"  peak {found['peak_bytes'] / 1e6:5,.0f} MB  error {found['error']:.1e}"
    if "gflops" in found:
        return f"{words}  {found['gflops']:.1f} GFLOP/s of {found['product_gflops']:.1f}, {found['ratio']:.2f}"
    return f"{words}  {found['passes']:g} passes"


@click.command()
@click.option("--rows", type=click.IntRange(min=2 * TOP), default=20_000, show_default=True, help="Rows of the kernel.")
@click.option("--memory", type=Bytes(), default="1GB", show_default=True, help="Memory limit of each command.")
@click.option("--trials", type=click.IntRange(min=1), default=3, show_default=True, help="Number of trials.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per question.")
def main(*, rows: int, memory: int, trials: int, as_json: bool) -> None:
    """Time the analysis of a kernel that does not fit in memory."""
    rows -= rows % OUTPUTS
    values = eigenvalues(rows)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        store = fill(Path(folder), values)
        click.echo(f"{rows:,} rows of float32, written in {time.monotonic() - started:.0f} s", err=True)
        for question in QUESTIONS:
            found = measured(store, question, values, memory, trials)
            click.echo(json.dumps(found) if as_json else line(found))


if __name__ == "__main__":
    main()
