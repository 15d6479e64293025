"""The kernel moves again at a switch of tasks, as published (Liu et al. 2025, arXiv:2507.16039)."""

import numpy as np
import pytest
import torch

from models.mlp import mlp
from models.ntk_rnn import ntk_rnn
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.learner import learn
from ntkgen.continual.metrics.kernels import distance, velocity
from ntkgen.continual.plan import Data, Plan
from ntkgen.continual.reading import open_run
from ntkgen.data.dataset import Dataset
from ntkgen.files.folder import LocalFolder

# Iterations between two kernels of a velocity, and on each side of the switch.
DT, WINDOW = 2, 10
# Of two seeds for each network, measured once: disjoint classes 60 to 190, the same classes 0.84 to 0.93, and other
# proportions of the classes at most 1 / 25 of what disjoint classes have.
SPIKE, NO_SPIKE, SHIFTED = 3, 1.5, 1 / 5
NETWORKS = {
    "ntk-rnn": lambda num_classes: ntk_rnn(num_classes, width=256, inputs=48),
    "mlp": lambda num_classes: mlp(num_classes, width=256, parametrization="ntk", inputs=48),
}


def images(seed, per_class=40, classes=4):
    """Normally distributed classes of 4 × 4 pixels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    means = rng.standard_normal((classes, 3, 4, 4))
    x = means[labels] + 0.5 * rng.standard_normal((len(labels), 3, 4, 4))
    order = rng.permutation(len(labels))
    return Data(Dataset("blobs", torch.from_numpy(x[order]).float(), torch.from_numpy(labels[order]), classes))


def reactivation(place, seed=0, **options):
    """Mean velocity of the first task's kernel after the switch, in units of that before it."""
    settings = RunSettings(
        dataset="blobs", model="nets:network", num_tasks=2, epochs=20, batch_size=16, optimizer="sgd",
        learning_rate=0.05, probe_per_class=5, kernels=f"{DT}it", evaluations="task", dense=None, seed=seed,
        **{"split": "2/2"} | options,
    )  # fmt: skip
    learn(Plan.of(settings, images(seed)), LocalFolder(place, fsync=False), torch.device("cpu"))
    kernels = open_run(place).kernels
    iterations, rows = kernels.iteration.values, kernels.row_task.values == 0
    switch = iterations[kernels.task.values == 0][-1]
    K = kernels.kernel.values[:, rows][:, :, rows].astype(float)
    starts, speed, _ = velocity(lambda time, later: distance(K[time], K[later]), iterations, DT)
    before = speed[(starts >= switch - WINDOW) & (starts < switch)]
    after = speed[(starts >= switch) & (starts < switch + WINDOW)]
    assert len(before) == len(after) == WINDOW // DT
    return after.mean() / before.mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernel_moves_again_where_classes_are_new_and_only_there(name, tmp_path, monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "nets", types.SimpleNamespace(network=NETWORKS[name]))
    spikes = [reactivation(tmp_path / f"new{seed}", seed) for seed in (0, 1)]
    assert min(spikes) >= SPIKE
    assert reactivation(tmp_path / "same", overlap=1.0) <= NO_SPIKE
    assert reactivation(tmp_path / "shifted", split="4/4", frequency_shift=0.3) <= SHIFTED * spikes[0]
