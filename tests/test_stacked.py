"""Optimizers of stacks: noise, state, groups, closures, parameters without a gradient, and what is refused."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ntkgen.continual.optim import LEARNERS, PGD, SGD, UPGD, make_optimizer
from ntkgen.continual.optim.noise import SHARED
from ntkgen.errors import InputError, ShapeError, UnknownNameError

SHAPES = [(2, 3, 2, 2), (2,), (4, 3), (4,)]
FLOAT32 = [(name, members) for name in LEARNERS if not LEARNERS[name].has_gates for members in (None, 2)]


def drawn(seed, members=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    lead = () if members is None else (members,)
    return [torch.randn(*lead, *shape, generator=generator, dtype=dtype) for shape in SHAPES]


def parameters(seed, members=None, dtype=torch.float32):
    return [nn.Parameter(each) for each in drawn(seed, members, dtype)]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def train(optimizer, params, steps, members=None):
    for step in steps:
        for param, grad in zip(params, drawn(100 + step, members, params[0].dtype), strict=True):
            param.grad = grad
        optimizer.step(curvature=drawn(200 + step, members, params[0].dtype))


def values(params):
    return [param.detach().clone() for param in params]


def require_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# noise ----------------------------------------------------------------------------------------------------------------


def test_the_noise_of_a_network_does_not_depend_on_the_others():
    """With lr 1 and no gradient, a step of PGD subtracts the noise: the same bits alone, and among three."""
    found = []
    for seeds in ([5], [4, 5, 6]):
        params = [nn.Parameter(torch.zeros(len(seeds), *shape)) for shape in SHAPES]
        optimizer = PGD(params, lr=1.0, sigma=1.0, members=len(seeds), generators=generators(*seeds))
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        found.append([param[len(seeds) // 2].detach() for param in params])
    require_equal(*found)
    numbers = torch.empty(sum(part.numel() for part in found[0])).normal_(generator=generators(5)[0])
    assert torch.equal(torch.cat([part.flatten() for part in found[0]]), -numbers)


def test_threads_draw_the_same_noise():
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            params = [nn.Parameter(torch.zeros(5, SHARED + 3))]
            optimizer = PGD(params, lr=1.0, sigma=1.0, members=5, generators=generators(*range(5)))
            params[0].grad = torch.zeros_like(params[0])
            optimizer.step()
            optimizer.step()
            found.append(values(params))
    finally:
        torch.set_num_threads(threads)
    require_equal(*found)
    assert found[0][0].std() > 1


@pytest.mark.parametrize("threads", [1, 2])
def test_noise_drawn_ahead_is_the_same(threads):
    """The numbers, the state and the generators, also where the noise stops, a state is loaded, or a copy is made."""

    def learnt(*, ahead):
        params = [nn.Parameter(torch.zeros(3, SHARED + 1)), nn.Parameter(torch.zeros(3, 2))]
        optimizer = PGD(params, lr=1.0, sigma=1.0, members=3, generators=generators(0, 1, 2))
        optimizer.draws_ahead = ahead
        found = []

        def steps(optimizer, params, count):
            for _ in range(count):
                for param in params:
                    param.grad = torch.zeros_like(param)
                optimizer.step()
                found.extend(values(params))

        steps(optimizer, params, 2)
        kept = copy.deepcopy(optimizer.state_dict())
        found.extend(kept["generators"])
        steps(optimizer, params, 2)
        optimizer.param_groups[0]["sigma"] = torch.tensor([0.0, 1.0, 0.5])
        steps(optimizer, params, 2)
        optimizer.param_groups[0]["sigma"] = 0.0
        steps(optimizer, params, 1)
        optimizer.param_groups[0]["sigma"] = 1.0
        steps(optimizer, params, 1)
        optimizer.load_state_dict(kept)
        steps(optimizer, params, 2)
        other = pickle.loads(pickle.dumps(optimizer))
        steps(other, other.param_groups[0]["params"], 1)
        steps(optimizer, params, 1)
        found.extend(optimizer.state_dict()["generators"])
        assert other.draws_ahead is ahead
        return found

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        require_equal(learnt(ahead=True), learnt(ahead=False))
    finally:
        torch.set_num_threads(before)


def test_parameters_that_are_columns_of_one_matrix_are_changed_in_place():
    separate = parameters(0, 3)
    matrix = torch.cat([each.detach().flatten(1) for each in separate], 1)
    sizes = [each[0].numel() for each in separate]

    def columns(source):
        parts = source.split(sizes, 1)
        return [part.view(each.shape) for part, each in zip(parts, separate, strict=True)]

    together = [part.requires_grad_() for part in columns(matrix)]
    optimizers = [
        UPGD(each, sigma=0.1, members=3, generators=generators(1, 2, 3), noise_scale="grad")
        for each in (separate, together)
    ]
    for optimizer, params in zip(optimizers, (separate, together), strict=True):
        train(optimizer, params, range(2), 3)
    assert optimizers[1]._layout.is_in_place
    assert not optimizers[0]._layout.is_in_place
    require_equal(values(together), values(separate))
    require_equal(columns(matrix), values(together))
    other = matrix.clone()  # the parameters move to other memory
    for param, moved in zip(together, columns(other), strict=True):
        param.data = moved
    for optimizer, params in zip(optimizers, (separate, together), strict=True):
        train(optimizer, params, range(2, 4), 3)
    require_equal(columns(other), values(separate))
    assert not torch.equal(matrix, other)


@pytest.mark.parametrize("sigma", [0.0, torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.1])])
def test_nothing_is_drawn_without_noise(sigma):
    own = generators(0, 1)
    before = [each.get_state() for each in own]
    params = parameters(0, members=2)
    train(UPGD(params, sigma=sigma, members=2, generators=own), params, [0], members=2)
    is_drawn = [not torch.equal(each.get_state(), state) for each, state in zip(own, before, strict=True)]
    assert is_drawn == [False, bool((torch.as_tensor(sigma) > 0).any())]


def test_noise_is_drawn_from_the_global_source_by_default():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        params = parameters(0)
        train(UPGD(params, sigma=0.1), params, [0])
        found.append(values(params))
    require_equal(found[0], found[1])
    assert not torch.equal(found[0][0], found[2][0])


# the state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "members"), FLOAT32)
def test_a_restored_optimizer_continues_with_the_same_bits(name, members):
    seeds = range(members or 1)
    params = parameters(0, members)
    optimizer = make_optimizer(name, params, members, generators(*seeds))
    train(optimizer, params, [0, 1], members)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    later = [nn.Parameter(param.detach().clone()) for param in params]
    restored = make_optimizer(name, later, members, generators(*[9] * len(seeds)))
    restored.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    in_memory = [nn.Parameter(param.detach().clone()) for param in params]
    shared = make_optimizer(name, in_memory, members, generators(*[9] * len(seeds)))
    shared.load_state_dict(optimizer.state_dict())
    for each, its in ((optimizer, params), (restored, later), (shared, in_memory)):
        train(each, its, [2, 3], members)
    require_equal(values(params), values(later))
    require_equal(values(params), values(in_memory))


def test_a_copy_and_a_pickle_continue_with_the_same_bits():
    params = parameters(0, members=2)
    optimizer = UPGD(params, sigma=0.0, order="second", members=2)
    train(optimizer, params, [0], members=2)
    for made in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = made.param_groups[0]["params"]
        train(made, own, [1], members=2)
        expected = [nn.Parameter(each.detach().clone()) for each in params]
        other = UPGD(expected, sigma=0.0, order="second", members=2)
        other.load_state_dict(optimizer.state_dict())
        train(other, expected, [1], members=2)
        require_equal(values(own), values(expected))


def test_the_state_is_that_of_each_parameter_in_its_shape():
    for members in (None, 2):
        params = parameters(0, members)
        optimizer = UPGD(params, members=members, generators=generators(*range(members or 1)))
        train(optimizer, params, [0], members)
        for param in params:
            assert optimizer.state[param].keys() == {"step", "utility"}
            assert optimizer.state[param]["utility"].shape == param.shape


def test_a_state_that_is_cleared_or_changed_is_used():
    """The state may be emptied, as at the boundary of a task, or its tensors changed or replaced."""

    def trained(change):
        params = parameters(0, dtype=torch.float64)
        optimizer = UPGD(params, sigma=0.0, beta_utility=0.5)
        train(optimizer, params, [0, 1])
        change(optimizer, params)
        train(optimizer, params, [2])
        return params, optimizer

    params, cleared = trained(lambda optimizer, _: optimizer.state.clear())
    assert all(cleared.state[param]["step"] == 1 for param in params)
    kept, _ = trained(lambda *_: None)
    assert not torch.equal(params[0], kept[0])
    zeroed, _ = trained(lambda optimizer, own: [optimizer.state[each]["utility"].zero_() for each in own])

    def replace(optimizer, own):
        for each in own:
            optimizer.state[each]["utility"] = torch.zeros_like(each)

    replaced, _ = trained(replace)
    require_equal(values(zeroed), values(replaced))
    assert not torch.equal(zeroed[0], kept[0])


@pytest.mark.parametrize("name", ["adam", "rwalk", "si", "upgd_fo_local"])
def test_a_parameter_whose_state_is_zero_begins_anew(name):
    """As after the reset of a network: every tensor of the state is set to zero."""
    params = parameters(0)
    optimizer = make_optimizer(name, params, generators=generators(0))
    train(optimizer, params, [0, 1])
    for param in params:
        for value in optimizer.state[param].values():
            value.zero_()
    others = [nn.Parameter(param.detach().clone()) for param in params]
    source = torch.Generator()
    source.set_state(optimizer.generators[0].get_state())
    new = make_optimizer(name, others, generators=[source])
    train(optimizer, params, [2, 3])
    train(new, others, [2, 3])
    require_equal(values(params), values(others))


# parameters and steps -------------------------------------------------------------------------------------------------


def test_a_parameter_without_a_gradient_keeps_its_bits_and_its_state():
    params = parameters(0)
    optimizer = UPGD(params, weight_decay=0.1, generators=generators(0))
    train(optimizer, params, [0])
    before = values(params)
    for index, param in enumerate(params):
        param.grad = None if index == 1 else torch.ones_like(param)
    optimizer.step()
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[0], before[0])
    assert [optimizer.state[param]["step"] for param in params] == [2, 1, 2, 2]
    train(optimizer, params, [1])  # steps that differ have corrections of their own
    assert [optimizer.state[param]["step"] for param in params] == [3, 2, 3, 3]
    for param in params:
        param.grad = None
    assert optimizer.step() is None


def test_groups_have_learning_rates_of_their_own_and_one_largest_utility():
    """With a learning rate of 0 in one group, the other one moves as in an optimizer without groups."""
    params, others = parameters(0), parameters(0)
    groups = [{"params": params[:2], "lr": 0.0}, {"params": params[2:], "lr": 0.1}]
    train(UPGD(groups, lr=0.5, sigma=0.0), params, [0])
    train(UPGD(others, lr=0.1, sigma=0.0), others, [0])
    require_equal(values(params[:2]), drawn(0)[:2])
    for found, expected in zip(params[2:], others[2:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_closure_computes_the_gradient_anew_and_its_loss_is_returned():
    param = nn.Parameter(torch.tensor([3.0]))
    optimizer = SGD([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert param.item() == pytest.approx(3.0 - 0.1 * 6.0)


def test_a_schedule_of_torch_sets_the_learning_rate():
    param = nn.Parameter(torch.zeros(1))
    optimizer = SGD([param], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        param.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    assert param.item() == pytest.approx(-1.5)


def test_parameters_need_not_be_contiguous():
    """As those of convolutions in the channels-last format."""
    plain = nn.Conv2d(3, 2, 2)
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 5, 5, generator=generators(0)[0])
    for net in (plain, other):
        optimizer = UPGD(net.parameters(), lr=0.1, sigma=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert other.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain.weight, other.weight)


def test_a_growing_head_keeps_the_utilities_of_its_old_rows():
    from ntkgen.continual.heads import grow_head

    head, larger = nn.Linear(3, 2), nn.Linear(3, 4)
    optimizer = UPGD(head.parameters(), sigma=0.0)
    head(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = optimizer.state[head.weight]["utility"].clone()
    grow_head(head, larger, optimizer)
    utility = optimizer.state[head.weight]["utility"]
    assert torch.equal(utility, torch.cat([before, torch.zeros(2, 3)]))
    head(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state[head.weight]["utility"].shape == (4, 3)


# what is refused ------------------------------------------------------------------------------------------------------


def with_gradients(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    return optimizer


MISTAKES = {
    "no curvature": (lambda: with_gradients(UPGD(parameters(0), order="second")).step(), InputError, "no curvature"),
    "curvature of one": (
        lambda: with_gradients(UPGD(parameters(0), order="second")).step(curvature=drawn(0)[:1]),
        InputError,
        "found 1 tensors",
    ),
    "curvature in another order": (
        lambda: with_gradients(UPGD(parameters(0), order="second")).step(curvature=drawn(0)[::-1]),
        ShapeError,
        "expected the shape",
    ),
    "no stack": (lambda: SGD(parameters(0), members=3), ShapeError, "expected 3 as the first axis"),
    "generators": (lambda: PGD(parameters(0), generators=generators(0, 1)), InputError, "expected 1 generators"),
    "tensor": (lambda: SGD(parameters(0), lr=torch.ones(2)), ShapeError, "`lr` does not fit"),
    "range in a tensor": (
        lambda: UPGD(parameters(0, 2), beta_utility=torch.tensor([0.9, 1.0]), members=2),
        InputError,
        "`beta_utility`.*from 0 to less than 1",
    ),
    "range": (lambda: SGD(parameters(0), lr=-1.0), InputError, "`lr`.*0 or more, found -1.0"),
    "range in a group": (lambda: SGD([{"params": parameters(0), "lr": -1.0}]), InputError, "found -1.0"),
    "choice": (lambda: UPGD(parameters(0), order="third"), UnknownNameError, "Unknown `order` 'third'"),
    "choice in a group": (
        lambda: UPGD([{"params": parameters(0), "largest": "raw"}]),
        InputError,
        "`largest` 'corrected' as in all groups",
    ),
    "kinds": (
        lambda: SGD([*parameters(0), nn.Parameter(torch.zeros(2, dtype=torch.float64))]),
        InputError,
        "trained together",
    ),
    "learner": (
        lambda: make_optimizer("upgd_fo_globl", parameters(0)),
        UnknownNameError,
        "Did you mean upgd_fo_global",
    ),
    "option": (lambda: make_optimizer("pgd", parameters(0), sigme=1.0), UnknownNameError, "Did you mean sigma"),
    "option of others": (lambda: make_optimizer("pgd", parameters(0), kappa=1.0), UnknownNameError, "Known: lr, sigma"),
    "word": (lambda: make_optimizer("pgd", parameters(0), sigma="high"), InputError, "found 'high'"),
    "truth": (lambda: make_optimizer("pgd", parameters(0), sigma=True), InputError, "found True"),
}


@pytest.mark.parametrize(("make", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_sparse_gradient_is_refused():
    layer = nn.Embedding(3, 2, sparse=True)
    layer(torch.tensor([0])).sum().backward()
    with pytest.raises(InputError, match="sparse"):
        SGD(layer.parameters()).step()


def test_a_hyper_parameter_may_be_a_tensor_of_one_number():
    assert SGD(parameters(0), lr=torch.tensor(0.5)).param_groups[0]["lr"] == 0.5
    stack = SGD(parameters(0, 2), lr=torch.tensor([0.5, 0.1]), members=2)
    np.testing.assert_allclose(stack.param_groups[0]["lr"], [0.5, 0.1])
