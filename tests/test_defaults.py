"""The defaults of the process, a device or a dtype, change nothing: every tensor of ours names its own."""

import numpy as np
import pytest
import torch
from cases import small_network

import ntkgen
from ntkgen.data import dataset as data

X = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
V = torch.randn(15, 2, generator=torch.Generator().manual_seed(2))
NET = small_network()


@pytest.fixture(params=["meta", "float64", "float16"])
def defaults(request):
    """A default device or dtype of the user's."""
    dtype = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("plain"))


class Tokens(torch.nn.Module):
    """Layers that are treated in other ways: an embedding, a norm, a parameter without a rule."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = torch.nn.Embedding(7, 3, device="cpu", dtype=torch.float32), torch.nn.LayerNorm(3)
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.norm(self.table(x)).sum(1) * self.scale


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    TOKENS = Tokens()
T = torch.arange(12).view(4, 3) % 7


def everything(folder):
    """What the library computes, as arrays of bytes."""
    made = {
        "ntk": ntkgen.ntk(NET, X),
        "tokens": ntkgen.ntk(TOKENS, T),
        "rectangle": ntkgen.ntk(NET, X[:3], X[3:], precision="float64"),
        "reference": ntkgen.reference_ntk(NET, X),
        "operator": ntkgen.NTKOperator(NET, X) @ V,
        "order": data.sample_order(7, subsample=5, shuffle_seed=3),
    }
    store = ntkgen.compute(NET, X, X[:2], store=folder / "k.zarr", labels=torch.arange(5, device="cpu"), fsync=False)
    return {name: value.numpy() for name, value in made.items()} | {"store": store.array[:]}


def test_defaults_change_nothing(defaults, expected, tmp_path):
    found = everything(tmp_path)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert np.array_equal(found[name], value), name
