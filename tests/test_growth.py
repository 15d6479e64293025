"""Growing heads: old rows stay, with the optimizer's state of them, and every method, resume and kernel works."""

import copy
import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch
from cases import chosen
from test_learner import SETTINGS, done, killed_at, require_equal, small
from test_methods import DATA, STREAM, batch
from torch import nn
from torch.nn import functional as F

from ntkgen.cli import run as command
from ntkgen.continual.configuration import MethodOptions, RunSettings
from ntkgen.continual.heads import grow_head, growing_head, head_of
from ntkgen.continual.methods import METHODS, make_method
from ntkgen.continual.methods.method import Situation
from ntkgen.continual.network import build_network
from ntkgen.errors import ModelError
from ntkgen.files.folder import LocalFolder

GROWING = dataclasses.replace(SETTINGS, head="growing", output="full")


def shared(num_classes):
    """The head's weight is that of another layer, too."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, num_classes, bias=False))
    net[1].again = nn.Linear(12, num_classes, bias=False)
    net[1].again.weight = net[2].weight
    return net


def normed(num_classes):
    """The head's weight is computed."""
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(12, num_classes)))


def two():
    """A factory that ignores the number of classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))


def six():
    """A factory that has the outputs of all classes from the beginning."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6))


def headless(num_classes):
    return nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Flatten(3), nn.Conv2d(3, num_classes, (1, 4)), nn.Flatten())


