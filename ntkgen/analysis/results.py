"""Results kept beside a store, so that nothing is computed twice."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ntkgen
from ntkgen.analysis.answer import Answer
from ntkgen.analysis.matrix import Matrix
from ntkgen.errors import InputError
from ntkgen.files.bucket import first_lines, is_remote_error
from ntkgen.files.folder import Folder
from ntkgen.files.paths import beside

AnAnswer = TypeVar("AnAnswer", bound=Answer)

# What another version of this program, or of what it writes here, has kept is computed anew.
VERSION = f"{ntkgen.__version__}-3"


def folder_of_results(matrix: Matrix) -> Folder:
    """Where the results of a store lie: beside it, since foreign files in a Zarr group are warned of.

    Raises:
        InputError: If there is no such place, as of a store in this process's memory.
    """
    folder = matrix.store.folder
    return folder.parent / beside(Path(folder.name), ".analysis").name


def kept_files(matrix: Matrix) -> Folder | None:
    """Where the results of a store lie; None where there is no place beside it."""
    try:
        return folder_of_results(matrix)
    except InputError:
        return None


def require_room_beside(matrix: Matrix, what: str) -> None:
    """Refuse to begin what needs files beside a store where none can be written.

    Raises:
        InputError: If that is so; the message says what to do.
    """
    try:
        folder_of_results(matrix).require_writable()
    except InputError as error:
        raise InputError(
            f"{what} of {matrix.name} needs a file beside the store, in {matrix.name}.analysis, and none can be "
            "written there: expected a folder with permission to write, found none. Does the store belong to somebody "
            f"else, or lie on a disk that is only read? Make a link to it in a folder of yours (ln -s {matrix.name} .) "
            "and give the link's path, or copy the store: what is written lies beside the path that is given."
        ) from error


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
    that was repaired has the same. What cannot be kept is returned all the same, with the reason as ``not_kept``.
    """
    identity = {**identity_of(matrix), "settings": dict(settings), "version": VERSION}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder, name = kept_files(matrix), f"{kind}-{digest}.json"
    if folder is not None and (found := _read(folder.read(name))) is not None:
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
    reason = _keep(folder, name, {**result, "identity": identity})
    return result if reason is None else {**result, "not_kept": reason}


def recall_or_compute(
    matrix: Matrix, kind: type[AnAnswer], asked: Mapping[str, Any], compute: Callable[[], AnAnswer]
) -> AnAnswer:
    """Read an answer that was given before with the same settings about the same kernel, or compute and keep it.

    The kernel is known by the store's fingerprint, its dtype, the rows that are there and whether it was replanned; a
    store that was repaired has the same. An answer that cannot be kept is returned with the reason in ``not_kept``.

    Args:
        matrix: The kernel.
        kind: The class of the answer.
        asked: The settings that the answer depends on, as plain values.
        compute: Computes the answer; the fields of `Answer` are filled in here.
    """
    identity = {**identity_of(matrix), "settings": dict(asked), "version": VERSION}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder, name = kept_files(matrix), f"{kind.QUESTION}-{digest}.json"
    if folder is not None and (found := answer_of(kind, _read(folder.read(name)))) is not None:
        return dataclasses.replace(found, store=matrix.name, remembered=True)
    started = time.monotonic()
    computed = compute()
    answer = dataclasses.replace(
        computed,
        store=matrix.name,
        dtype=matrix.dtype,
        rows=matrix.num_rows,
        seconds=round(time.monotonic() - started, 3),
        peak_bytes=peak_bytes(),
    )
    return dataclasses.replace(answer, not_kept=_keep(folder, name, {**answer.to_keep(), "identity": identity}))


def answer_of(kind: type[AnAnswer], found: Mapping[str, Any] | None) -> AnAnswer | None:
    """Make an answer of what was kept; None where that is not whole."""
    try:
        return None if found is None else kind.from_json(found)
    except (TypeError, KeyError):
        return None


def _keep(folder: Folder | None, name: str, result: Mapping[str, Any]) -> str | None:
    """Write a result beside its store; say why that cannot be, where what was found out must not be lost with it."""
    if folder is None:
        return "nothing lies beside such a store"
    try:
        folder.write(name, json.dumps(result, indent=1).encode())
    except Exception as error:
        if not is_remote_error(error):
            raise
        return first_lines(error)
    return None


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
