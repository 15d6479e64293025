"""Compare sampled blocks of finished stores with the dense float64 reference, and print the relative errors.

    uv run python scripts/compare_with_reference.py runs/*.zarr --data-dir DIR

For each store, the script loads the network from its checkpoint and draws pairs of small blocks of samples at random.
The first pair is on the diagonal. Every stored dtype is compared with `ntkgen.reference_ntk` in the Frobenius norm. If
the kernel has an output map, the map is applied to the reference too.
"""

import json
from pathlib import Path

import click
import numpy as np

import ntkgen
from ntkgen.blocks import Block
from ntkgen.checks.pairs import kernels_of, mapped_kernel
from ntkgen.jacobian.outputs import output_map
from ntkgen.origin import Origin, load_origin
from ntkgen.store.store import KernelStore


def exact_block(store: KernelStore, origin: Origin, rows: Block, cols: Block) -> np.ndarray:
    """Compute a block of the exact kernel, of shape (matrices, rows, columns)."""
    num_logits = store.manifest.plan.profile.num_logits
    columns = origin.inputs.x if origin.inputs.against is None else origin.inputs.against
    x1, x2 = origin.inputs.x[rows.start : rows.stop], columns[cols.start : cols.stop]
    chosen = output_map(store.manifest.identity.get("output", "full"), num_logits)
    return mapped_kernel(ntkgen.reference_ntk(origin.model, x1, x2).numpy(), chosen, num_logits)


@click.command()
@click.argument("stores", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of the data sets.")
@click.option("--dataset", help="New path of the store's data set, such as PATH.npz.")
@click.option("--pairs", default=4, show_default=True, help="Number of pairs of blocks per store.")
@click.option("--samples", default=3, show_default=True, help="Number of samples per block.")
@click.option("--seed", default=0, show_default=True, help="Seed of the blocks.")
def main(
    stores: tuple[Path, ...], data_dir: Path | None, dataset: str | None, pairs: int, samples: int, seed: int
) -> None:
    """Print one JSON object per store and dtype."""
    for path in stores:
        store = ntkgen.open(path)
        origin = load_origin(store, data_dir, dataset)
        grid = store.grid
        counts = (grid.num_samples, grid.num_cols // grid.num_outputs)
        starts = np.random.default_rng(seed).integers(0, [max(1, n - samples + 1) for n in counts], (pairs, 2))
        starts[0] = starts[0].min()
        errors: dict[str, list[float]] = {dtype: [] for dtype in store.manifest.dtypes}
        for i, j in starts.tolist():
            rows, cols = Block(i, min(i + samples, counts[0])), Block(j, min(j + samples, counts[1]))
            exact = exact_block(store, origin, rows, cols)
            for dtype, found in errors.items():
                region = rows.rows(grid.num_outputs), cols.rows(grid.num_outputs)
                stored = np.stack([kernel[region] for kernel in kernels_of(store, dtype)]).astype(np.float64)
                found.append(float(np.linalg.norm(stored - exact) / np.linalg.norm(exact)))
        for dtype, found in errors.items():
            print(
                json.dumps({"store": str(path), "dtype": dtype, "pairs": pairs, "largest_relative_error": max(found)})
            )


if __name__ == "__main__":
    main()
