"""`ntkgen.compute`: any module, its samples, and a finished store."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from cases import chosen, files_of, in_turn, relative_error, small_network
from torch import nn

import ntkgen
from ntkgen.errors import BudgetError, FingerprintError, InputError, ShapeError
from ntkgen.jacobian.outputs import output_map
from ntkgen.plan.spec import KernelSpec
from ntkgen.store.rounding import Underflow

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


def samples(count, seed=1):
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def blocks_of(x1, x2=None, m=3):
    kernel = ntkgen.reference_ntk(small_network(), x1, x2).numpy()
    return kernel.reshape(len(x1), m, -1, m)


def test_every_option_is_a_keyword_with_the_default_of_the_specification():
    options = inspect.signature(ntkgen.compute).parameters
    for field in dataclasses.fields(KernelSpec):
        default = None if field.name == "precision" else field.default  # the precision depends on the network
        assert (options[field.name].kind, options[field.name].default) == (KEYWORD_ONLY, default)


def test_options_reach_the_specification_under_their_names(tmp_path, monkeypatch):
    asked = {
        "output": "sum", "precision": "float64", "dtypes": ("float64",), "layout": "upper", "tile_side": 9,
        "memory_bytes": 1 << 30, "replan": True, "certify": False, "per_layer": {"all": "*"},
    }  # fmt: skip
    made = []
    monkeypatch.setattr("ntkgen.engine.compute.make", lambda folder, kernel, *_: made.append((folder, kernel)))
    ntkgen.compute(small_network(), samples(2), store=tmp_path / "k.zarr", fsync=False, **asked)
    ((folder, kernel),) = made
    assert dataclasses.asdict(kernel.spec) == {**asked, "per_layer": (("all", ("*",)),)}
    assert folder.fsync is False


def test_the_store_holds_the_kernel_and_its_labels(tmp_path):
    x = samples(7)
    store = ntkgen.compute(small_network(), x, store=tmp_path / "k.zarr", labels=torch.arange(7), tile_side=9)
    assert store.is_complete
    assert store.grid.num_tiles == 6
    assert relative_error(store.array, blocks_of(x).reshape(21, 21)) < 1e-5
    assert store.read("row_label").tolist() == [label for label in range(7) for _ in range(3)]


@in_turn(
    "output layout",
    chosen(["sum", "centered", "index:2", "trace", "diagonal"], ["centered", "diagonal"]),
    ["upper", "full"],
)
def test_output_maps_are_stored(tmp_path, output, layout):
    x, m = samples(5), 3
    store = ntkgen.compute(
        small_network(), x, store=tmp_path / "k.zarr", output=output, dtypes=("float64",), precision="float64",
        layout=layout, tile_side=2 * len(output_rows(output)),
    )  # fmt: skip
    blocks, chosen = blocks_of(x), output_map(output, m)
    if output == "diagonal":
        found = np.stack([store.kernel(output=plane)[:, :] for plane in range(m)])
        assert relative_error(found, np.einsum("iojo->oij", blocks)) < 1e-10
        assert relative_error(store.dask.compute(), found) == 0
        assert store.xarray.dims == ("output", "row", "col")
        assert relative_error(store.read("diagonal"), np.einsum("ioio->oi", blocks)) < 1e-10
        return
    if output == "trace":
        expected = np.einsum("iojo->ij", blocks)
    else:
        matrix = chosen.matrix.numpy()
        expected = np.einsum("ao,iojp,bp->iajb", matrix, blocks, matrix).reshape(5 * len(matrix), -1)
    assert relative_error(store.array, expected) < 1e-10
    assert relative_error(store.read("diagonal"), np.diagonal(expected)) < 1e-10
    assert store.read("logits").shape == (5, m)  # of the network itself


def output_rows(output):
    return range({"centered": 2}.get(output, 1))


@pytest.mark.slow
def test_the_matrices_of_a_diagonal_store_are_asked_for_one_by_one(tmp_path):
    store = ntkgen.compute(small_network(), samples(3), store=tmp_path / "k.zarr", output="diagonal")
    with pytest.raises(InputError, match="`output` from 0 to 2"):
        store.kernel()
    with pytest.raises(InputError, match="`output` from 0 to 2"):
        store.kernel(output=3)
    whole = ntkgen.compute(small_network(), samples(3), store=tmp_path / "full.zarr")
    with pytest.raises(InputError, match="no `output`"):
        whole.kernel(output=0)


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (2, 9), (4, 1)])
def test_rectangular_kernels_are_stored_whole(tmp_path, rows, columns):
    x, other = samples(rows), samples(columns, seed=2)
    store = ntkgen.compute(small_network(), x, other, store=tmp_path / "k.zarr", tile_side=6)
    blocks = blocks_of(x, other)
    assert store.manifest.layout == "full"
    assert store.array.shape == (3 * rows, 3 * columns)
    assert relative_error(store.array, blocks.reshape(3 * rows, -1)) < 1e-5
    assert relative_error(store.xarray.values, blocks.reshape(3 * rows, -1)) < 1e-5
    own = np.diagonal(ntkgen.reference_ntk(small_network(), other).numpy())
    assert relative_error(store.read("col_diagonal"), own) < 1e-5
    assert store.read("col_logits").shape == (columns, 3)
    found = store.kernel("float16")[:, :]
    bound = np.sqrt(store.read("diagonal").max() * own.max())
    assert np.abs(found).max() <= bound * 1.01
    assert relative_error(found, blocks.reshape(3 * rows, -1)) < 1e-3


@pytest.mark.slow
@in_turn("output against", ["full", "diagonal"], [None, samples(4, seed=2)])
def test_an_interrupted_store_goes_on_to_equal_bytes(tmp_path, output, against):
    settings = {"output": output, "tile_side": 6 if output == "full" else 2}
    whole = ntkgen.compute(small_network(), samples(5), against, store=tmp_path / "whole.zarr", **settings)

    class StopError(Exception):
        pass

    def stop_at(stage, done, total):
        if stage == "tiles" and done == 2:
            raise StopError

    with pytest.raises(StopError):
        ntkgen.compute(small_network(), samples(5), against, store=tmp_path / "cut.zarr", report=stop_at, **settings)
    assert 0 < len(ntkgen.open(tmp_path / "cut.zarr").missing_tiles()) < whole.grid.num_tiles
    ntkgen.compute(small_network(), samples(5), against, store=tmp_path / "cut.zarr", **settings)
    assert files_of(tmp_path / "cut.zarr") == files_of(tmp_path / "whole.zarr")


def test_another_network_or_other_samples_are_refused(tmp_path):
    ntkgen.compute(small_network(), samples(4), store=tmp_path / "k.zarr")
    before = files_of(tmp_path / "k.zarr")
    other = small_network()
    nn.init.zeros_(other[0].weight)
    for model, x, settings in [
        (other, samples(4), {}),
        (small_network(), samples(4, seed=3), {}),
        (small_network(), samples(4), {"output": "sum"}),
    ]:
        with pytest.raises(FingerprintError):
            ntkgen.compute(model, x, store=tmp_path / "k.zarr", **settings)
    assert files_of(tmp_path / "k.zarr") == before


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"inputs": samples(0)}, InputError),
        ({"against": torch.ones(2, 1, 5, 5)}, ShapeError),
        ({"labels": torch.arange(3)}, ShapeError),
        ({"output": "product"}, InputError),
        ({"outputs": "sum"}, TypeError),
        ({"memory_bytes": 1000}, BudgetError),
        ({"against": samples(2), "layout": "upper"}, InputError),
        ({"precision": "tf32"}, InputError),
    ],
    ids=["no samples", "other shape", "labels", "output map", "misspelt option", "memory", "layout", "precision"],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, change, error):
    arguments = {"inputs": samples(4), "store": tmp_path / "k.zarr", **change}
    with pytest.raises(error) as refused:
        ntkgen.compute(small_network(), **arguments)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "k.zarr").exists()


def test_float16_underflow_is_counted_per_tile(tmp_path):
    """Samples of very different sizes: one diagonal entry is subnormal, one vanishes."""
    model = nn.Linear(4, 1, bias=False)
    x = torch.tensor([[1.0, 0, 0, 0], [1e-5, 1e-5, 0, 0], [0, 0, 1e-7, 0]])
    store = ntkgen.compute(model, x, store=tmp_path / "k.zarr", tile_side=1)
    counts = store.read("underflow_float16")
    kernel = (x @ x.T).double().numpy() / store.scale_factor("ntk_float16")
    for i in range(3):
        for j in range(i, 3):
            entry = abs(kernel[i, j])
            assert counts[i, j].tolist() == [int(0 < entry < 2**-14), int(entry > 0 and np.float16(entry) == 0)]
    assert store.float16_underflow == Underflow(with_fewer_bits=2, vanished=1)
