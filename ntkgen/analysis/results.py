"""Answers saved beside a store, so that the same question is not computed twice."""

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
    """An answer that was saved beside a store.

    Attributes:
        answer: The answer.
        asked: Settings that the answer depends on, as plain values.
        identity: Values that identify the kernel that the answer is about.
    """

    answer: AnAnswer
    asked: Mapping[str, Any]
    identity: Mapping[str, Any] = field(default_factory=dict)


# Version of the program and of the format of the saved answers. Answers of other versions are computed again.
VERSION = f"{ntkgen.__version__}-3"


def folder_of_results(matrix: Matrix) -> Folder:
    """Return the folder for the results of a store, beside the store.

    Files inside the store would make Zarr warn of unknown objects in a group.

    Raises:
        InputError: If there is no folder beside the store, for example because the store is in memory.
    """
    folder = matrix.store.folder
    return folder.parent / beside(Path(folder.name), ".analysis").name


def kept_files(matrix: Matrix) -> Folder | None:
    """Return the folder for the results of a store; None if there is no folder beside the store."""
    try:
        return folder_of_results(matrix)
    except InputError:
        return None


def require_writable_beside(matrix: Matrix, what: str) -> None:
    """Refuse a computation that needs files beside a store if none can be written there.

    Raises:
        InputError: If no file can be written. The message explains how to provide a writable folder.
    """
    try:
        folder_of_results(matrix).require_writable()
    except InputError as error:
        raise InputError(
            f"{what} of {matrix.name} needs a file beside the store, in {matrix.name}.analysis, which cannot be "
            "written: expected a folder with write permission, found none. Does the store belong to another user, or "
            f"is its disk read-only? Make a link to the store in a folder of your own (ln -s {matrix.name} .) and "
            "give the path of the link, or copy the store. Files are written beside the path that is given."
        ) from error


def identity_of(matrix: Matrix) -> dict[str, Any]:
    """Return the values that identify a kernel among the saved answers."""
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
    """Read a saved answer to the same question about the same kernel, or compute and save it.

    A kernel is identified by the fingerprint of its store, its data type, its output, its number of rows and whether it
    was replanned. A repaired store keeps this identity. If an answer cannot be saved, ``not_kept`` has the reason.

    Args:
        matrix: The kernel.
        kind: The class of the answer.
        asked: The settings that the answer depends on, as plain values.
        compute: Computes the answer. This function then sets the fields of `Answer`.
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
    """Read the answers of the given kinds that are saved beside the store and are about this kernel."""
    folder = kept_files(matrix)
    by_question = {kind.QUESTION: kind for kind in kinds}
    identity, answers = {**identity_of(matrix), "version": VERSION}, list[Kept[AnAnswer]]()
    for name in sorted(folder.sizes()) if folder is not None else ():
        question, _, rest = name.rpartition("-")
        if folder is None or question not in by_question or not rest.endswith(".json"):
            continue
        kept = _read(by_question[question], folder.read(name))
        if kept is not None and {key: kept.identity.get(key) for key in identity} == identity:
            answers.append(dataclasses.replace(kept, answer=dataclasses.replace(kept.answer, store=matrix.name)))
    return answers


def _keep(folder: Folder | None, name: str, result: Mapping[str, Any]) -> str | None:
    """Write a result beside its store; return the reason if that fails, so that the result is not lost."""
    if folder is None:
        return "there is no folder beside this store"
    try:
        folder.write(name, json.dumps(result, indent=1).encode())
    except Exception as error:
        if not is_remote_error(error):
            raise
        return first_lines(error)
    return None


def _read(kind: type[AnAnswer], data: bytes | None) -> Kept[AnAnswer] | None:
    """Read a saved answer; return None if there is none or if it is damaged, so that it is computed again."""
    if data is None:
        return None
    try:
        values: dict[str, Any] = json.loads(data)
        identity = values.pop("identity")
        return Kept(kind.from_kept(values, identity["settings"]), identity["settings"], identity)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def peak_bytes() -> int:
    """Return the largest memory of this process so far, in bytes.

    Linux reports it in /proc. Its `getrusage` would include the memory of the parent at the start of this process.
    """
    import resource
    import sys

    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(most if sys.platform == "darwin" else most * 1024)
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
