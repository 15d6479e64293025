"""How far a run of a stream is, read from its checkpoint without torch and without running anything that it names."""

import io
import pickle
import zipfile
from typing import Any

from ntkgen.continual.record import CHECKPOINT
from ntkgen.files.folder import Folder


class _Ignored:
    """Stands for tensors and everything else that is no plain value."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Reader(pickle.Unpickler):  # noqa: S301 - it imports nothing
    def find_class(self, module: str, name: str) -> Any:  # noqa: ARG002 - no name is ever imported
        return _Ignored

    def persistent_load(self, pid: Any) -> Any:  # noqa: ARG002 - the numbers of tensors are not read
        return _Ignored()


def position_of(folder: Folder) -> int | None:
    """Read how many samples a run has learnt at its newest checkpoint; None if that cannot be read."""
    try:
        with zipfile.ZipFile(io.BytesIO(folder.read(CHECKPOINT) or b"")) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            found = _Reader(io.BytesIO(archive.read(name))).load()["position"]["sample"]
    except Exception:  # noqa: BLE001 - whatever a damaged file makes of it
        return None
    return found if isinstance(found, int) else None
