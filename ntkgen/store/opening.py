"""A store made, found or opened at a path, a URL or in a Zarr store."""

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
    """Create a store with everything but its numbers. Without its own zarr.json, which comes last, it is none.

    Raises:
        StoreError: If something else is there.
    """
    folder, files = folder_of(place), dict[str, Buffer]()
    group = zarr.create_group(MemoryStore(files))
    create_first(group, manifest, samples)
    group.attrs.put(_attributes(manifest))
    if foreign := [key for key in folder.sizes() if key == ROOT or key not in files]:
        raise StoreError(
            f"A store cannot be created at {folder}: expected nothing, or what an interrupted creation has left, found "
            f"{len(foreign)} other files, as {foreign[0]}. Is it another program's folder? Choose another path."
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
    made = manifest.provenance
    if manifest.is_imported:
        return f", {made.quantity}, imported from {made.imported_from}"
    model, dataset = ("?" if name is None else name for name in (made.model, made.dataset))
    return f" of {model} on {dataset}"


def has_store(folder: Folder) -> bool:
    """Say whether a store was made in a folder, which then holds its zarr.json.

    Raises:
        StoreError: If there are tiles without it, which cannot be identified. Or if it is a file.
    """
    if folder.has(ROOT):
        return True
    if isinstance(folder, LocalFolder) and folder.path.exists() and not folder.path.is_dir():
        raise StoreError(
            f"There can be no store at {folder}: expected a folder or nothing, found a file. Is it something else's? "
            "Remove it, or choose another path."
        )
    tiles = [key for key in folder.sizes() if key.startswith(("ntk_", "diagonal/c/", "logits/c/"))]
    if tiles:
        raise StoreError(
            f"The store at {folder} has lost its zarr.json: expected it beside {len(tiles)} files of its kernel, found "
            "none. It says what these are of, and without it they are of no use. Was it moved or removed by hand? Put "
            "it back, or remove the folder to compute the kernel anew."
        )
    return False


def open_store(place: str | os.PathLike[str] | Folder | Store, mode: Mode = "r") -> KernelStore:
    """Open a store at a path, a URL or in a Zarr store; ``mode`` is ``r`` or, under the lock, ``r+``.

    Raises:
        StoreError: If there is none, or one of another format version.
    """
    folder = folder_of(place)
    if not folder.has(ROOT):
        raise StoreError(
            f"There is no kernel store at {folder}: expected a Zarr v3 group with a zarr.json, found "
            f"{_found_instead(folder)}. Is the path the folder ending in .zarr?"
        )
    store = folder.zarr_store(read_only=mode == "r")
    try:
        group = zarr.open_group(store, mode=mode, use_consolidated=False)
        values = _manifest_values(group.attrs.asdict())
        version = values["format_version"]
        manifest = Manifest.from_json(values) if version == FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # zarr's own errors are among these
        raise StoreError(
            f"What lies at {folder} is not a kernel store: expected a Zarr v3 group with the attribute 'ntkgen', found "
            f"otherwise ({type(error).__name__}: {' '.join(str(error).split())}). Was it made by another program, or "
            "is its zarr.json damaged, without which its tiles cannot be identified? Give the path of a store that "
            "`ntkgen compute` made, or remove this one."
        ) from error
    if manifest is None:
        raise StoreError(
            f"The store at {folder} has format version {version}, and this ntkgen ({ntkgen.__version__}) reads version "
            f"{FORMAT_VERSION}. Made by ntkgen {values.get('version')}: use that."
        )
    return KernelStore(folder, group, manifest)


def open_kernel(place: str | os.PathLike[str] | Folder | Store, mode: Mode = "r") -> KernelStore:
    """Open a store as `open_store` does, and warn where its certificate finds the kernel wrong.

    Raises:
        StoreError: If there is none, or one of another format version.

    Warns:
        InaccurateKernelWarning: If its numbers should not be taken for the kernel's.
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
    """Find the manifest among a group's attributes.

    Raises:
        KeyError: If it is not there; the message says what is.
    """
    if "ntkgen" not in attributes:
        raise KeyError(f"its attributes are {', '.join(attributes) or 'none'}")
    values: Mapping[str, Any] = attributes["ntkgen"]
    return values
