"""Results kept beside a store, so that nothing is computed twice."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import ntkgen
from ntkgen.analysis.answer import Answer
from ntkgen.analysis.matrix import Matrix
from ntkgen.errors import InputError
from ntkgen.files.bucket import first_lines, is_remote_error
from ntkgen.files.folder import Folder
from ntkgen.files.paths import beside

AnAnswer = TypeVar("AnAnswer", bound=Answer)


@dataclass(frozen=True)
class Kept(Generic[AnAnswer]):
    """An answer that lies beside a store, with the settings that it depends on, as plain values."""

    answer: AnAnswer
    asked: Mapping[str, Any]
    identity: Mapping[str, Any] = field(default_factory=dict)  # which numbers it is about


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
    if folder is not None and (kept := _read(kind, folder.read(name))) is not None:
        return dataclasses.replace(kept.answer, store=matrix.name, remembered=True)
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


def kept_answers(matrix: Matrix, kinds: Sequence[type[AnAnswer]]) -> list[Kept[AnAnswer]]:
    """Read the answers beside the store that are about this very matrix, of some kinds."""
    folder = kept_files(matrix)
    by_question = {kind.QUESTION: kind for kind in kinds}
    wanted, found = {**identity_of(matrix), "version": VERSION}, list[Kept[AnAnswer]]()
    for name in sorted(folder.sizes()) if folder is not None else ():
        question, _, rest = name.rpartition("-")
        if folder is None or question not in by_question or not rest.endswith(".json"):
            continue
        kept = _read(by_question[question], folder.read(name))
        if kept is not None and {key: kept.identity.get(key) for key in wanted} == wanted:
            found.append(dataclasses.replace(kept, answer=dataclasses.replace(kept.answer, store=matrix.name)))
    return found


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


def _read(kind: type[AnAnswer], data: bytes | None) -> Kept[AnAnswer] | None:
    """Read an answer; None where there is none, or a damaged one, which is computed again."""
    if data is None:
        return None
    try:
        found: dict[str, Any] = json.loads(data)
        identity = found.pop("identity")
        return Kept(kind.from_kept(found, identity["settings"]), identity["settings"], identity)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


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
