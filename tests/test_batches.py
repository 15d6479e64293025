"""Accepted and refused batches, labels and vectors. All public functions use the same checks."""

import numpy as np
import pytest
import torch
from cases import Call, relative_error
from torch import Tensor, nn

import ntkgen
from ntkgen.errors import InputError, ShapeError
from ntkgen.jacobian.batches import checked_batches, checked_labels, checked_vectors
from ntkgen.jacobian.precision import POLICIES


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


# batches that are taken -----------------------------------------------------------------------------------------------

ARRAYS = {
    "array": lambda x: x.numpy(),
    "read-only": lambda x: np.frombuffer(x.numpy().tobytes(), np.float32).reshape(x.shape),
    "negative strides": lambda x: x.numpy()[::-1, ::-1].copy()[::-1, ::-1],
    "of other order": lambda x: np.asfortranarray(x.numpy()),
    "big-endian": lambda x: x.numpy().astype(">f4"),
    "wide": lambda x: x.numpy().astype(np.longdouble),
    "list": lambda x: x.tolist(),
    "tuple of rows": lambda x: tuple(map(tuple, x.tolist())),
    "list of tensors": list,
    "list of arrays": lambda x: list(x.numpy()),
    "subclass": nn.Parameter,
    "of a graph": lambda x: x.clone().requires_grad_() * 1,
    "not contiguous": lambda x: x.T.contiguous().T,
    "double": lambda x: x.double(),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_every_kind_of_batch_gives_the_same_kernel(name, tmp_path):
    x = noise(4, 3)
    given, K = ARRAYS[name](x), ntkgen.reference_ntk(network(), x)
    assert torch.equal(ntkgen.reference_ntk(network(), given), K)
    assert torch.equal(ntkgen.reference_ntk(network(), x, given), ntkgen.reference_ntk(network(), x, x))
    kernel = ntkgen.ntk(network(), given, given, precision="float64")
    assert not kernel.requires_grad
    assert relative_error(kernel, K) < 1e-12
    assert relative_error(ntkgen.NTKOperator(network(), given, given) @ torch.eye(8), K) < 1e-12
    if name in {"read-only", "list"}:
        store = ntkgen.compute(network(), given, given, store=tmp_path / "k.zarr", certify=False)
        assert relative_error(store.array, K) < 1e-5


def test_half_precision_batches_are_taken(tmp_path):
    x = noise(4, 3).bfloat16()
    K = ntkgen.reference_ntk(network(), x)
    assert torch.equal(K, ntkgen.reference_ntk(network(), x.double()))
    for precision in [name for name in POLICIES if name != "tf32"]:
        assert relative_error(ntkgen.ntk(network(), x, precision=precision), K) < 3e-2
    settings = {"precision": "float64", "dtypes": ("float64",), "store": tmp_path / "k.zarr"}
    store = ntkgen.compute(network(), x, **settings)
    assert relative_error(store.array, K) < 1e-12
    assert ntkgen.compute(network(), x, **settings).is_complete
    with pytest.raises(InputError, match="samples"):
        ntkgen.compute(network(), x + 1, **settings)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int16, np.int32, np.int64, np.uint8])
