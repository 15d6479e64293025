"""LwF, LwF.MC, iCaRL and EWC: their losses by hand, their exemplars, and what they change about forgetting."""

import copy
import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from cases import chosen
from test_learner import RARELY, SETTINGS, blobs, counted, done, killed_at, nets, require_equal  # noqa: F401 - a fixture
from torch import nn
from torch.nn import functional as F

from models import MODELS
from ntkgen.continual.configuration import MethodOptions, RunSettings
from ntkgen.continual.exemplars import choose, herd, quota
from ntkgen.continual.heads import features_of, head_of, in_evaluation_mode
from ntkgen.continual.learner import learn
from ntkgen.continual.methods import make_method
from ntkgen.continual.methods.method import Situation
from ntkgen.continual.plan import Plan, load_data
from ntkgen.continual.reading import open_run
from ntkgen.continual.streams.incremental import Split, StreamSettings, make_stream
from ntkgen.errors import InputError, ModelError, UnknownNameError
from ntkgen.files.folder import LocalFolder

DATA = blobs()
STREAM = make_stream(StreamSettings(Split(2, 2)), DATA.labels, np.zeros(0, np.int64), 6, seed=0)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))


def method_of(name, model, **options):
    return make_method(name, Situation(STREAM, DATA.labels, 0, MethodOptions(**options), model, DATA.train.inputs))


def batch(count=10):
    ids = torch.from_numpy(STREAM.tasks[1].train[:count])
    return DATA.train.inputs(ids), torch.from_numpy(STREAM.targets(DATA.labels[ids.numpy()]))


# losses ---------------------------------------------------------------------------------------------------------------


def test_distillation_is_zero_and_without_gradient_at_the_start():
    model, (x, targets) = network(), batch()
    method = method_of("lwf", model, distillation=5.0)
    method.begin(STREAM.tasks[1], model)
    outputs = model(x)
    loss, plain = method.loss(outputs, targets, x), F.cross_entropy(outputs, targets)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-6)
    found, expected = (torch.autograd.grad(each, outputs, retain_graph=True)[0] for each in (loss, plain))
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_loss_of_lwf_by_hand():
    model, teacher, (x, targets) = network(), network(1), batch()
    method = method_of("lwf", model, distillation=0.5, temperature=3.0)
    method.begin(STREAM.tasks[1], teacher)
    outputs = model(x)
    p = (teacher(x)[:, :2] / 3).softmax(1)
    q = (outputs[:, :2] / 3).softmax(1)
    expected = F.cross_entropy(outputs, targets) + 0.5 * 9 * (p * (p / q).log()).sum(1).mean()
    assert method.loss(outputs, targets, x).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["finetune", "joint", "replay", "ewc"])
def test_the_binary_loss_by_hand(name):
    model, (x, targets) = network(), batch()
    outputs = model(x)
    p, wanted = outputs.sigmoid(), F.one_hot(targets, 6).float()
    expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum(1).mean().item()
    for reduction, factor in (("sum", 1), ("mean", 6)):
        method = method_of(name, model, loss="binary", binary_reduction=reduction)
        assert method.loss(outputs, targets, x).item() == pytest.approx(expected / factor, rel=1e-5)
    assert method_of(name, model).loss(outputs, targets, x).item() == F.cross_entropy(outputs, targets).item()


def test_the_mean_over_outputs_is_an_option_of_lwf_mc():
    model, (x, targets) = network(), batch()
    losses = [method_of("lwf-mc", model, binary_reduction=name).loss(model(x), targets, x) for name in ("sum", "mean")]
    assert losses[0].item() == pytest.approx(6 * losses[1].item(), rel=1e-6)


def test_the_loss_of_lwf_mc_by_hand():
    model, teacher, (x, targets) = network(), network(1), batch()
    method = method_of("lwf-mc", model)
    method.begin(STREAM.tasks[1], teacher)
    outputs = model(x)
    wanted = torch.cat([teacher(x)[:, :2].sigmoid(), F.one_hot(targets, 6)[:, 2:].float()], dim=1)
    s = outputs.sigmoid()
    expected = -(wanted * s.log() + (1 - wanted) * (1 - s).log()).sum(1).mean()
    assert method.loss(outputs, targets, x).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["lwf", "lwf-mc", "icarl"])
