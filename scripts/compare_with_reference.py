"""Compare sampled blocks of finished stores with the dense float64 reference, and print the relative errors.

    uv run python scripts/compare_with_reference.py runs/*.zarr --data-dir DIR

For each store the network is loaded from its checkpoint, pairs of small sample blocks are drawn at random (the first
one on the diagonal), and every stored dtype is compared with `ntkgen.reference_ntk` in the Frobenius norm.
"""

import json
from pathlib import Path

import click
import numpy as np
import torch

import ntkgen
from ntkgen import checkpoint, data, zoo
from ntkgen.kernel.store import KernelStore
from ntkgen.kernel.tiles import Block


def load_network(store: KernelStore) -> torch.nn.Module:
    """Build the network that a store is of, with the parameters of its checkpoint."""
    made = store.manifest.provenance
    model = zoo.build(made["model"], store.grid.num_outputs, seed=made["seed"], width=made["width"])
    checkpoint.load_state(model, checkpoint.load(store.path.parent / made["checkpoint"]))
    return model


@click.command()
@click.argument("stores", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data-dir", type=click.Path(path_type=Path))
@click.option("--dataset", help="Where the store's data set has moved to, as PATH.npz.")
@click.option("--pairs", default=4, show_default=True, help="Block pairs per store.")
@click.option("--samples", default=3, show_default=True, help="Samples of a block.")
@click.option("--seed", default=0, show_default=True)
def main(
    stores: tuple[Path, ...], data_dir: Path | None, dataset: str | None, pairs: int, samples: int, seed: int
) -> None:
    """Print one JSON object per store and dtype."""
    for path in stores:
        store = ntkgen.open(path)
        loaded = data.load(dataset or store.manifest.provenance["dataset"], data_dir=data_dir)
        x = loaded.inputs(torch.from_numpy(store.read("sample_index")))
        model, m = load_network(store), store.grid.num_outputs
        starts = np.random.default_rng(seed).integers(0, max(1, len(x) - samples + 1), (pairs, 2))
        starts[0, 1] = starts[0, 0]
        errors: dict[str, list[float]] = {dtype: [] for dtype in store.manifest.dtypes}
        for i, j in starts.tolist():
            rows, cols = Block(i, min(i + samples, len(x))), Block(j, min(j + samples, len(x)))
            exact = ntkgen.reference_ntk(model, x[rows.start : rows.stop], x[cols.start : cols.stop]).numpy()
            for dtype, found in errors.items():
                stored = store.kernel(dtype)[rows.rows(m), cols.rows(m)].astype(np.float64)
                found.append(float(np.linalg.norm(stored - exact) / np.linalg.norm(exact)))
        for dtype, found in errors.items():
            print(
                json.dumps({"store": str(path), "dtype": dtype, "pairs": pairs, "largest_relative_error": max(found)})
            )


if __name__ == "__main__":
    main()
