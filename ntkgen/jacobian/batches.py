"""Checks of the arguments of callers (batches, labels and vectors), and their conversion to plain tensors."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ntkgen.errors import InputError, ShapeError

# The types of arguments that are accepted: a tensor, an array, or (nested) lists of numbers.
ArrayLike = Tensor | npt.NDArray[Any] | Sequence[Any]


# batches --------------------------------------------------------------------------------------------------------------


def checked_batches(
    x1: ArrayLike,  # (n₁, …)
    x2: ArrayLike | None = None,  # (n₂, …)
) -> tuple[Tensor, Tensor | None]:
    """Convert the batches of rows and columns to tensors. A tensor is not copied.

    Raises:
        InputError: If a batch is empty, complex or not numeric, or if only one of the two holds integers.
        ShapeError: If the two batches hold samples of different shapes.
    """
    rows, columns = _batch(x1), None if x2 is None else _batch(x2)
    if columns is None:
        return rows, None
    if rows.shape[1:] != columns.shape[1:]:
        raise ShapeError(
            f"The batches hold samples of different shapes, {tuple(rows.shape[1:])} and {tuple(columns.shape[1:])}, "
            "but one network must accept both. Prepare both batches in the same way."
        )
    if rows.is_floating_point() != columns.is_floating_point():
        raise InputError(
            f"The batches hold different kinds of numbers, {rows.dtype} and {columns.dtype}, but one network must "
            "accept both. Does one hold token ids, or images that were not scaled? Prepare both in the same way."
        )
    return rows, columns.to(rows.device)


def _batch(x: ArrayLike) -> Tensor:
    tensor = _tensor_of(x, "A batch")
    if tensor.ndim == 0:
        raise InputError(
            "A kernel needs samples: expected a tensor whose first axis is that of the samples, found a single number, "
            "of shape (). Is it the only number of one sample? Pass it as x.reshape(1, 1)."
        )
    if len(tensor) == 0:
        raise InputError(
            f"A kernel needs samples: expected at least one along the first axis, found an empty batch of shape "
            f"{tuple(tensor.shape)}. Pass at least one sample. A single sample x is passed as x[None]."
        )
    return tensor


def _tensor_of(values: object, what: str) -> Tensor:
    """Convert an argument of a caller to a plain tensor of numbers, detached from graphs.

    Raises:
        InputError: If the argument is not a rectangular array of real numbers.
    """
    if isinstance(values, PackedSequence):
        raise InputError(
            f"{what} must have samples of one shape, and is a packed sequence. Do the samples have different lengths? "
            "Pad them with pad_packed_sequence, and pass a dict with a mask or the lengths, which the network uses."
        )
    if isinstance(values, np.ndarray):
        tensor = _of_array(values, what)
    elif isinstance(values, list | tuple):
        tensor = _of_list(values, what)
    elif isinstance(values, Tensor):
        tensor = values.detach()
    else:
        raise InputError(
            f"{what} must be a torch.Tensor, a NumPy array or a list of numbers, and is a {type(values).__name__}. "
            f"{_advice(values)}"
        )
    if tensor.is_nested:
        raise InputError(
            f"{what} must have samples of one shape, and is a nested tensor. Do the samples have different lengths? "
            "Pad them, for example with to_padded_tensor, and let the network ignore the padding."
        )
    if tensor.is_complex() or tensor.is_quantized or tensor.is_meta or tensor.layout != torch.strided:
        kind = "complex" if tensor.is_complex() else "quantised" if tensor.is_quantized else f"{tensor.layout}"
        raise InputError(
            f"{what} must be a dense tensor of real numbers, and is {'on the device meta' if tensor.is_meta else kind} "
            f"({tensor.dtype}). Is it meant for another program? Convert it, for example with torch.view_as_real, "
            "dequantize() or to_dense()."
        )
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def _advice(values: object) -> str:
    """Ask for the likely cause of a batch that is no array, and say what to do."""
    kinds = {kind.__name__ for kind in type(values).__mro__}
    if hasattr(values, "edge_index"):
        return (
            "Is it a graph? A graph is one input: pass the numbers of its nodes as samples, and a function that takes "
            "their outputs (`ntkgen manual functions`)."
        )
    if kinds & {"DataLoader", "Dataset", "IterableDataset"}:
        return "Is it a data set? Stack its samples, for example with torch.stack([x for x, label in data_set])."
    if values is None or isinstance(values, bool | int | float | str):
        return (
            "Is it the same for all samples? A constant belongs into `function`, as in function=lambda model, x: "
            "model(x, constant)."
        )
    return "Is it a table? Convert it, for example with torch.as_tensor or to_numpy()."


def _of_array(array: npt.NDArray[Any], what: str) -> Tensor:
    """Convert an array to a tensor that shares its memory if torch can. Networks never write into the tensor.

    Raises:
        InputError: If the array does not hold numbers.
    """
    if isinstance(array, np.ma.MaskedArray) or array.dtype.kind not in "biufc":
        kind = "masked" if isinstance(array, np.ma.MaskedArray) else f"of {array.dtype}"
        raise InputError(
            f"{what} must hold numbers, and is an array {kind}. Do its rows have different lengths, or does it hold "
            "text? Convert it to one rectangular array of numbers."
        )
    supported = array.astype(_supported_dtype(array.dtype), copy=False)
    if any(stride < 0 for stride in supported.strides):
        supported = supported.copy()
    with warnings.catch_warnings(action="ignore"):  # torch warns if the array is read-only, such as a mapped file
        return torch.from_numpy(supported)


def _supported_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Choose the nearest dtype in which torch computes. Torch lacks extended precision and most unsigned integers."""
    if dtype.kind == "u" and 1 < dtype.itemsize < 8:
        return np.dtype(np.int64)
    if dtype.kind in "fc" and dtype.itemsize > {"f": 8, "c": 16}[dtype.kind]:
        return np.dtype({"f": np.float64, "c": np.complex128}[dtype.kind])
    return dtype.newbyteorder("=")


