"""How well cheap utilities agree with the true one: the change of the loss if a weight, or a hidden unit, becomes 0.

A small network learns to add two of its five inputs, one sample at a time. Every few steps the utilities of all its
parameters, or of its hidden units, are computed for the parameters before the step. They are compared with the oracle
by Spearman's rank correlation: among all of them, and within each tensor.

References:
    Elsayed, Mahmood (2024), arXiv:2404.00781, Section 4.1 and Figure 2. Their code ranks by positions of a sort in
    place of ranks, and measures the oracle after the step; this is not copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ntkgen.continual.chance import generator_of, seed_of
from ntkgen.continual.optim import SGD, gated, hessian_diagonal
from ntkgen.continual.optim.feature_upgd import GATE
from ntkgen.continual.streaming.network import StackedNetwork
from ntkgen.errors import UnknownNameError

INPUTS, SUMMANDS = 5, 2
UTILITIES = ("first_order", "second_order", "magnitude", "squared_gradient", "random")
SCOPES = ("global", "layer")
KINDS = ("weights", "units")


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study.

    Attributes:
        num_seeds: Number of networks, each with samples of its own.
        num_steps: Number of steps.
        every: Number of steps between two comparisons.
        hidden: Number of hidden units.
        learning_rate: Learning rate.
        of: ``weights``, or ``units``: the utility of a unit is that of its gate, a factor of 1; see `gated`.
    """

    num_seeds: int = 30
    num_steps: int = 2000
    every: int = 20
    hidden: int = 50
    learning_rate: float = 0.01
    of: str = "weights"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UnknownNameError: If there are no such utilities.
        """
        if self.of not in KINDS:
            raise UnknownNameError("`of`", self.of, KINDS)


def study(settings: StudySettings) -> xarray.Dataset:
    """Compare the utilities with the oracle while the networks learn.

    Returns:
        ``correlation`` with the dimensions utility, scope and seed: the mean over the comparisons. The scope ``layer``
        is the mean over the tensors of parameters.
    """
    network = StackedNetwork([_network(settings, seed) for seed in range(settings.num_seeds)])
    is_gate = {name: name.endswith(GATE) for name in network.parameters}
    trained = [values for name, values in network.parameters.items() if not is_gate[name]]
    chosen = [name for name in network.parameters if is_gate[name] == (settings.of == "units")]
    optimizer = SGD(trained, lr=settings.learning_rate, members=settings.num_seeds)
    module, params = network.module(0), list(network.parameters.values())
    x, y = _samples(settings)
    found: list[npt.NDArray[np.float64]] = []
    for step in range(settings.num_steps):
        outputs = network.forward(network.prepared(x[step])).outputs
        loss = (outputs[:, 0] - y[step]).square().sum()
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.grad = grad
        if step % settings.every == 0:
            values = utilities(module, network.parameters, x[step], y[step], step)
            truth = oracle(module, network.parameters, x[step], y[step], chosen)
            found.append(np.stack([compared(values[name], truth) for name in UTILITIES]))
        optimizer.step()
    dims = ("utility", "scope", "seed")
    data = {"correlation": (dims, np.mean(found, 0))}
    return xarray.Dataset(data, {"utility": list(UTILITIES), "scope": list(SCOPES)})


def utilities(
    module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor, step: int
) -> dict[str, dict[str, Tensor]]:
    """Compute the utilities of all parameters of stacked networks, by name: −g w, −g w + h w² / 2, |w|, g², and noise.

    The gradients g must be those of the samples; h is the diagonal of the Hessian by HesScale.
    """

    def curvature(own: dict[str, Tensor], sample: Tensor, target: Tensor) -> dict[str, Tensor]:
        return hessian_diagonal(module, own, sample[None], target[None, None], "mse")

    curved: dict[str, Tensor] = vmap(curvature)({name: each.detach() for name, each in parameters.items()}, x, y)
    random = torch.Generator().manual_seed(seed_of(0, "noise", step))
    by_name: dict[str, dict[str, Tensor]] = {name: {} for name in UTILITIES}
    for name, values in parameters.items():
        w, h = values.detach(), curved[name]
        assert values.grad is not None
        g = values.grad
        of_parameter = (-g * w, -g * w + h * w.square() / 2, w.abs(), g.square(), torch.rand(w.shape, generator=random))
        for utility, found in zip(UTILITIES, of_parameter, strict=True):
            by_name[utility][name] = found
    return by_name


def oracle(
    module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor, chosen: Sequence[str]
) -> dict[str, Tensor]:
    """Compute the change of the loss of each network for its sample, if one number after the other becomes 0.

    Args:
        module: The network.
        parameters: The parameters of stacked networks by name.
        x: A sample for each network.
        y: Its target.
        chosen: The names of the parameters whose numbers become 0.
    """

    def loss(own: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        outputs: Tensor = functional_call(module, own, (sample[None],))
        return (outputs[0, 0] - target).square()

    def changes(own: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:  # -> (parameters,)
        before = loss(own, sample, target)
        without = _each_without_one({name: own[name] for name in chosen})
        axes = {name: 0 if name in without else None for name in own}
        return vmap(loss, (axes, None, None))({**own, **without}, sample, target) - before

    with torch.no_grad():
        flat = vmap(changes)({name: values.detach() for name, values in parameters.items()}, x, y)
    parts = flat.split([parameters[name][0].numel() for name in chosen], 1)
    return {name: part.view_as(parameters[name]) for name, part in zip(chosen, parts, strict=True)}


def compared(values: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:  # (scopes, seeds)
    """Correlate a utility with the oracle: among all parameters, and the mean over the tensors of parameters.

    A tensor of a single parameter has no ranks, and is left out of the mean.
    """
    pairs = [(_matrix(values[name]), _matrix(truth[name])) for name in truth]
    everything = spearman(*(np.concatenate(each, 1) for each in zip(*pairs, strict=True)))
    by_tensor = [spearman(*pair) for pair in pairs if pair[0].shape[1] > 1]
    return np.stack([everything, np.mean(by_tensor, 0)])


def spearman(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:  # (rows, n), (rows, n) -> (rows,)
    """Compute Spearman's rank correlation of each row. Equal values share the mean of their ranks.

    A row whose values are all equal has the correlation 0.

    >>> spearman(np.array([[1.0, 2.0, 9.0]]), np.array([[-5.0, 0.0, 1.0]])).round(12).tolist()
    [1.0]
    """
    from scipy.stats import rankdata

    ranks = [rankdata(each, axis=1) for each in (a, b)]
    centred = [each - each.mean(1, keepdims=True) for each in ranks]
    norms = np.prod([np.linalg.norm(each, axis=1) for each in centred], 0)
    products = (centred[0] * centred[1]).sum(1)
    return np.asarray(np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0))


def _network(settings: StudySettings, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "init"))
        network = nn.Sequential(nn.Linear(INPUTS, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, 1))
    return gated(network) if settings.of == "units" else network


def _samples(settings: StudySettings) -> tuple[Tensor, Tensor]:  # (steps, seeds, inputs), (steps, seeds)
    """Draw inputs from U(−0.5, 0.5), and add two of them that each seed has chosen."""
    inputs, targets = [], []
    for seed in range(settings.num_seeds):
        chosen = generator_of(seed, "target").choice(INPUTS, SUMMANDS, replace=False)
        drawn = generator_of(seed, "batches").uniform(-0.5, 0.5, (settings.num_steps, INPUTS))
        inputs.append(drawn)
        targets.append(drawn[:, chosen].sum(1))
    x, y = (torch.from_numpy(np.stack(arrays, 1).astype(np.float32)) for arrays in (inputs, targets))
    return x, y


def _each_without_one(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the parameters once per number, and set one number of each copy to 0."""
    flat = torch.cat([values.flatten() for values in own.values()])
    copies = flat * (1 - torch.eye(len(flat), dtype=flat.dtype, device=flat.device))
    parts = copies.split([values.numel() for values in own.values()], 1)
    return {name: part.view(-1, *values.shape) for (name, values), part in zip(own.items(), parts, strict=True)}


def _matrix(values: Tensor) -> npt.NDArray[Any]:
    return np.asarray(values.detach().flatten(1).numpy())
