"""Stacked networks give what their members give one by one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.stream import lenet_stream, mlp_stream
from ntkgen.continual.streaming.layers import steps_of
from ntkgen.continual.streaming.network import StackedNetwork
from ntkgen.errors import ModelError


class Scaled(nn.Module):
    """A network that is no chain of known layers."""

    def __init__(self):
        super().__init__()
        self.inner = mlp_stream(3, 48)

    def forward(self, x):
        return 2 * self.inner(x)


def strided():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=(1, 0), bias=False),
        nn.Sequential(nn.Tanh(), nn.Conv2d(4, 5, (2, 1)), nn.ReLU()),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 3, bias=False),
    )


def twice():
    layer = nn.Linear(48, 48)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(48, 3))


def grouped():
    return nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


NETWORKS = {
    "lenet": (lambda: lenet_stream(3, channels=3, size=20), (3, 20, 20), True),
    "mlp": (lambda: mlp_stream(3, 48), (3, 4, 4), True),
    "strided": (strided, (3, 9, 10), True),
    "other": (Scaled, (3, 4, 4), False),
    "twice": (twice, (3, 4, 4), False),
    "grouped": (grouped, (3, 4, 4), False),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stack_equals_its_members(name):
    make, shape, is_chain = NETWORKS[name]
    torch.manual_seed(0)
    networks = [make().double() for _ in range(3)]
    x, targets = torch.randn(3, *shape, dtype=torch.float64), torch.tensor([2, 0, 1])
    assert (steps_of(networks[0]) is not None) == is_chain
    stack = StackedNetwork(networks)
    prepared = stack.prepared(x)
    outcome = stack.forward(prepared)
    loss = F.cross_entropy(outcome.outputs, targets, reduction="sum")
    grads = dict(zip(stack.parameters, torch.autograd.grad(loss, list(stack.parameters.values())), strict=True))
    for member, network in enumerate(networks):
        found = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, found=found: found.append(output.flatten()))
            for module in network.modules()
            if isinstance(module, nn.ReLU)
        ]
        outputs = network(x[member : member + 1])
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(outcome.outputs[member], outputs[0])
        assert len(found) == len(outcome.rectified) > 0
        for ours, theirs in zip(outcome.rectified, found, strict=True):
            torch.testing.assert_close(ours[member], theirs)
        own = torch.autograd.grad(F.cross_entropy(outputs, targets[member : member + 1]), list(network.parameters()))
        for (parameter, _), grad in zip(network.named_parameters(), own, strict=True):
            torch.testing.assert_close(grads[parameter][member], grad)
        torch.testing.assert_close(stack.outputs(member, x), network(x))
        torch.testing.assert_close(stack.module(member)(x), network(x))


def test_a_second_forward_pass_sees_new_parameters():
    stack = StackedNetwork([mlp_stream(3, 48), mlp_stream(3, 48)])
    prepared = stack.prepared(torch.randn(2, 3, 4, 4))
    before = stack.forward(prepared).outputs
    stack.load({name: 2 * values.detach() for name, values in stack.parameters.items()})
    assert (stack.forward(prepared).outputs - before).abs().min() > 0


def test_a_network_with_hooks_is_no_chain():
    network = mlp_stream(3, 48)
    network[1].register_forward_hook(lambda _module, _inputs, output: 2 * output)
    assert steps_of(network) is None


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.Dropout()])
def test_networks_that_need_batches_are_refused(layer):
    with pytest.raises(ModelError, match="single samples"):
        StackedNetwork([nn.Sequential(layer, nn.Flatten(), nn.Linear(48, 3))])


def test_published_numbers_of_parameters_and_units():
    networks = {
        "lenet-stream": (lenet_stream(), (3, 32, 32), 62_006, 204),
        "lenet-stream of MNIST": (lenet_stream(channels=1, size=28), (1, 28, 28), 44_426, 204),
        "mlp-stream": (mlp_stream(inputs=784), (1, 28, 28), 282_160, 450),
    }
    for network, shape, num_parameters, num_units in networks.values():
        assert sum(each.numel() for each in network.parameters()) == num_parameters
        stack = StackedNetwork([network])
        rectified = stack.forward(stack.prepared(torch.randn(1, *shape))).rectified
        assert sum(each.shape[1] for each in rectified) == num_units
    kinds = [type(module) for module in lenet_stream()]
    assert nn.ReLU not in kinds[: kinds.index(nn.Flatten)]  # no activation after the convolutions