def test_token_ids_of_any_width_are_taken(dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    model = Call(lambda self, x: self.net(x.long()), net=model)
    ids = np.array([[0, 4], [1, 2], [3, 3]], dtype)
    K = ntkgen.reference_ntk(model, torch.from_numpy(ids.astype(np.int64)))
    assert torch.equal(ntkgen.reference_ntk(model, ids), K)
    assert relative_error(ntkgen.ntk(model, ids, precision="float64"), K) < 1e-12


def test_a_file_is_read_where_it_lies(tmp_path):
    x = noise(4, 3)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows, _ = checked_batches(mapped)
    assert rows.data_ptr() == mapped.ctypes.data
    assert torch.equal(ntkgen.reference_ntk(network(), mapped), ntkgen.reference_ntk(network(), x))


def test_a_batch_that_is_written_into_by_the_network_stays_as_it_was(tmp_path):
    np.save(tmp_path / "x.npy", noise(4, 3).double().numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")  # to write would end the process
    model = Call(lambda self, x: self.net(x.mul_(2)), net=network())
    K = ntkgen.reference_ntk(network(), 2 * noise(4, 3))
    assert relative_error(ntkgen.reference_ntk(model, mapped), K) < 1e-12
    assert relative_error(ntkgen.ntk(model, mapped, precision="float64"), K) < 1e-12
    assert relative_error(ntkgen.NTKOperator(model, mapped) @ torch.eye(8), K) < 1e-12


# batches that are refused ---------------------------------------------------------------------------------------------


def nested():
    """Make a nested tensor, for which torch imports its compiler: only where it is needed."""
    return torch.nested.nested_tensor([noise(2, 3)[0], noise(1, 3)[0]], layout=torch.jagged)


REFUSED = {
    "empty": (noise(0, 3), InputError, "expected at least one"),
    "empty list": ([], InputError, "expected at least one"),
    "no axis": (torch.tensor(1.0), InputError, "found a single number"),
    "a number": (3.0, InputError, "is a float"),
    "a set": ({1.0}, InputError, "is a set"),
    "ragged": ([[1.0, 2.0, 3.0], [1.0]], InputError, "rectangular"),
    "of strings": (["a", "b"], InputError, "rectangular"),
    "of nothing": ([[None, 1.0, 2.0]], InputError, "rectangular"),
    "tensors of other shapes": ([noise(3), noise(2)], InputError, "rectangular"),
    "objects": (np.array([[1, 2, None]], object), InputError, "array of object"),
    "text": (np.array([["a", "b"]]), InputError, "array of <U1"),
    "dates": (np.array(["2020-01-01"], "datetime64[D]"), InputError, "array of datetime64"),
    "masked": (np.ma.masked_array([[1.0, 2.0, 3.0]], [[True, False, False]]), InputError, "array masked"),
    "complex": (noise(2, 3) + 0j, InputError, "is complex"),
    "complex array": (np.ones((2, 3), complex), InputError, "is complex"),
    "wide complex array": (np.ones((2, 3), np.clongdouble), InputError, "is complex"),
    "sparse": (noise(2, 3).to_sparse(), InputError, "sparse"),
    "nested": (nested, InputError, "nested"),
    "meta": (torch.ones(2, 3, device="meta"), InputError, "device meta"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("entry", [ntkgen.ntk, ntkgen.reference_ntk, ntkgen.NTKOperator, "compute"])
def test_what_is_no_batch_is_refused_alike(name, entry, tmp_path):
    x, error, message = REFUSED[name]
    x = x() if x is nested else x

    def call(*batches):
        if entry == "compute":
            return ntkgen.compute(network(), *batches, store=tmp_path / "k.zarr")
        return entry(network(), *batches)

    for batches in [(x,), (noise(2, 3), x)]:
        with pytest.raises(error, match=message) as refused:
            call(*batches)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "k.zarr").exists()


def test_batches_that_do_not_fit_each_other_are_refused():
    for entry in (ntkgen.ntk, ntkgen.reference_ntk, ntkgen.NTKOperator):
        with pytest.raises(ShapeError, match=r"different shapes, \(3,\) and \(2,\)"):
            entry(network(), noise(2, 3), noise(2, 2))
        with pytest.raises(InputError, match=r"different kinds of numbers, torch.float32 and torch.int64"):
            entry(network(), noise(2, 3), torch.ones(2, 3, dtype=torch.int64))


def test_batches_of_two_precisions_fit():
    x, y = noise(3, 3), noise(2, 3).double()
    K = ntkgen.reference_ntk(network(), x, y)
    assert relative_error(ntkgen.ntk(network(), x, y, precision="float64"), K) < 1e-12


# labels ---------------------------------------------------------------------------------------------------------------

LABELS = {
    "tensor": torch.tensor([2, 0, 1]),
    "list": [2, 0, 1],
    "tuple": (2, 0, 1),
    "array": np.array([2, 0, 1]),
    "bytes": torch.tensor([2, 0, 1], dtype=torch.uint8),
    "unsigned": np.array([2, 0, 1], np.uint64),
    "whole floats": torch.tensor([2.0, 0.0, 1.0]),
    "whole half floats": torch.tensor([2.0, 0.0, 1.0]).bfloat16(),
    "list of floats": [2.0, 0.0, 1.0],
    "read-only": np.frombuffer(np.array([2, 0, 1]).tobytes(), np.int64),
    "backwards": np.array([1, 0, 2])[::-1],
    "list of NumPy's": [np.int64(2), np.int64(0), np.int64(1)],
    "list of tensors": [torch.tensor(2), torch.tensor(0), torch.tensor(1)],
    "of a graph": torch.tensor([2.0, 0.0, 1.0], requires_grad=True),
}


@pytest.mark.parametrize("name", LABELS)
def test_whole_numbers_are_labels(name):
    found = checked_labels(LABELS[name], 3)
    assert (found.dtype, found.tolist()) == (np.int64, [2, 0, 1])


def test_booleans_are_labels_and_no_labels_are_minus_one():
    assert checked_labels([True, False], 2).tolist() == [1, 0]
    assert checked_labels(None, 2).tolist() == [-1, -1]
    assert checked_labels(torch.tensor([2**62, -(2**63)]), 2).tolist() == [2**62, -(2**63)]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0.0, 0.5, 1.0]), InputError, "the label of sample 1 is 0.5"),
        ([0.0, 1.0, float("nan")], InputError, "the label of sample 2 is nan"),
        (np.array([np.inf, 1, 1]), InputError, "the label of sample 0 is inf"),
        (np.array([0, 1, 1e30]), InputError, "the label of sample 2 is 1e"),
        (np.array([0, 1, 2**64 - 1], np.uint64), InputError, "the label of sample 2 is 18446744073709551615"),
        (torch.eye(3), ShapeError, r"shape \(3, 3\).*labels.argmax\(1\)"),
        (torch.ones(3, 1, dtype=torch.int64), ShapeError, r"labels.flatten\(\)"),
        (torch.tensor(1), ShapeError, r"one integer per sample, of shape \(3,\)"),
        (torch.arange(2), ShapeError, "2 labels were given for 3 samples"),
        ([], ShapeError, "0 labels were given for 3 samples"),
        (["cat", "dog", "cat"], InputError, "must be a rectangular list of numbers"),
        (np.array(["cat", "dog", "cat"]), InputError, "array of <U3"),
        (torch.ones(3, dtype=torch.complex64), InputError, "complex"),
        ([2**70, 1, 1], InputError, "rectangular list of numbers"),
        ("abc", InputError, "is a str"),
    ],
)
def test_what_is_no_label_is_refused_and_nothing_is_written(labels, error, message, tmp_path):
    with pytest.raises(error, match=message) as refused:
        ntkgen.compute(network(), noise(3, 3), store=tmp_path / "k.zarr", labels=labels)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "k.zarr").exists()


