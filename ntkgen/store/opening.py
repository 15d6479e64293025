"""Creating, finding and opening a store at a path, at a URL or in a Zarr store."""

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

import ntkgen
from ntkgen.errors import InaccurateKernelWarning, StoreError
from ntkgen.files.folder import Folder, LocalFolder
from ntkgen.files.place import folder_of
from ntkgen.store.describe import inaccuracy
from ntkgen.store.manifest import FORMAT_VERSION, Manifest
from ntkgen.store.schema import Samples, create_first
from ntkgen.store.store import KernelStore

ROOT = "zarr.json"

Mode = Literal["r", "r+"]


def create_store(place: str | os.PathLike[str] | Folder, manifest: Manifest, samples: Samples) -> KernelStore:
    """Create a store without its computed numbers. The store exists once its zarr.json is written, which is last.

    Raises:
        StoreError: If the place holds other files.
    """
    folder, files = folder_of(place), dict[str, Buffer]()
    group = zarr.create_group(MemoryStore(files))
    create_first(group, manifest, samples)
    group.attrs.put(_attributes(manifest))
    if foreign := [key for key in folder.sizes() if key == ROOT or key not in files]:
        raise StoreError(
            f"A store cannot be created at {folder}: expected no files, or those of an interrupted creation, found "
            f"{len(foreign)} other files, such as {foreign[0]}. Is it another program's folder? Choose another path."
        )
    for name in sorted(files, key=lambda name: (name == ROOT, name)):
        folder.write(name, files[name].to_bytes())
    return open_store(folder, mode="r+")


def _attributes(manifest: Manifest) -> dict[str, Any]:
    n, m = manifest.plan.grid.num_samples, manifest.plan.grid.num_outputs
    return {
        "title": f"Empirical neural tangent kernel{_origin(manifest)}, {n} samples × {m} outputs",
        "Conventions": "CF-1.10",
        "source": f"ntkgen {ntkgen.__version__}",
        "ntkgen": manifest.to_json(),
    }


def _origin(manifest: Manifest) -> str:
    provenance = manifest.provenance
    if manifest.is_imported:
        return f", {provenance.quantity}, imported from {provenance.imported_from}"
    model, dataset = ("?" if name is None else name for name in (provenance.model, provenance.dataset))
    return f" of {model} on {dataset}"


def has_store(folder: Folder) -> bool:
    """Tell whether a folder holds a store, which has a zarr.json.

    Raises:
        StoreError: If the folder holds tiles without a zarr.json, or if it is a file.
    """
    if folder.has(ROOT):
        return True
    if isinstance(folder, LocalFolder) and folder.path.exists() and not folder.path.is_dir():
        raise StoreError(
            f"There can be no store at {folder}: expected a folder or nothing, found a file. Was it written by another "
            "program? Remove it, or choose another path."
        )
    tiles = [key for key in folder.sizes() if key.startswith(("ntk_", "diagonal/c/", "logits/c/"))]
    if tiles:
        raise StoreError(
            f"The store at {folder} has lost its zarr.json: expected it beside {len(tiles)} files of the kernel, found "
            "none. The zarr.json identifies the kernel, and its files cannot be used without it. Was it moved or "
            "removed by hand? Put it back, or remove the folder to compute the kernel again."
        )
    return False


def open_store(place: str | os.PathLike[str] | Folder | Store, mode: Mode = "r") -> KernelStore:
    """Open a store at a path, at a URL or in a Zarr store. A caller that passes the mode ``r+`` must hold the lock.

    Raises:
        StoreError: If there is no store, or if it has another format version.
    """
    folder = folder_of(place)
    if not folder.has(ROOT):
        raise StoreError(
            f"There is no kernel store at {folder}: expected a Zarr v3 group with a zarr.json, found "
            f"{_found_instead(folder)}. Does the path name the folder that ends in .zarr? Give the path of a store "
            "that `ntkgen compute` or `ntkgen import` has written."
        )
    store = folder.zarr_store(read_only=mode == "r")
    try:
        group = zarr.open_group(store, mode=mode, use_consolidated=False)
        values = _manifest_values(group.attrs.asdict())
        version = values["format_version"]
        manifest = Manifest.from_json(values) if version == FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # base classes of Zarr's errors
        raise StoreError(
            f"The data at {folder} is not a kernel store: expected a Zarr v3 group with a valid attribute 'ntkgen', "
            f"found an error ({type(error).__name__}: {' '.join(str(error).split())}). Was it written by another "
            "program, or is its zarr.json damaged? The tiles of a store cannot be identified without it. Give the path "
            "of a store that `ntkgen compute` or `ntkgen import` has written, or remove this data."
        ) from error
    if manifest is None:
        raise StoreError(
            f"The store at {folder} has format version {version}, and this ntkgen ({ntkgen.__version__}) reads version "
            f"{FORMAT_VERSION}. Was it written by an older or a newer version? Open it with the version that wrote it, "
            f"ntkgen {values.get('version')}."
        )
    return KernelStore(folder, group, manifest)


def open_kernel(place: str | os.PathLike[str] | Folder | Store, mode: Mode = "r") -> KernelStore:
    """Open a store, and warn if the kernel is wrong according to its certificate (its measured error bound).

    Raises:
        StoreError: If there is no store, or if it has another format version.

    Warns:
        InaccurateKernelWarning: If the measured error is too large to come from rounding errors.
    """
    store = open_store(place, mode)
    if (wrong := inaccuracy(store)) is not None:
        warnings.warn(wrong, InaccurateKernelWarning, stacklevel=2)
    return store


def _found_instead(folder: Folder) -> str:
    if isinstance(folder, LocalFolder) and not folder.path.is_dir():
        return "a file" if folder.path.exists() else "nothing"
    return "other files" if folder.sizes() else "nothing" if not isinstance(folder, LocalFolder) else "an empty folder"


def _manifest_values(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the manifest from the attributes of a group.

    Raises:
        KeyError: If the manifest is missing. The message lists the attributes that exist.
    """
    if "ntkgen" not in attributes:
        raise KeyError(f"its attributes are {', '.join(attributes) or 'none'}")
    values: Mapping[str, Any] = attributes["ntkgen"]
    return values
