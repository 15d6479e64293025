"""Fingerprints: hashes of the parameters of a network, and of samples."""

import hashlib
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError


def parameter_fingerprint(model: nn.Module) -> str:
    """Hash names, shapes, dtypes and bytes of all parameters and buffers, and the set of trainable parameters.

    The hash includes buffers that are not saved with the module, and the result of `get_extra_state`.

    Raises:
        ModelError: If the result of `get_extra_state` cannot be pickled.
    """
    digest = hashlib.sha256()
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    saved: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, value in saved.items():
        if isinstance(value, Tensor):
            _hash_tensor(digest, f"{name}|", value, f"{name in trainable}|")
        else:
            _hash_value(digest, name, value)
    seen = {id(value) for value in saved.values()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in seen:
            _hash_tensor(digest, f"{name}|", tensor, f"{name in trainable}|not saved|")
    return digest.hexdigest()


def _hash_tensor(digest: "hashlib._Hash", before: str, tensor: Tensor, after: str = "") -> None:
    digest.update(f"{before}{tuple(tensor.shape)}|{tensor.dtype}|{after}".encode())
    digest.update(_bytes_of(tensor))


def _hash_value(digest: "hashlib._Hash", name: str, value: Any) -> None:
    """Hash a value of `get_extra_state`: tensors by bytes, containers by items, and other values by pickle."""
    if isinstance(value, Tensor):
        _hash_tensor(digest, f"{name}|", value)
    elif isinstance(value, dict | list | tuple):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        digest.update(f"{name}|{type(value).__name__} of {len(items)}|".encode())
        for key, item in items:
            _hash_value(digest, f"{name}.{key!r}", item)
    else:
        digest.update(f"{name}|{type(value).__name__}|".encode() + _pickled(name, value))


def _pickled(name: str, value: Any) -> bytes:
    try:
        # the order of a set's items differs between processes
        return pickle.dumps(sorted(map(repr, value)) if isinstance(value, set | frozenset) else value, protocol=4)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ModelError(
            f"The network's {name} cannot be hashed ({type(error).__name__}: {error}): expected that get_extra_state "
            f"returns a value that can be pickled, as for torch.save, found a {type(value).__name__}. Does it contain "
            "a lock, a file or a function? Return plain values and tensors."
        ) from error


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor of any dtype and layout, in row-major order."""
    values = tensor.detach().cpu()
    values = values if values.layout == torch.strided else values.to_dense()
    values = values.resolve_conj().resolve_neg().contiguous()
    return values.reshape(-1).view(torch.uint8).numpy().data


def array_fingerprint(*arrays: Tensor) -> str:
    """Hash shapes, dtypes and bytes of some tensors."""
    digest = hashlib.sha256()
    for tensor in arrays:
        shape = tuple(tensor.shape) or (1,)
        digest.update(f"{shape}|{_numpy_name(tensor.dtype)}|".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _numpy_name(dtype: torch.dtype) -> str:
    """Return NumPy's name of a dtype, or torch's name if NumPy does not have the dtype, such as bfloat16."""
    try:
        return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype.str
    except TypeError:
        return str(dtype)