def test_labels_are_stored(tmp_path):
    store = ntkgen.compute(network(), noise(3, 3), store=tmp_path / "k.zarr", labels=[2.0, 0.0, 1.0], certify=False)
    assert store.read("row_label").tolist() == [2, 2, 0, 0, 1, 1]


# vectors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [np.asarray, np.asfortranarray, lambda V: V[::-1].copy()[::-1], torch.from_numpy])
def test_vectors_are_tensors_or_arrays_and_products_are_tensors(make):
    x = noise(3, 3)
    K, found = ntkgen.reference_ntk(network(), x).numpy(), ntkgen.NTKOperator(network(), x)
    V = np.random.default_rng(0).standard_normal((6, 2))
    for given in (make(V), make(V)[:, 0]):
        product = found @ given
        assert isinstance(product, Tensor)
        assert relative_error(product, K @ np.asarray(given)) < 1e-12
    mapped = ntkgen.NTKOperator(network(), x, transform=make(np.ones((1, 2))))
    assert mapped.shape == (3, 3)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([1.0] * 6, "are a list"),
        (torch.ones(6) + 0j, "is complex"),
        (np.ones((6, 1), complex), "is complex"),
        (np.array([None] * 6), "array of object"),
        (None, "are a NoneType"),
    ],
)
def test_what_is_no_vector_is_refused(vectors, message):
    with pytest.raises(InputError, match=message):
        _ = ntkgen.NTKOperator(network(), noise(3, 3)) @ vectors
    with pytest.raises(InputError, match=message):
        checked_vectors(vectors)
