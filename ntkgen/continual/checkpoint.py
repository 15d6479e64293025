"""The newest complete state of a run, as bytes."""

import io
from collections.abc import Mapping
from typing import Any

import torch

from ntkgen.continual.record import CHECKPOINT
from ntkgen.errors import StoreError


def saved(state: Mapping[str, Any]) -> bytes:
    """Write tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def read_checkpoint(data: bytes, place: str) -> dict[str, Any]:
    """Read a checkpoint; it holds tensors and plain values alone.

    Raises:
        StoreError: If it is damaged.
    """
    try:
        found: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _ = found["position"], found["model"]
    except Exception as error:  # whatever a damaged file makes of it
        raise StoreError(
            f"The checkpoint of the run at {place} cannot be read ({type(error).__name__}): expected {CHECKPOINT} as "
            "ntkgen writes it. A disk error? Remove the folder, and run the same command again."
        ) from error
    return found
