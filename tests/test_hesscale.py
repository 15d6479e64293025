"""HesScale: equal to the exact diagonal of the Hessian where it is exact, and to its recursion in NumPy elsewhere."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ntkgen.continual.optim import gated, hessian_diagonal
from ntkgen.errors import InputError, ModelError, ShapeError, UnknownNameError

pytestmark = pytest.mark.numeric

LOSSES = {"cross-entropy": F.cross_entropy, "mse": F.mse_loss}


def seeded(*layers):
    model = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.data.normal_(generator=generator)
    return model


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def samples(loss, outputs, *shape):
    x = drawn(4, *shape)
    return x, (torch.arange(4) % outputs if loss == "cross-entropy" else drawn(4, outputs))


def exact(model, x, targets, loss):
    """The diagonal of the Hessian of each parameter, by automatic differentiation."""
    parameters = {name: param.detach() for name, param in model.named_parameters()}

    def of(values):
        return LOSSES[loss](torch.func.functional_call(model, values, (x,)), targets)

    hessians = torch.func.jacrev(torch.func.jacrev(of))(parameters)
    return {
        name: hessians[name][name].reshape(param.numel(), param.numel()).diagonal().view(param.shape)
        for name, param in parameters.items()
    }


def approximate(model, x, targets, loss):
    return hessian_diagonal(model, {name: param.detach() for name, param in model.named_parameters()}, x, targets, loss)


# A single layer, and chains of one unit and one pixel, in which the Hessian at each layer is a number.
EXACT = {
    "linear": (lambda: seeded(nn.Linear(3, 4)), 4, (3,)),
    "no bias": (lambda: seeded(nn.Flatten(), nn.Linear(6, 3, bias=False)), 3, (2, 3)),
    "relu": (lambda: seeded(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 1), nn.LeakyReLU(0.3), nn.Linear(1, 2)), 2, (3,)),
    "tanh": (lambda: seeded(nn.Linear(3, 1), nn.Tanh(), nn.Sequential(nn.Linear(1, 1), nn.Tanh())), 1, (3,)),
    "convolution": (lambda: seeded(nn.Conv2d(2, 3, 3), nn.Flatten()), 3, (2, 3, 3)),
    "gate": (lambda: gated(seeded(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 1))), 1, (3,)),
    "max-pooling": (lambda: seeded(nn.Conv2d(1, 3, 2), nn.MaxPool2d(2), nn.Flatten()), 3, (1, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("make", "outputs", "shape"), EXACT.values(), ids=EXACT)
def test_it_equals_the_diagonal_of_the_hessian_where_it_is_exact(make, outputs, shape, loss):
    """U14: the last layer always; all layers if there is one unit, and with the squared error of one output."""
    model = make()
    x, targets = samples(loss, outputs, *shape)
    expected, found = exact(model, x, targets, loss), approximate(model, x, targets, loss)
    last = [name for name, _ in model.named_parameters()][-2:]
    is_chain = loss == "mse" or len(list(model.named_parameters())) <= 2
    assert list(found) == list(expected)
    for name in found if is_chain else last:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


# the recursion --------------------------------------------------------------------------------------------------------


def unfolded(weight, stride, padding, size):
    """The matrix of a convolution, and where each kernel number stands in it, (outputs, inputs)."""
    outs, ins, k, _ = weight.shape
    side = (size + 2 * padding - k) // stride + 1
    places = -np.ones((outs, side, side, ins, size, size), int)
    numbers = np.arange(weight.size).reshape(weight.shape)
    for row in range(side):
        for col in range(side):
            for i in range(k):
                for j in range(k):
                    y, x = row * stride + i - padding, col * stride + j - padding
                    if 0 <= y < size and 0 <= x < size:
                        places[:, row, col, :, y, x] = numbers[:, :, i, j]
    places = places.reshape(outs * side * side, ins * size * size)
    return np.where(places < 0, 0, weight.ravel()[places]), places


def test_it_equals_its_recursion_in_a_network_of_several_layers():
    """A convolution is a linear layer whose weights are shared: their curvatures add up."""
    model = seeded(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(12, 4),
        nn.Tanh(), nn.Linear(4, 3),
    )  # fmt: skip
    x, targets = samples("cross-entropy", 3, 2, 6, 6)
    values = {name: param.detach().numpy() for name, param in model.named_parameters()}
    matrix, places = unfolded(values["0.weight"], 2, 1, 6)
    pool, _ = unfolded(np.full((1, 1, 2, 2), 0.25), 1, 0, 3)
    pool = np.kron(np.eye(3), pool)
    flat = x.numpy().reshape(4, -1)
    z1 = flat @ matrix.T + np.repeat(values["0.bias"], 9)
    pooled = np.maximum(z1, 0) @ pool.T
    z2 = pooled @ values["4.weight"].T + values["4.bias"]
    y2 = np.tanh(z2)
    logits = y2 @ values["6.weight"].T + values["6.bias"]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    h3, g3 = (p - p**2) / 4, (p - np.eye(3)[targets]) / 4
    h2 = (1 - y2**2) ** 2 * (h3 @ values["6.weight"] ** 2) - 2 * y2 * (1 - y2**2) * (g3 @ values["6.weight"])
    h1 = (h2 @ values["4.weight"] ** 2) @ pool**2 * (z1 > 0)
    of_matrix = h1.T @ flat**2
    expected = {
        "0.weight": np.bincount(places[places >= 0], of_matrix[places >= 0]).reshape(values["0.weight"].shape),
        "0.bias": h1.sum(0).reshape(3, 9).sum(1),
        "4.weight": h2.T @ pooled**2,
        "4.bias": h2.sum(0),
        "6.weight": h3.T @ y2**2,
        "6.bias": h3.sum(0),
    }
    found = approximate(model, x, targets, "cross-entropy")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_global_mean_is_one_large_average():
    x, targets = samples("cross-entropy", 2, 2, 4, 4)
    parts = nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(3, 2)
    means = nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(4)
    one, other = (approximate(seeded(parts[0], mean, *parts[1:]), x, targets, "cross-entropy") for mean in means)
    for left, right in zip(one.values(), other.values(), strict=True):
        torch.testing.assert_close(left, right)


def test_a_layer_that_occurs_twice_has_the_sum():
    layer = nn.Linear(1, 1, bias=False).double()
    model = nn.Sequential(layer, layer)
    x, y = torch.tensor([[2.0]]).double(), torch.tensor([[0.0]]).double()
    w = layer.weight.item()
    found = approximate(model, x, y, "mse")  # h = 2 at the outputs: 2 (w x)² for the last one, 2 w² x² for the first
    assert list(found) == ["0.weight"]
    assert found["0.weight"].item() == pytest.approx(2 * (2 * w) ** 2 + 2 * w**2 * 4)


def test_a_stack_of_networks_is_computed_at_once():
    def make():
        return nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(),
            nn.Linear(4, 3),
        ).double()  # fmt: skip

    torch.manual_seed(0)
    nets = [make() for _ in range(3)]
    stacked = {
        name: torch.stack([dict(net.named_parameters())[name].detach() for net in nets])
        for name, _ in nets[0].named_parameters()
    }
    x, targets = drawn(3, 2, 2, 7, 7), torch.tensor([[0, 1], [2, 0], [1, 1]])
    found = torch.func.vmap(lambda *each: hessian_diagonal(nets[0], *each))(stacked, x, targets)
    for k, net in enumerate(nets):
        for name, value in approximate(net, x[k], targets[k], "cross-entropy").items():
            torch.testing.assert_close(found[name][k], value)


def test_parameters_that_are_not_given_are_those_of_the_network():
    model = seeded(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, targets = samples("cross-entropy", 2, 3)
    whole = approximate(model, x, targets, "cross-entropy")
    part = hessian_diagonal(model, {"0.bias": model[0].bias.detach()}, x, targets)
    assert list(part) == ["0.bias"]
    torch.testing.assert_close(part["0.bias"], whole["0.bias"])


# what is refused ------------------------------------------------------------------------------------------------------

REFUSED = {
    "norm": (nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.BatchNorm1d(2))), ModelError, "layer 1.0, BatchNorm1d"),
    "network": (nn.Bilinear(3, 3, 2), ModelError, "the network, Bilinear"),
    "padding": (nn.Sequential(nn.Conv2d(1, 1, 3, padding="same")), ModelError, "layer 0, Conv2d"),
    "pooling": (nn.Sequential(nn.AvgPool2d(2, padding=1)), ModelError, "layer 0, AvgPool2d"),
    "outputs": (nn.Sequential(nn.Identity()), ShapeError, "expected outputs"),
}


@pytest.mark.parametrize(("model", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_other_networks_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        hessian_diagonal(model, {}, torch.zeros(2, 3, 3), torch.zeros(2, dtype=torch.long))


def test_an_unknown_parameter_or_loss_is_refused():
    model, x, targets = seeded(nn.Linear(3, 2)), drawn(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(InputError, match=r"no parameter 'fc.weight': expected one of 0.weight, 0.bias"):
        hessian_diagonal(model, {"fc.weight": torch.zeros(2, 3)}, x, targets)
    with pytest.raises(UnknownNameError, match="Unknown loss 'hinge'"):
        hessian_diagonal(model, {}, x, targets, "hinge")
    with pytest.raises(ShapeError, match=r"targets of shape \(4, 2\)"):
        hessian_diagonal(model, {}, x, targets, "mse")