def _of_list(values: Sequence[Any], what: str) -> Tensor:
    _refuse_constants(values, what)
    try:
        if values and all(isinstance(value, Tensor) for value in values):
            return torch.stack([value.detach() for value in values])
        if values and all(isinstance(value, np.ndarray) for value in values):
            return _of_array(np.stack(values), what)
        return torch.as_tensor(values, device="cpu")
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{what} must be a rectangular list of numbers, and is not ({' '.join(str(error).split())[:150]}). Do "
            "its samples have different lengths, or are some entries not numbers? Pad the samples, or pass a tensor."
        ) from error


def _refuse_constants(values: Sequence[Any], what: str) -> None:
    """Refuse a tuple of the inputs of a network, some of which are no tensors or arrays.

    Raises:
        InputError: If there is such an input.
    """
    if not isinstance(values, tuple) or not any(isinstance(value, Tensor | np.ndarray) for value in values):
        return
    for index, value in enumerate(values):
        if not isinstance(value, Tensor | np.ndarray):
            raise InputError(
                f"{what} that is a tuple holds the inputs of a network: expected tensors or arrays whose first axis is "
                f"that of the samples, found {type(value).__name__} as input {index}. Is it the same for all "
                "samples? A constant belongs into `function`, as in function=lambda model, x: model(x, constant)."
            )


# labels ---------------------------------------------------------------------------------------------------------------


def checked_labels(
    labels: ArrayLike | None,  # (n,)
    num_samples: int,
) -> npt.NDArray[np.int64]:  # (n,), -1 for a missing label
    """Convert labels to an array of one integer per sample.

    Raises:
        InputError: If the labels are not integers.
        ShapeError: If the number of labels is not the number of samples.
    """
    if labels is None:
        return np.full(num_samples, -1)
    tensor = _tensor_of(labels, "Labels").cpu()
    if tensor.ndim != 1:
        advice = "labels.argmax(1)" if tensor.ndim == 2 and tensor.shape[1] > 1 else "labels.flatten()"
        raise ShapeError(
            f"Labels must be one integer per sample, of shape ({num_samples},), and have shape {tuple(tensor.shape)}. "
            f"Are they one-hot, or a matrix of one column? Pass {advice}."
        )
    if len(tensor) != num_samples:
        raise ShapeError(
            f"{len(tensor)} labels were given for {num_samples} samples: expected one label per sample. Do the samples "
            "or the labels belong to a larger set? Select the same part of both."
        )
    return _as_int64(tensor)


def _as_int64(labels: Tensor) -> npt.NDArray[np.int64]:
    """Convert labels to int64 without changing their values.

    Raises:
        InputError: If a value would change.
    """
    values = (labels.double() if labels.is_floating_point() else labels).numpy()
    limits = -(2**63), 2**63
    is_kept = np.ones(len(values), bool)
    if values.dtype.kind == "f":
        is_kept = (values >= limits[0]) & (values < limits[1]) & (np.floor(values) == values)
    elif values.dtype == np.uint64:
        is_kept = values < limits[1]
    if not is_kept.all():
        first = int(np.flatnonzero(~is_kept)[0])
        raise InputError(
            f"Labels must be integers, and the label of sample {first} is {values[first]}. Are these the targets of a "
            "regression, or is a label missing? Leave the labels out, or pass the class number of each sample."
        )
    return values.astype(np.int64)


# vectors --------------------------------------------------------------------------------------------------------------


def checked_vectors(
    vectors: Tensor | npt.NDArray[Any],  # (length,) or (length, columns)
) -> Tensor:
    """Convert vectors that are multiplied with a kernel to a tensor.

    Raises:
        InputError: If the vectors are not a tensor or an array of real numbers.
    """
    if not isinstance(vectors, Tensor | np.ndarray):
        raise InputError(
            f"The vectors to multiply must be a torch.Tensor or a NumPy array, and are a {type(vectors).__name__}. Are "
            "they a list? Pass torch.tensor(v)."
        )
    return _tensor_of(vectors, "The matrix of vectors")
