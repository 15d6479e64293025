"""The matrices of a store: one of them as a view, and all of them as a dask array or an xarray DataArray."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ntkgen.errors import InputError, StoreError, UnknownNameError
from ntkgen.store.remedy import Remedy
from ntkgen.store.schema import BY_LAYER, COORDINATES
from ntkgen.store.view import SymmetricArray

if TYPE_CHECKING:
    from ntkgen.store.store import KernelStore


def matrix_of(store: "KernelStore", dtype: str | None, output: int | None, layer: str | None) -> SymmetricArray:
    """View one matrix of a store, as `KernelStore.kernel` describes.

    Raises:
        StoreError: If the store has no array of that dtype, or if the array is not created yet.
        InputError: If ``output`` is missing or out of range, or if ``output`` or ``layer`` is given for a store
            without such an axis.
        UnknownNameError: If the store has no layer of that name.
    """
    manifest = store.manifest
    if layer is not None:
        _check_layer(store, layer)
    _check_output(store, output)
    name = f"{'ntk' if layer is None else BY_LAYER}_{dtype or manifest.layer_dtype}"
    try:
        array = store.zarr_array(name)
    except UnknownNameError:
        raise StoreError(_missing(store, name, manifest.dtypes if layer is None else (manifest.layer_dtype,))) from None
    layers = () if layer is None else (store.layers.index(layer),)
    return SymmetricArray(
        array,
        is_upper=manifest.layout == "upper",
        token=f"{manifest.fingerprint}-{manifest.is_complete}-{manifest.replanned}",
        place=layers if output is None else (*layers, output),
        is_complete=manifest.is_complete,
        remedy=Remedy.of(store.name, manifest),
    )


def _missing(store: "KernelStore", name: str, dtypes: Sequence[str]) -> str:
    dtype, kind = name.rpartition("_")[2], "kernel of its layers" if name.startswith(BY_LAYER) else "kernel"
    return (
        f"The store at {store.name} has no {dtype} {kind}: expected one of its planned dtypes, {', '.join(dtypes)}. "
        "Kernel arrays are created after the diagonal is computed. Was the computation interrupted before? Choose one "
        "of these dtypes, or finish the store with the same command."
    )


def _check_layer(store: "KernelStore", layer: str) -> None:
    if not store.layers:
        raise InputError(
            f"The store at {store.name} has no kernels of layers: expected no `layer`, found {layer!r}. Was the kernel "
            "computed without groups of parameters? Compute it with `per_layer`, or leave `layer` out."
        )
    if layer not in store.layers:
        raise UnknownNameError("layer", layer, store.layers)


def _check_output(store: "KernelStore", output: int | None) -> None:
    planes = store.grid.num_planes
    if (output is None) != (planes == 1) or (output is not None and not 0 <= output < planes):
        count = f"{planes} matrices, one for each output" if planes > 1 else "a single matrix for all its outputs"
        expected = f"`output` from 0 to {planes - 1}" if planes > 1 else "no `output`"
        remedy = "Give `output` one of these numbers" if planes > 1 else "Leave `output` out"
        raise InputError(
            f"The store at {store.name} has {count}: expected {expected}, found {output}. Was a kernel of another "
            f"output map meant? {remedy}, or choose another store."
        )


def as_dask(store: "KernelStore", layer: str | None = None) -> Any:
    """Return all matrices of a kernel, or of one of its layers, as a dask array ([output,] row, col)."""
    if store.grid.num_planes == 1:
        return store.kernel(layer=layer).to_dask()
    import dask.array as da

    planes = range(store.grid.num_planes)
    return da.stack([store.kernel(output=output, layer=layer).to_dask() for output in planes])


def as_xarray(store: "KernelStore") -> Any:
    """Return the kernel as a lazy DataArray ([output,] row, col)."""
    return _labelled(store, as_dask(store), (), "ntk")


def layers_as_xarray(store: "KernelStore") -> Any:
    """Return the kernels of groups of parameters as a lazy DataArray (layer, [output,] row, col).

    Raises:
        InputError: If the store has none.
    """
    if not store.layers:
        raise InputError(
            f"The store at {store.name} has no kernels of layers: expected some, found only the whole kernel. Was it "
            "computed without groups of parameters? Compute it with `per_layer`."
        )
    import dask.array as da

    kernels = da.stack([as_dask(store, layer) for layer in store.layers])
    return _labelled(store, kernels, ("layer",), "ntk_by_layer").assign_coords(layer=store.layers)


def _labelled(store: "KernelStore", values: Any, first: Sequence[str], name: str) -> Any:
    """Add the coordinates of rows and columns, each of which is an index."""
    import xarray

    names = {name: axis for axis, names in COORDINATES.items() for name in names.split()}
    coords = {name: (axis, store.read(name)) for name, axis in names.items()}
    dims = (*first, *(() if store.grid.num_planes == 1 else ("output",)), "row", "col")
    array = xarray.DataArray(values, dims=dims, coords=coords, name=name, attrs=store.attributes)
    for coordinate in names:
        array = array.set_xindex(coordinate)
    return array
