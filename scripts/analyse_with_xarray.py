"""Read a stored kernel with xarray alone, and ask it some first questions; a worked example to copy from.

    uv run ntkgen compute --models lenet --dataset digits --subsample 500 --dtype float32
    uv run python scripts/analyse_with_xarray.py runs/lenet-digits-seed0-n500.zarr

A store of the layout `full` is an ordinary Zarr group and needs no ntkgen. Of a store of one triangle xarray sees NaN
below the diagonal: `ntkgen mirror PATH` writes it, or begin with `ntkgen.open(PATH).xarray`, which mirrors as it reads.

Everything is lazy until `.compute()`; with `dask.distributed.Client()` before, a cluster does it.
"""

import argparse
import sys

import dask.array as da
import numpy as np
import xarray


def read(path: str) -> tuple[xarray.Dataset, xarray.DataArray]:
    """Open a store, take its most precise kernel, and make its coordinates selectable."""
    data = xarray.open_zarr(path)
    kernel = data[max((name for name in data if str(name).startswith("ntk_")), key=lambda name: int(str(name)[9:]))]
    if data.attrs["ntkgen"]["layout"] != "full":
        sys.exit(f"{path} holds one triangle, the other reads as NaN. Run `ntkgen mirror {path}` first.")
    for coordinate in ("row_label", "row_output", "col_label", "col_output"):
        kernel = kernel.set_xindex(coordinate)
    return data, kernel


def one_output(kernel: xarray.DataArray, output: int) -> xarray.DataArray:
    """Take the n × n kernel of one output; a dimension takes one selection at a time."""
    return kernel.sel(row_output=output, col_output=output)


def class_means(kernel: xarray.DataArray) -> xarray.DataArray:
    """Average over pairs of classes: are samples of one class more alike than others?"""
    return kernel.groupby("row_label").mean().groupby("col_label").mean()


def power_iteration(kernel: xarray.DataArray, steps: int) -> float:
    """Find the largest eigenvalue by products with the whole matrix, which is never held in memory."""
    matrix = kernel.data.astype("float64")
    vector = np.random.default_rng(0).normal(size=kernel.sizes["row"])
    for _ in range(steps):
        vector = (matrix @ (vector / np.linalg.norm(vector))).compute()
    return float(np.linalg.norm(vector))


def alignment(kernel: xarray.DataArray) -> float:
    """Compare with the labels, ⟨K, y yᵀ⟩ / (‖K‖ ‖y‖²) for y = 1 in the row of a sample's label, else 0."""
    matrix = kernel.data.astype("float64")
    is_label = (kernel.row_label == kernel.row_output).values
    y = da.from_array(is_label.astype("float64"), chunks=matrix.chunks[0])
    return float((y @ matrix @ y / (da.sqrt((matrix**2).sum()) * (y @ y))).compute())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("path", help="A store of the layout `full`.")
    parser.add_argument("--steps", type=int, default=20, help="Of power iteration; each reads the matrix once.")
    arguments = parser.parse_args()
    data, kernel = read(arguments.path)
    print(data.attrs["title"])
    print("trace", float(data.diagonal.sum()))
    print("largest eigenvalue", power_iteration(kernel, arguments.steps))
    print("alignment with the labels", alignment(kernel))
    first = one_output(kernel, 0)
    print("mean of label 0 with itself, of output 0:", float(first.sel(row_label=0, col_label=0).mean()))
    print("means over pairs of classes, of output 0:")
    print(np.array2string(class_means(first).compute().values, precision=3, suppress_small=True))


if __name__ == "__main__":
    main()
