"""Small networks in training with surgeries, as a run has them."""

import torch
from torch import nn
from torch.nn import functional as F

from ntkgen.continual.surgery import Subject, SurgeryOptions, make_surgeries
from ntkgen.continual.units import hidden_layers, recorded

# A rate at which some layer replaces a unit every few steps.
RATE = {"replacement_rate": 0.03, "maturity": 4, "utility_decay": 0.8}
# What the published code does.
PUBLISHED = {
    "activation_mean": "sum",
    "replacement_count": "all",
    "transfer_bias": False,
    "reset_unit_optimizer": False,
}


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def convolutional():
    """Two convolutions of 6×6 pixels, of which the second has 2×2 pixels before it is flattened."""
    first, second = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 3)
    return nn.Sequential(first, nn.ReLU(), second, nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def normed():
    """Convolution, batch norm, ReLU, convolution, linear layer."""
    convs = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 6, 3)
    return nn.Sequential(
        *(convs[0], nn.BatchNorm2d(8), nn.ReLU(), convs[1], nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


def mixed():
    """Only the middle one of three hidden layers has batch norm: only the last one can hand over to a bias."""
    hidden = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 7), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(7, 3))


NETS = {
    "mlp": (mlp, (5,)),
    "convolutional": (convolutional, (2, 6, 6)),
    "normed": (normed, (2, 6, 6)),
    "mixed": (mixed, (5,)),
}


class Training:
    """A network in training, with surgeries after each step, as a run has them."""

    def __init__(self, kind="mlp", *names, optimizer="sgd", dtype=torch.float64, seed=0, **options):
        make, self.shape = NETS[kind]
        torch.manual_seed(seed)
        self.model = make().to(dtype)
        params = self.model.parameters()
        self.optimizer = (
            torch.optim.Adam(params, lr=0.01)
            if optimizer == "adam"
            else torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)
        )
        self.layers = hidden_layers(self.model)
        self.subject = Subject(
            self.model,
            self.optimizer,
            self.layers,
            seed=seed,
            options=SurgeryOptions(**options),
            fresh=lambda _: make(),
        )
        self.surgeries = make_surgeries(names, self.subject)
        self.dtype, self.count = dtype, 0

    def batch(self):
        rng = torch.Generator().manual_seed(1000 + self.count)
        x = torch.randn(9, *self.shape, generator=rng)
        return x.to(self.dtype), torch.randint(3, (9,), generator=rng)

    def learn(self):
        """Take the step of the optimizer, and return the activations before it."""
        x, y = self.batch()
        self.count += 1
        self.optimizer.zero_grad()
        with recorded(self.model, self.layers) as features:
            F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        return features

    def step(self):
        """Take a whole step, and return the number of replaced units."""
        features = self.learn()
        return sum(surgery.after_step(features) for surgery in self.surgeries.values())

    @property
    def tensors(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def filled(model):
    """Give every parameter and statistic another value than a new one has."""
    rng = torch.Generator().manual_seed(3)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=rng) + 0.5)
    return model
