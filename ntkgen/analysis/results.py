"""Results kept beside a store, so that nothing is computed twice."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ntkgen
from ntkgen.analysis.matrix import Matrix
from ntkgen.folders import Folder
from ntkgen.paths import beside

# What another version of this program, or of what it writes here, has kept is computed anew.
VERSION = f"{ntkgen.__version__}-3"


def folder_of_results(matrix: Matrix) -> Folder:
    """Where the results of a store lie: beside it, since foreign files in a Zarr group are warned of."""
    folder = matrix.store.folder
    return folder.parent / beside(Path(folder.name), ".analysis").name


def identity_of(matrix: Matrix) -> dict[str, Any]:
    """Say which numbers a matrix is of."""
    return {
        "fingerprint": matrix.store.manifest.fingerprint,
        "replanned": matrix.store.manifest.replanned,
        "dtype": matrix.dtype,
        "output": matrix.output,
        "rows": matrix.num_rows,
    }


def remembered(
    matrix: Matrix, kind: str, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Read a result that was computed before with the same settings from the same kernel, or compute and keep it.

    What is computed must be plain values; ``store``, ``dtype``, ``rows``, ``seconds`` and ``peak_bytes`` are added. The
    kernel is known by the store's fingerprint, its dtype, the rows that are there and whether it was replanned; a store
    that was repaired has the same.
    """
    identity = {**identity_of(matrix), "settings": dict(settings), "version": VERSION}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder, name = folder_of_results(matrix), f"{kind}-{digest}.json"
    if (found := _read(folder.read(name))) is not None:
        return {**found, "store": matrix.name, "remembered": True}
    started = time.monotonic()
    result = compute()
    result = {
        "store": matrix.name,
        "dtype": matrix.dtype,
        "rows": matrix.num_rows,
        **result,
        "seconds": round(time.monotonic() - started, 3),
        "peak_bytes": peak_bytes(),
        "remembered": False,
    }
    folder.write(name, json.dumps({**result, "identity": identity}, indent=1).encode())
    return result


def _read(data: bytes | None) -> dict[str, Any] | None:
    if data is None:
        return None
    try:
        found: dict[str, Any] = json.loads(data)
    except ValueError:  # a damaged one is computed again
        return None
    found.pop("identity", None)
    return found


def peak_bytes() -> int:
    """Say the most memory that this process has held so far.

    On Linux `getrusage` counts what the parent held when it started this process, too.
    """
    import resource
    import sys

    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(most if sys.platform == "darwin" else most * 1024)
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
