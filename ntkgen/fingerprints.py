"""Hashes of the parameters of a network, and of samples."""

import hashlib
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError


def parameter_fingerprint(model: nn.Module) -> str:
    """Hash names, shapes, dtypes and bytes of all parameters and buffers, and which parameters are trainable.

    Of buffers those too that are not saved with the module, and what else its `get_extra_state` says of it.

    Raises:
        ModelError: If that cannot be written down.
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
    """Hash what a module says of itself: tensors by their bytes, containers by their items, other values by pickle."""
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
        # a set has its items in an order that differs between processes
        return pickle.dumps(sorted(map(repr, value)) if isinstance(value, set | frozenset) else value, protocol=4)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ModelError(
            f"The network's {name} cannot be told from another ({type(error).__name__}: {error}): expected what "
            f"get_extra_state returns to be pickled, as torch.save does, found a {type(value).__name__}. Does it hold "
            "a lock, a file or a function? Return plain values and tensors."
        ) from error


def _bytes_of(tensor: Tensor) -> memoryview:
    """View the numbers of a tensor of any dtype and layout, row by row."""
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
    """Name a dtype as NumPy does, or as torch does where NumPy has none, as of bfloat16."""
    try:
        return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype.str
    except TypeError:
        return str(dtype)
