"""Stores with the kernel of each group of parameters beside the whole kernel: `per_layer` on disk."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
import xarray
import zarr
from cases import CASES, CPU, TOLERANCES, files_of, in_turn, make_job, relative_error, small_network

import ntkgen
from ntkgen.checks.verify import find_damage, repair
from ntkgen.engine.recompute import Resources, recompute
from ntkgen.errors import FingerprintError, InputError, StoreError, UnknownNameError
from ntkgen.inputs import Inputs
from ntkgen.plan.plan import Budget
from ntkgen.plan.tiles import Tile, make_grid
from ntkgen.store.mirror import mirror, mirror_tile
from ntkgen.store.opening import open_store
from ntkgen.store.schema import Samples

GROUPS = {"matrices": "*weight", "first": ["0.*", "!*weight"]}
X = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def stored(path, model=None, x=X, *more, per_layer=GROUPS, tile_side=9, **options):
    """Store a kernel in 2 × 2 tiles, the last ones ragged."""
    model = small_network() if model is None else model
    options = {"certify": False, "fsync": False, **options}
    return ntkgen.compute(model, x, *more, store=path, per_layer=per_layer, tile_side=tile_side, **options)


# contents -------------------------------------------------------------------------------------------------------------


@pytest.mark.numeric
@in_turn("layout output", ["upper", "full", "rectangular"], ["full", "trace", "sum", "diagonal"], always=[("full",)])
def test_every_layer_has_the_kernel_that_it_has_in_memory(tmp_path, layout, output):
    rows = 3 if output == "full" else 1
    more, options = ((X[:4] + 1,), {}) if layout == "rectangular" else ((), {"layout": layout})
    exact = {"output": output, "precision": "float64"}
    store = stored(tmp_path / "k.zarr", None, X, *more, dtypes=("float64",), tile_side=3 * rows, **exact, **options)
    expected = ntkgen.ntk(small_network(), X, *more, per_layer=GROUPS, **exact)
    assert store.layers == list(expected) == ["matrices", "first", "other"]
    for layer, kernel in expected.items():
        planes = [None] if output != "diagonal" else range(3)
        found = [store.kernel(layer=layer, output=plane)[...] for plane in planes]
        assert relative_error(np.squeeze(found), kernel) <= TOLERANCES["float64"]
        assert relative_error(store.by_layer.sel(layer=layer), kernel) <= TOLERANCES["float64"]
    assert relative_error(store.by_layer.sum("layer"), store.xarray) <= TOLERANCES["float64"]
    assert relative_error(store.xarray, ntkgen.ntk(small_network(), X, *more, **exact)) <= TOLERANCES["float64"]


@pytest.mark.numeric
@in_turn("name output", ["tied_weights", "lstm", "attention_with_masks_and_biases", "own_autograd_function"],
         ["full", "trace", "sum"])  # fmt: skip
def test_the_layers_add_up_to_the_kernel(tmp_path, name, output):
    case = CASES[name]()
    store = stored(tmp_path / "k.zarr", case.module, case.x, per_layer=True, tile_side=None, output=output)
    assert set(store.layers) == {key.rpartition(".")[0] for key, _ in case.module.named_parameters()}
    expected = ntkgen.ntk(case.module, case.x, output=output, precision="float64")
    assert relative_error(store.by_layer.sum("layer"), expected) <= TOLERANCES["float32"]
    assert relative_error(store.array, expected) <= TOLERANCES["float32"]


def test_they_are_lazy_and_readable_without_this_program(tmp_path):
    store = stored(tmp_path / "k.zarr", layout="full")
    assert store.by_layer.data.chunks[0] == (1, 1, 1)
    assert store.by_layer.sel(layer="first", row_sample=2).dims == ("row", "col")
    plain = xarray.open_zarr(store.path)["ntk_by_layer_float32"]
    assert plain.dims == ("layer", "row", "col")
    assert plain.attrs["layer_names"] == store.layers
    np.testing.assert_array_equal(plain, store.by_layer)
    np.testing.assert_array_equal(store.kernel(layer="first"), plain[1])


def test_they_are_stored_in_the_most_precise_dtype_with_the_scale_of_the_kernel(tmp_path):
    store = stored(tmp_path / "k.zarr", dtypes=("float16",))
    assert store.scale_factor("ntk_by_layer_float16") == store.scale_factor("ntk_float16") != 1
    exact = ntkgen.ntk(small_network(), X, per_layer=GROUPS)
    assert relative_error(store.kernel(layer="first"), exact["first"]) <= TOLERANCES["float16"]
    both = stored(tmp_path / "both.zarr")
    assert both.array_names == ["ntk_float16", "ntk_float32", "ntk_by_layer_float32"]
    with pytest.raises(
        StoreError, match="no float16 kernel of its layers: expected one of its planned dtypes, float32"
    ):
        both.kernel("float16", layer="first")


def test_names_that_a_store_does_not_have(tmp_path):
    store, plain = stored(tmp_path / "k.zarr"), stored(tmp_path / "plain.zarr", per_layer=None)
    with pytest.raises(UnknownNameError, match="matrices"):
        store.kernel(layer="matrix")
    assert plain.layers == []
    for read in (lambda: plain.kernel(layer="first"), lambda: plain.by_layer):
        with pytest.raises(InputError, match="no kernels of layers"):
            read()
    assert "layers" not in plain.manifest.identity


def test_a_tile_of_many_matrices_is_smaller_and_its_memory_is_planned():
    assert make_grid(40_000, 1, num_groups=48).tile_samples < 1000 < make_grid(40_000, 1).tile_samples
    plan = make_job().plan
    grids = [make_grid(11, 3, 9, num_groups=number) for number in (0, 4)]
    few, many = (dataclasses.replace(plan, grid=grid) for grid in grids)
    assert many.fixed_bytes - few.fixed_bytes >= 4 * 9**2 * 4


# identity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_layer", "message"),
    [
        (None, "layers matrices,first,other, now None"),
        (True, "layers matrices,first,other, now 0,3,5"),
        ({**GROUPS, "first": "*bias"}, "now matrices,first"),
        ({**GROUPS, "first": ["3.*", "!*weight"]}, "now matrices,first,other of other parameters"),
    ],
)
def test_a_store_is_not_continued_with_other_groups(tmp_path, per_layer, message):
    stored(tmp_path / "k.zarr")
    with pytest.raises(FingerprintError, match=message) as error:
        stored(tmp_path / "k.zarr", per_layer=per_layer)
    assert "\n" not in str(error.value)


def test_the_manifest_names_the_parameters_of_each_group(tmp_path):
    store = stored(tmp_path / "k.zarr")
    before = files_of(store.path)
    assert store.manifest.layers["first"] == ("0.bias",)
    assert store.manifest.fingerprint != stored(tmp_path / "other.zarr", per_layer=None).manifest.fingerprint
    stored(tmp_path / "k.zarr", per_layer={"matrices": ["0.weight", "3.weight", "5.weight"], "first": "0.bias"})
    assert files_of(store.path) == before  # other patterns of the same groups


def test_patterns_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="Names that are close"):
        stored(tmp_path / "k.zarr", per_layer={"first": "0.wieght"})
    assert not (tmp_path / "k.zarr").exists()


# interruptions and damage ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an `Exception`, so that nothing cleans up, as after SIGKILL."""


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["full", pytest.param("upper", marks=pytest.mark.slow)])
def test_killed_at_any_write_and_resumed_it_has_equal_bytes(tmp_path, monkeypatch, layout, step):
    expected = files_of(stored(tmp_path / "k.zarr", layout=layout).path)
    rename = os.replace
    for count in range(0, 1000, step):
        left, path = [count], tmp_path / f"{count}.zarr"

        def dying(source, target, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            rename(source, target, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                stored(path, layout=layout)
            except Killed:
                pass
            else:
                break
        if (path / "zarr.json").exists():  # what is there to be read is right: numbers of the finished store, or none
            unfinished = open_store(path)
            assert not unfinished.is_complete
            for name in unfinished.array_names:
                there = unfinished.zarr_array(name)[...]
                whole = zarr.open_array(tmp_path / "k.zarr" / name, mode="r")[...]
                assert np.array_equal(there[~np.isnan(there)], whole[~np.isnan(there)])
        assert files_of(stored(path, layout=layout).path) == expected, count
    assert count > len([name for name in expected if "ntk_" in name])


@pytest.mark.parametrize("file", ["ntk_by_layer_float32/c/1/0/1", "ntk_by_layer_float32/c/2/1/0", "ntk_float32/c/0/1"])
def test_a_damaged_file_of_a_layer_is_found_and_its_tile_is_computed_again(tmp_path, file):
    store = stored(tmp_path / "k.zarr", layout="full")
    expected = files_of(store.path)
    assert find_damage(store) == []
    (store.path / file).write_bytes(expected[file][:-5] + b"12345")
    (found,) = find_damage(store)
    assert (found.file, found.problem, found.tile) == (file, "damaged", Tile(0, 1))
    writable = open_store(store.path, mode="r+")
    assert repair(writable, [found]) == [file]
    assert open_store(store.path).missing_tiles() == [Tile(0, 1)]
    assert files_of(stored(store.path, layout="full").path) == expected


def test_wrong_numbers_of_a_layer_are_found_by_recomputation(tmp_path):
    store = stored(tmp_path / "k.zarr")
    inputs = Inputs(X, Samples(np.arange(5), np.full(5, -1)))
    resources = Resources(CPU, Budget(1 << 30, 1 << 30))
    tiles = [Tile(0, 0), Tile(0, 1)]
    assert all(each.equal for each in recompute(store, small_network(), inputs, tiles, resources))
    group = zarr.open_group(store.path, mode="r+")
    group["ntk_by_layer_float32"][1, :9, 9:] *= 1.001
    found = recompute(store, small_network(), inputs, tiles, resources)
    different = [(each.tile, each.dtype, each.different) for each in found if each.different]
    assert different == [(Tile(0, 1), "float32", ("ntk_by_layer_float32/c/1/0/1",))]


def test_the_other_triangle_of_every_layer_is_written(tmp_path):
    upper, full = (stored(tmp_path / f"{layout}.zarr", layout=layout) for layout in ("upper", "full"))
    assert np.isnan(upper.zarr_array("ntk_by_layer_float32")[:, 9:, :9]).all()
    np.testing.assert_array_equal(upper.by_layer, full.by_layer)
    mirror(upper)
    assert files_of(upper.path) == files_of(full.path)


def test_transposes_of_a_tile_that_is_computed_again_are_removed(tmp_path):
    store = stored(tmp_path / "k.zarr", layout="upper")
    expected = files_of(store.path)
    mirror_tile(open_store(store.path, mode="r+"), Tile(0, 1))  # by a mirroring that was interrupted
    assert (store.path / "ntk_by_layer_float32/c/2/1/0").exists()
    (store.path / "ntk_by_layer_float32/c/1/0/1").unlink()
    assert files_of(stored(store.path, layout="upper").path) == expected


@pytest.mark.slow
def test_workers_write_the_same_bytes(tmp_path):
    expected = files_of(stored(tmp_path / "alone.zarr", memory_bytes=1 << 29).path)
    assert files_of(stored(tmp_path / "workers.zarr", memory_bytes=1 << 29, workers=1).path) == expected


# the command line -----------------------------------------------------------------------------------------------------

COMMAND = ["compute", "--models", "logistic", "--dataset", "digits", "--epochs", 0, "--subsample", 3, "--device", "cpu",
           "--no-certify", "-q", "--json"]  # fmt: skip


def test_from_the_command_line(run):
    code, out, err = run(*COMMAND, "--per-layer", "w=*weight", "*bias")
    assert (code, err) == (0, "")
    done = json.loads(out)
    assert done["layers"] == ntkgen.open(done["store"]).layers == ["w", "*bias"]
    assert "layers      w, *bias" in run("info", done["store"])[1]
    code, out, err = run("verify", done["store"], "--recompute", 1)
    assert code == 0, err
    assert "ntk_by_layer_float32" in out
    by_module, plain = (json.loads(run(*COMMAND, *more)[1]) for more in (["--per-layer"], []))
    assert len({done["store"], by_module["store"], plain["store"]}) == 3
    assert (len(by_module["layers"]), plain["layers"]) == (1, [])


def test_patterns_that_do_not_fit_end_a_command_with_one_line(run):
    code, out, err = run(*COMMAND, "--per-layer", "w=*wieght")
    assert (code, out) == (2, "")
    assert err.startswith("Error: No parameter matches the pattern '*wieght'")
    assert err.count("\n") == 1