@pytest.fixture(scope="module", autouse=True)
def nets():
    """Make the networks importable by a name."""
    functions = {function.__name__: function for function in (small, shared, normed, two, six, headless)}
    sys.modules["nets"] = types.SimpleNamespace(**functions)
    yield
    del sys.modules["nets"]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run with a growing head that nothing has disturbed, and how often it has written."""
    place, written = tmp_path_factory.mktemp("grown") / "seed0", []

    def write(self, key, data, plain=LocalFolder.write):
        written.append(key)
        plain(self, key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFolder, "write", write)
        run = done(place, GROWING)
    return place, run, len(written)


def optimizer_of(name, net):
    if name == "adam":
        return torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True)
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)


def train_step(net, optimizer, x, targets):
    optimizer.zero_grad()
    F.cross_entropy(net(x), targets).backward()
    optimizer.step()


# one growth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["ntk-mlp", "ntk-rnn", "resnet20"])
def test_old_rows_keep_their_bits_and_old_outputs_their_values(model):
    options = {"parametrization": "ntk"} if model == "ntk-mlp" else {}
    settings = RunSettings(model=model.removeprefix("ntk-") if options else model, **options, width=8)
    net = build_network(settings, 3).eval()
    x = torch.randn(4, 3, 32, 32)
    before, state = net(x).detach(), copy.deepcopy(net.state_dict())
    head, larger = growing_head(net, 3, build_network(settings, 5, task=1))
    grow_head(head, larger, optimizer_of("sgd", net))
    assert net(x).shape == (4, 5)
    torch.testing.assert_close(net(x)[:, :3], before, rtol=1e-4, atol=1e-5)
    for name, value in net.state_dict().items():
        assert torch.equal(value[: len(state[name])] if value.ndim else value, state[name]), name
    assert head_of(net, 5) is head


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_optimizer_keeps_its_state_of_old_rows_and_trains_the_new_ones(name):
    net, (x, targets) = small(3), batch()
    optimizer = optimizer_of(name, net)
    train_step(net, optimizer, x, targets % 3)
    kept = {key: value.clone() for key, value in optimizer.state[net[5].weight].items() if value.ndim}
    grow_head(*growing_head(net, 3, small(5)), optimizer)
    found = {key: value for key, value in optimizer.state[net[5].weight].items() if value.ndim}
    assert found.keys() == kept.keys() != set()
    for key, value in found.items():
        assert torch.equal(value[:3], kept[key])
        assert not value[3:].any()
    assert [*optimizer.param_groups[0]["params"]] == [*net.parameters()]
    before = net[5].weight.detach().clone()
    train_step(net, optimizer, x, targets % 5)
    assert (net[5].weight != before).any(dim=1).all()


def test_new_rows_come_from_the_seed_and_the_task_and_are_drawn_as_the_first():
    settings = RunSettings(model="mlp", parametrization="ntk", width=400)
    draws = [
        head_of(build_network(dataclasses.replace(settings, seed=seed), 6, task=task), 6).weight[3:].detach()
        for seed, task in ((0, 1), (0, 1), (0, 2), (1, 1))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])
    assert draws[0].std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (shared, "1.again.weight does so too"),
        (normed, "does so too"),
        (two, "more than 2 outputs"),
        (six, "has 6 outputs: expected 2, one for each class of the first task, since the head grows"),
        (headless, "no head"),
    ],
)
def test_a_head_that_cannot_grow_is_refused_before_anything_is_written(tmp_path, capsys, factory, match):
    with pytest.raises(ModelError, match=match):
        done(tmp_path / "seed0", dataclasses.replace(GROWING, model=f"nets:{factory.__name__}"))
    assert not (tmp_path / "seed0" / "config.json").exists()
    line = ["cl-run", "--model", f"nets:{factory.__name__}", "--head", "growing", "--out", str(tmp_path / "r")]
    assert command(line) == 2
    assert capsys.readouterr().err.count("\n") == 1


# methods --------------------------------------------------------------------------------------------------------------


def method_with_a_grown_head(name, **options):
    """Train nothing in the first task, and grow the head for the second."""
    torch.manual_seed(0)
    net = small(2).eval()
    situation = Situation(STREAM, DATA.labels, 0, MethodOptions(**options), net, DATA.train.inputs, 2)
    method = make_method(name, situation)
    method.begin(STREAM.tasks[0], net)
    method.end(STREAM.tasks[0], net)
    grow_head(*growing_head(net, 2, small(4)), optimizer_of("sgd", net))
    method.begin(STREAM.tasks[1], net)
    return net, method


def test_distillation_has_no_gradient_just_after_growth():
    net, method = method_with_a_grown_head("lwf", distillation=5.0)
    x, targets = batch()
    outputs = net(x)
    losses = method.loss(outputs, targets, x), F.cross_entropy(outputs, targets)
    found, expected = (torch.autograd.grad(loss, outputs, retain_graph=True)[0] for loss in losses)
    assert outputs.shape == (10, 4)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_targets_of_lwf_mc_are_old_probabilities_and_new_labels():
    net, method = method_with_a_grown_head("lwf-mc")
    x, targets = batch()
    wanted = torch.cat([net(x)[:, :2].detach().sigmoid(), F.one_hot(targets, 4)[:, 2:].float()], dim=1)
    with torch.no_grad():
        net[5].weight.add_(0.1)
    s = net(x).sigmoid()
    expected = -(wanted * s.log() + (1 - wanted) * (1 - s).log()).sum(1).mean()
    assert method.loss(net(x), targets, x).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_penalty_of_ewc_is_on_old_rows_alone():
    net, method = method_with_a_grown_head("ewc", penalty=3.0)
    x, targets = batch()
    with torch.no_grad():
        net[5].weight[2:].add_(1.0)
    assert method.loss(net(x), targets, x).item() == pytest.approx(F.cross_entropy(net(x), targets).item(), rel=1e-6)
    with torch.no_grad():
        net[5].weight[:2].add_(0.1)
    expected = F.cross_entropy(net(x), targets) + 1.5 * 0.01 * method.anchors[0]["5.weight"][0].sum()
    assert method.loss(net(x), targets, x).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_with_a_growing_head(tmp_path, name):
    settings = dataclasses.replace(GROWING, method=name, epochs=10, buffer=30, kernels="task", dense=None)
    assert done(tmp_path / "seed0", settings).matrix().values.diagonal().min() >= 0.5


# runs -----------------------------------------------------------------------------------------------------------------


def test_outputs_are_those_of_the_classes_seen_so_far(grown):
    place, run, _ = grown
    seen = [2 * task + 2 for task in run.kernels.task.values]
    assert run.kernels.num_outputs.values.tolist() == seen
    for task in range(3):
        state = torch.load(place / f"models/task{task}.pt", weights_only=True)
        assert len(state["5.weight"]) == len(state["5.bias"]) == 2 * task + 2
    kernels, outputs = run.kernels.kernel.values, run.kernels.row_output.values
    for K, count in zip(kernels, seen, strict=True):
        assert np.array_equal(np.isnan(np.diagonal(K)), outputs >= count)
        assert not np.isnan(K[outputs < count][:, outputs < count]).any()


def test_a_growth_is_logged_and_what_is_not_defined_is_null(grown):
    def refuse(name):
        raise AssertionError(name)

    place, run, _ = grown
    lines = [json.loads(line, parse_constant=refuse) for line in (place / "log.jsonl").read_text().splitlines()]
    events = [line for line in lines if line["event"] == "head grown"]
    assert [(line["iteration"], line["task"], line["num_outputs"]) for line in events] == [(8, 1, 4), (16, 2, 6)]
    assert lines[0]["task_accuracy"][1:] == lines[0]["loss"][1:] == [None, None]
    json.loads(json.dumps(run.metrics()), parse_constant=refuse)


def test_classes_without_outputs_are_errors(grown):
    _, run, _ = grown
    data = run.evaluations
    unseen = np.arange(3) > data.trained_task.values[:, None]
    assert not data.accuracy.values[unseen].any()
    for name in ("task_accuracy", "loss"):
        assert np.array_equal(np.isnan(data[name].values), unseen)
    matrix = run.matrix("task_accuracy")
    assert matrix.forward_transfer is None
    best = [np.nanmax(matrix.values[:2, task]) for task in range(2)]
    assert matrix.forgetting == pytest.approx(np.mean(best - matrix.values[2, :2]))


def test_lwf_without_distillation_is_finetuning(grown, tmp_path):
    place = grown[0]
    done(tmp_path / "seed0", dataclasses.replace(GROWING, method="lwf", distillation=0.0, kernels="task", dense=None))
    found, expected = (torch.load(at / "models/task2.pt", weights_only=True) for at in (tmp_path / "seed0", place))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("part", chosen([0.35, 0.55, 0.9], [0.55]))
def test_a_killed_run_ends_like_an_undisturbed_one(grown, tmp_path, monkeypatch, part):
    place = tmp_path / "seed0"
    assert killed_at(place, monkeypatch, int(part * grown[2]), GROWING)
    done(place, GROWING)
    require_equal(place, grown[0])


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_third_write_ends_like_an_undisturbed_one(grown, tmp_path, monkeypatch):
    for moment in range(1, grown[2] + 1, 3):
        place = tmp_path / f"killed{moment}"
        assert killed_at(place, monkeypatch, moment, GROWING)
        done(place, GROWING)
        require_equal(place, grown[0])


def test_icarl_with_a_growing_head_is_resumed_and_predicts_classes_that_were_seen(grown, tmp_path, monkeypatch):
    settings = dataclasses.replace(GROWING, method="icarl", buffer=18)
    undisturbed = done(tmp_path / "undisturbed", settings)
    assert killed_at(tmp_path / "seed0", monkeypatch, grown[2] * 2 // 3, settings)
    done(tmp_path / "seed0", settings)
    require_equal(tmp_path / "seed0", tmp_path / "undisturbed")
    assert np.isnan(undisturbed.kernels.kernel.values[0]).any()
    assert not np.isnan(undisturbed.kernels.kernel.values[-1]).any()
    unseen = np.arange(3) > undisturbed.evaluations.trained_task.values[:, None]
    assert not undisturbed.evaluations.accuracy.values[unseen].any()
