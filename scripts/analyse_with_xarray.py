"""Read a stored kernel with xarray alone, and compute some first results: an example to copy from.

    uv run ntkgen compute --models lenet --dataset digits --subsample 500 --dtype float32
    uv run python scripts/analyse_with_xarray.py runs/lenet-digits-seed0-n500.zarr

A store of the layout `full` is an ordinary Zarr group. Reading it does not need ntkgen. In a store with one triangle,
xarray reads NaN below the diagonal. `ntkgen mirror PATH` writes the missing triangle. Without it, use
`ntkgen.open(PATH).xarray`, which reads the full matrix from one triangle.

All operations are lazy until `.compute()`. After `dask.distributed.Client()`, they run on a dask cluster.
"""

import argparse
import sys

import dask.array as da
import numpy as np
import xarray


def read(path: str) -> tuple[xarray.Dataset, xarray.DataArray]:
    """Open a store. Return it and its most precise kernel, with indices for selection by label and output."""
    data = xarray.open_zarr(path)
    kernel = data[
        max((name for name in data if str(name).startswith("ntk_float")), key=lambda name: int(str(name)[9:]))
    ]
    if data.attrs["ntkgen"]["layout"] != "full":
        sys.exit(f"{path} has only one triangle, and the other is read as NaN. Run `ntkgen mirror {path}` first.")
    for coordinate in ("row_label", "row_output", "col_label", "col_output"):
        kernel = kernel.set_xindex(coordinate)
    return data, kernel


def one_output(kernel: xarray.DataArray, output: int) -> xarray.DataArray:
    """Select the n × n kernel of one output."""
    return kernel.sel(row_output=output, col_output=output)


def class_means(kernel: xarray.DataArray) -> xarray.DataArray:
    """Compute the mean of the kernel for each pair of classes. It is larger if samples of these classes are similar."""
    return kernel.groupby("row_label").mean().groupby("col_label").mean()


def power_iteration(kernel: xarray.DataArray, steps: int) -> float:
    """Estimate the largest eigenvalue by products with the whole matrix, which is read in parts."""
    matrix = kernel.data.astype("float64")
    vector = np.random.default_rng(0).normal(size=kernel.sizes["row"])
    for _ in range(steps):
        vector = (matrix @ (vector / np.linalg.norm(vector))).compute()
    return float(np.linalg.norm(vector))


def alignment(kernel: xarray.DataArray) -> float:
    """Compute the alignment with the labels, ⟨K, y yᵀ⟩ / (‖K‖ ‖y‖²). y is 1 in the row of a sample's label, else 0."""
    matrix = kernel.data.astype("float64")
    is_label = (kernel.row_label == kernel.row_output).values
    y = da.from_array(is_label.astype("float64"), chunks=matrix.chunks[0])
    return float((y @ matrix @ y / (da.sqrt((matrix**2).sum()) * (y @ y))).compute())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("path", help="A store of the layout `full`.")
    parser.add_argument(
        "--steps", type=int, default=20, help="Number of steps of the power iteration. Each step reads the matrix once."
    )
    arguments = parser.parse_args()
    data, kernel = read(arguments.path)
    print(data.attrs["title"])
    print("trace", float(data.diagonal.sum()))
    print("largest eigenvalue", power_iteration(kernel, arguments.steps))
    print("alignment with the labels", alignment(kernel))
    first = one_output(kernel, 0)
    print("mean over pairs of samples with label 0, for output 0:", float(first.sel(row_label=0, col_label=0).mean()))
    print("means over pairs of classes, for output 0:")
    print(np.array2string(class_means(first).compute().values, precision=3, suppress_small=True))


if __name__ == "__main__":
    main()
