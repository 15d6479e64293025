"""The kernel of the sum of all outputs, which Liu et al. (2025) computed by a loop over pairs, and its memory."""

import os
import subprocess
import sys

import pytest
import torch
from cases import chosen

import ntkgen
from models.cnn import cnn
from models.mlp import mlp
from models.ntk_rnn import ntk_rnn

NETWORKS = {
    "mlp": lambda: mlp(num_classes=4, width=16, inputs=12),
    "ntk-rnn": lambda: ntk_rnn(num_classes=4, width=16, inputs=12),
    "ntk-rnn of 3 steps": lambda: ntk_rnn(num_classes=4, width=16, inputs=12, num_steps=3),
    "cnn": lambda: cnn(num_classes=4, width=8),
}


def gradient(net, x):
    """The gradient of the sum of all outputs for one sample; zero for a parameter without effect."""
    net.zero_grad(set_to_none=False)
    net(x[None]).sum().backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in net.parameters()])


@pytest.mark.parametrize("name", chosen(NETWORKS, ["ntk-rnn", "ntk-rnn of 3 steps"]))
def test_it_is_that_of_a_loop_over_pairs(name):
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    x = torch.rand(6, 3, 32, 32) if name == "cnn" else torch.rand(6, 3, 2, 2)
    gradients = [gradient(net, sample).double() for sample in x]
    expected = torch.tensor([[float(g @ h) for h in gradients] for g in gradients])
    found = ntkgen.KernelFunction(net, x, output="sum")(net)
    assert torch.linalg.norm(found - expected) <= 1e-5 * torch.linalg.norm(expected)
    full = ntkgen.KernelFunction(net, x, output="full", precision="float64")(net).reshape(6, 4, 6, 4)
    torch.testing.assert_close(found.double(), full.sum((1, 3)), rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert torch.equal(found, found.T)
    assert torch.linalg.eigvalsh(found.double()).min() >= -1e-5 * torch.linalg.norm(expected)


# The most memory that a process has taken, before and after a kernel of 64 samples.
WIDE = """
import resource, torch, ntkgen
from models.mlp import mlp
torch.set_num_threads(1)
net, x = mlp(width=2000), torch.rand(64, 3, 32, 32)
ntkgen.KernelFunction(net, x[:2], output="sum")(net)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ntkgen.KernelFunction(net, x, output="sum")(net)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in units of Linux")
def test_it_never_holds_the_gradients_of_all_samples():
    done = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, check=True, env=os.environ)
    gradients = 64 * 4 * sum(p.numel() for p in mlp(width=2000).parameters())
    assert int(done.stdout) < gradients / 10