def test_a_teacher_stays_as_it_was(name):
    model, (x, targets) = network(), batch()
    method = method_of(name, model)
    method.begin(STREAM.tasks[1], model)
    before = copy.deepcopy(method.teacher.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        method.loss(model(x), targets, x).backward()
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in method.teacher.state_dict().items())
    assert all(param.grad is None for param in method.teacher.parameters())


def test_lwf_without_distillation_is_finetuning(tmp_path):
    settings = dataclasses.replace(SETTINGS, kernels="task", dense=None)
    plain = done(tmp_path / "plain", settings)
    lwf = done(tmp_path / "lwf", dataclasses.replace(settings, method="lwf", distillation=0.0))
    assert np.array_equal(plain.evaluations.loss.values, lwf.evaluations.loss.values)


def test_more_distillation_lets_old_outputs_drift_less():
    drifts = []
    for weight in (0.0, 1.0, 5.0):
        model, (x, targets) = network(), batch()
        method = method_of("lwf", model, distillation=weight)
        method.begin(STREAM.tasks[1], model)
        before = model(x)[:, :2].detach().softmax(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            method.loss(model(x), targets, x).backward()
            optimizer.step()
        drifts.append((model(x)[:, :2].softmax(1) - before).abs().mean().item())
    assert drifts[0] > 1.5 * drifts[1] > 1.5 * drifts[2]


def test_the_penalty_of_ewc_by_hand():
    model, (x, targets) = network(), batch()
    method = method_of("ewc", model, penalty=3.0)
    method.begin(STREAM.tasks[0], model)
    method.end(STREAM.tasks[0], model)
    (anchor,) = method.anchors
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1)
    expected = F.cross_entropy(model(x), targets) + 1.5 * sum((fisher * 0.01).sum() for fisher, _ in anchor.values())
    assert method.loss(model(x), targets, x).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_fisher_information_is_that_of_drawn_labels():
    """Of a linear model the expectation over labels is known: Σ_i Σ_k p_k (1 − p_k) x² for each weight."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    method = method_of("ewc", model)
    method.end(STREAM.tasks[0], model)
    x = DATA.train.inputs(torch.from_numpy(STREAM.tasks[0].train)).flatten(1)
    p = model(x).softmax(1).detach()
    expected = torch.einsum("ik,ij->kj", p * (1 - p), x.square()) / len(x)
    fisher = method.anchors[0]["1.weight"][0]
    assert float((fisher - expected).norm() / expected.norm()) < 0.4
    assert float(fisher.min()) >= 0


# exemplars ------------------------------------------------------------------------------------------------------------


def unit(count, size, seed=0):
    features = np.random.default_rng(seed).standard_normal((count, size)) + 1
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_herding_is_the_greedy_choice():
    features = unit(12, 4)
    chosen, mean = herd(features, 4), features.mean(0)
    for k in range(1, 5):
        rest = [i for i in range(12) if i not in chosen[: k - 1]]
        costs = {i: np.linalg.norm(mean - features[[*chosen[: k - 1], i]].mean(0)) for i in rest}
        assert chosen[k - 1] == min(costs, key=costs.get)
    assert len(set(chosen)) == 4


def test_means_of_herded_exemplars_are_closer_than_those_of_random_ones():
    """For every number of exemplars, averaged over ten classes."""
    errors = {kind: np.zeros(40) for kind in ("herding", "random")}
    for seed in range(10):
        features = unit(40, 6, seed)
        for kind in errors:
            ids = choose(kind, np.arange(40), features, 40, np.random.default_rng(seed))
            assert sorted(ids) == list(range(40))
            means = features[ids].cumsum(0) / np.arange(1, 41)[:, None]
            errors[kind] += np.linalg.norm(features.mean(0) - means, axis=1)
    assert (errors["herding"][:-1] < errors["random"][:-1]).all()
    assert max(errors["herding"][-1], errors["random"][-1]) < 1e-12


def test_herding_of_two_is_nearly_as_good_as_the_best_pair():
    features = unit(12, 4)
    best = min(np.linalg.norm(features.mean(0) - features[list(pair)].mean(0)) for pair in combinations(range(12), 2))
    assert np.linalg.norm(features.mean(0) - features[herd(features, 2)].mean(0)) <= 3 * best


def test_random_exemplars_are_seeded_and_different():
    first, same = (choose("random", np.arange(40), unit(40, 3), 20, np.random.default_rng(1)) for _ in range(2))
    assert first.tolist() == same.tolist()
    assert len(set(first)) == 20
    with pytest.raises(UnknownNameError, match="herding"):
        choose("hering", np.arange(3), unit(3, 3), 1, np.random.default_rng(0))


@pytest.mark.parametrize(("rounding", "counts"), [("down", (10, 5, 3)), ("up", (10, 5, 4))])
def test_every_class_has_its_quota_and_lists_are_shortened_from_their_end(rounding, counts):
    model = network()
    method = method_of("icarl", model, buffer=20, exemplar_rounding=rounding)
    kept = {}
    for task, count in zip(STREAM.tasks, counts, strict=True):
        method.begin(task, model)
        method.end(task, model)
        assert {target: len(ids) for target, ids in method.exemplars.items()} == dict.fromkeys(
            range(2 * task.number + 2), count
        )
        most = 20 if rounding == "down" else 20 + 2 * task.number + 1
        assert sum(len(ids) for ids in method.exemplars.values()) <= most
        for target, ids in kept.items():
            assert method.exemplars[target] == ids[:count]
        kept = {target: list(ids) for target, ids in method.exemplars.items()}
    assert {DATA.labels[sample] for sample in method.exemplars[3]} == {3}


def test_a_budget_below_the_number_of_classes_is_refused():
    with pytest.raises(InputError, match="too small for 6 classes"):
        method_of("icarl", network(), buffer=5)
    assert quota(20, 6) == 3


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_nearest_mean_is_that_of_a_plain_loop(mirrored):
    model, (x, _) = network().eval(), batch(20)
    method = method_of("icarl", model, buffer=12, mirrored=mirrored)
    for task in STREAM.tasks[:2]:
        method.begin(task, model)
        method.end(task, model)
    method.begin(STREAM.tasks[2], model)  # its classes have no exemplars yet
    method.before_evaluation(model)
    new = {target: STREAM.tasks[2].train[DATA.labels[STREAM.tasks[2].train] == target] for target in (4, 5)}
    members = {**method.exemplars, **new}
    with torch.no_grad():
        found = method.predict(model, x, model(x)).argmax(1)
        head = head_of(model, 6)
        means = []
        for target in range(6):
            images = DATA.train.inputs(torch.tensor(members[target]))
            phi = features_of(model, head, torch.cat([images, images.flip(-1)]) if mirrored else images)
            means.append(F.normalize(phi.mean(0), dim=0))
        phi = features_of(model, head, x)
        expected = [int(np.argmin([float((f - mean).norm()) for mean in means])) for f in phi]
    assert found.tolist() == expected


def test_separable_features_are_classified_without_an_error():
    data = blobs(spread=0.02)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 6))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(12))
    method = make_method("icarl", Situation(STREAM, data.labels, 0, MethodOptions(), model, data.train.inputs))
    for task in STREAM.tasks:
        method.begin(task, model)
        method.end(task, model)
    method.before_evaluation(model)
    x = data.train.inputs(torch.arange(len(data.labels)))
    with torch.no_grad():
        found = method.predict(model, x, model(x)).argmax(1)
        by_head = model(x).argmax(1)
    assert found.tolist() == STREAM.targets(data.labels).tolist()
    assert by_head.tolist() != found.tolist()


@pytest.mark.parametrize(("name", "size"), [("small", 2), ("resnet20", 8), ("resnet32", 8), ("resnet56", 8)])
def test_features_have_norm_one_and_do_not_depend_on_the_batch(name, size):
    torch.manual_seed(0)
    model = network() if name == "small" else MODELS[name](num_classes=6)
    x = torch.randn(20, 3, size, size)
    model(x)  # statistics of batch norm
    phi = in_evaluation_mode(model, x, head_of(model, 6))
    assert phi.shape == (20, head_of(model, 6).in_features)
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(phi[:3], in_evaluation_mode(model, x[:3], head_of(model, 6)), rtol=1e-4, atol=1e-5)


def test_a_network_without_a_head_is_refused():
    with pytest.raises(ModelError, match="has no head"):
        method_of("icarl", nn.Sequential(nn.Flatten(), nn.Linear(12, 5))).begin(STREAM.tasks[0], nn.Flatten())


# runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", chosen(["lwf", "icarl", "ewc"], ["icarl"]))
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path, monkeypatch, nets, name):  # noqa: F811 - the fixture
    settings = dataclasses.replace(SETTINGS, method=name, buffer=18)
    moment = counted(tmp_path / "undisturbed", monkeypatch, settings) * 3 // 5
    assert killed_at(tmp_path / "seed0", monkeypatch, moment, settings)
    done(tmp_path / "seed0", settings)
    require_equal(tmp_path / "seed0", tmp_path / "undisturbed")


def final_accuracy(place, settings, method, **options):
    """Mean of the final average accuracy over three seeds."""
    settings = dataclasses.replace(settings, method=method, kernels="task", dense=None, evaluations="task", **options)
    plans = [Plan.of(dataclasses.replace(settings, seed=seed), data_of(settings)) for seed in range(3)]
    for plan in plans:
        learn(plan, LocalFolder(place / f"{method}{plan.settings.seed}", fsync=False), torch.device("cpu"))
    runs = [open_run(place / f"{method}{seed}") for seed in range(3)]
    return np.mean([run.matrix().average_accuracy for run in runs])


def data_of(settings):
    return blobs() if settings.dataset == "blobs" else load_data(settings)


@pytest.mark.slow
def test_methods_are_ordered_as_published_on_blobs(tmp_path, nets):  # noqa: F811 - the fixture
    settings = dataclasses.replace(SETTINGS, epochs=15, buffer=18)
    finetune, distilled = (final_accuracy(tmp_path, settings, name) for name in ("finetune", "lwf-mc"))
    drawn, herded = (
        final_accuracy(tmp_path / kind, settings, "icarl", exemplars=kind) for kind in ("random", "herding")
    )
    assert finetune + 0.05 < distilled
    assert distilled + 0.05 < drawn
    assert drawn < herded + 0.02


@pytest.mark.slow
def test_methods_are_ordered_as_published_on_digits(tmp_path):
    """Published for CIFAR-100 in ten tasks: finetune 0.09, LwF 0.09, LwF.MC 0.28, iCaRL 0.48."""
    settings = RunSettings(
        split="2/2", width=100, epochs=10, learning_rate=1e-3, buffer=100, probe_per_class=1, output="sum"
    )
    names = ("finetune", "lwf", "lwf-mc", "icarl")
    finetune, lwf, distilled, icarl = (final_accuracy(tmp_path, settings, name) for name in names)
    assert finetune + 0.02 < lwf
    assert lwf + 0.02 < distilled
    assert distilled + 0.3 < icarl


def test_accuracy_of_the_head_is_kept_beside_that_of_the_method(tmp_path):
    run = done(tmp_path / "seed0", dataclasses.replace(SETTINGS, method="icarl", epochs=4, buffer=18, **RARELY))
    assert not np.array_equal(run.evaluations.accuracy.values, run.evaluations.head_accuracy.values)
    plain = done(tmp_path / "plain", dataclasses.replace(SETTINGS, epochs=1, **RARELY))
    assert np.array_equal(plain.evaluations.accuracy.values, plain.evaluations.head_accuracy.values)
