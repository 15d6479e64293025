"""Kernels of any function, of samples of any form, and of any part of the parameters.

Each equals a double loop of `torch.autograd.grad` in float64, whatever computes it.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, vmap

import ntkgen
from ntkgen.errors import FingerprintError, InputError, ModelError, NtkgenError, ShapeError
from ntkgen.files.folder import LocalFolder
from ntkgen.jacobian.adapter import Given, Target
from ntkgen.jacobian.samples import data_of
from ntkgen.store.opening import has_store

TOLERANCE = 1e-10


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape, seed=0):
    return torch.randint(1, 30, shape, generator=torch.Generator().manual_seed(seed))


def seeded(factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory().double().eval()


def rows_of(outputs, params):
    """One backward pass per sample and output; a complex parameter has two columns for each of its numbers."""
    rows = []
    for output in outputs.flatten():
        grads = torch.autograd.grad(output, params, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(param) if grad is None else grad for param, grad in zip(params, grads, strict=True)]
        flat = [torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad for grad in filled]
        rows.append(torch.cat([grad.flatten() for grad in flat]))
    return torch.stack(rows)


def loop(outputs_of_one, count, params):
    """The kernel by a double loop over samples and outputs."""
    J = torch.cat([rows_of(outputs_of_one(index), params) for index in range(count)])
    return J @ J.T


def assert_equal(kernel, expected):
    assert kernel.dtype == torch.float64
    assert kernel.shape == expected.shape
    assert float((kernel - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def kernels_of(model, x, **asked):
    """The kernel by each entry point in memory."""
    operator = ntkgen.NTKOperator(model, x, **asked)
    return {
        "ntk": ntkgen.ntk(model, x, **asked),
        "reference": ntkgen.reference_ntk(model, x, **asked),
        "function": ntkgen.KernelFunction(model, x, **asked)(model),
        "operator": operator @ torch.eye(operator.shape[1], dtype=torch.float64),
    }


def assert_all_equal(expected, model, x, **asked):
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    for kernel in kernels_of(model, x, **asked).values():
        assert_equal(kernel, expected)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]


# networks of language -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return seeded(lambda: GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    return seeded(lambda: BertModel(config))


@pytest.fixture(scope="module")
def prompts():
    return {"input_ids": tokens(4, 5), "attention_mask": torch.ones(4, 5, dtype=torch.int64)}


def one_of(batch, index):
    return {name: value[index : index + 1] for name, value in batch.items()}


def test_the_last_logits_of_a_gpt2(gpt2, prompts):
    expected = loop(lambda i: gpt2(**one_of(prompts, i)).logits[:, -1, [5, 7]], 4, list(gpt2.parameters()))
    assert_all_equal(expected, gpt2, prompts, select="logits[:, -1, [5, 7]]")


def test_a_selection_may_be_a_function_and_logits_are_taken_without_one(gpt2, prompts):
    ids = prompts["input_ids"][:2, :1]
    by_text = ntkgen.ntk(gpt2, {"input_ids": ids}, select="logits")
    assert torch.equal(by_text, ntkgen.ntk(gpt2, {"input_ids": ids}))
    assert torch.equal(by_text, ntkgen.ntk(gpt2, ids, select=lambda result: result.logits))
    assert torch.equal(by_text, ntkgen.ntk(gpt2, ids.numpy()))
    assert by_text.shape == (2 * 30, 2 * 30)


def test_padded_sequences_have_the_kernel_of_those_that_are_not_padded(gpt2):
    short, long = tokens(1, 3), tokens(1, 5, seed=1)
    padded = torch.cat([short, torch.zeros(1, 2, dtype=torch.int64)], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    batch = {"input_ids": torch.cat([padded, long]), "attention_mask": mask}

    def last(module, batch):
        at = batch["attention_mask"].sum(1) - 1
        logits = module(**batch).logits
        return logits[torch.arange(len(logits)), at][:, [5, 7]]

    kernel = ntkgen.ntk(gpt2, batch, function=last)
    parts = [rows_of(gpt2(ids).logits[:, -1, [5, 7]], list(gpt2.parameters())) for ids in (short, long)]
    J = torch.cat(parts)
    assert_equal(kernel, J @ J.T)


def test_a_bert_with_a_mask_and_three_arguments(bert):
    batch = (tokens(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]), torch.zeros(3, 4).long())
    params = list(bert.parameters())
    expected = loop(lambda i: bert(*(part[i : i + 1] for part in batch)).pooler_output[:, :2], 3, params)
    assert_all_equal(expected, bert, batch, select="pooler_output[:, :2]")
    assert torch.equal(
        ntkgen.ntk(bert, batch, select="1[:, :2]"), ntkgen.ntk(bert, batch, select="pooler_output[:, :2]")
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_adapters_of_a_gpt2_alone(gpt2, prompts):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(gpt2), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, param in adapted.named_parameters():
            param.requires_grad = True
            if "lora_" in name:
                nn.init.normal_(param.data, std=0.1)
    adapted = adapted.double().eval()
    lora = [param for name, param in adapted.named_parameters() if "lora_" in name]
    assert len(lora) == 2
    expected = loop(lambda i: adapted(**one_of(prompts, i)).logits[:, -1, :3], 4, lora)
    assert_all_equal(expected, adapted, prompts, select="logits[:, -1, :3]", params="*lora_*")


# functions that differentiate -----------------------------------------------------------------------------------------


class Energy(nn.Module):
    """The energy of some atoms: a sum over pairs of a function of their distance."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, positions):
        i, j = torch.triu_indices(positions.shape[1], positions.shape[1], 1)
        return self.pair((positions[:, i] - positions[:, j]).square().sum(-1, keepdim=True)).sum((1, 2))


def forces(module, positions):
    positions = positions.requires_grad_()
    return -torch.autograd.grad(module(positions).sum(), positions, create_graph=True)[0]


def test_forces():
    model, x = seeded(Energy), draw(4, 3, 2)
    expected = loop(lambda i: forces(model, x[i : i + 1].clone()), 4, list(model.parameters()))
    assert_all_equal(expected, model, x, function=forces)
    assert_all_equal(loop(lambda i: model(x[i : i + 1]), 4, list(model.parameters())), model, x)  # (samples,)


def solution():
    return seeded(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)))


def by_autograd(module, x):
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    seconds = [torch.autograd.grad(first[:, axis].sum(), x, create_graph=True)[0][:, axis] for axis in range(2)]
    return sum(seconds) - x.detach().square().sum(1)


def by_func(module, x):
    params = dict(module.named_parameters())

    def u(point):
        return functional_call(module, params, (point,)).squeeze(-1)

    return vmap(hessian(u))(x).diagonal(dim1=1, dim2=2).sum(1, keepdim=True) - x.square().sum(1, keepdim=True)


def values(module, x):
    return module(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # forward mode, at its first use
@pytest.mark.parametrize("residual", [by_autograd, by_func])
def test_the_residual_of_poissons_equation(residual):
    model, x = solution(), draw(5, 2)
    expected = loop(lambda i: by_autograd(model, x[i : i + 1].clone()), 5, list(model.parameters()))
    assert_all_equal(expected, model, x, function=residual)


def test_solution_and_residual_with_their_cross_blocks():
    model, x = solution(), draw(4, 2)
    both = [values, by_autograd]

    def outputs_of(i):
        return torch.cat([f(model, x[i : i + 1].clone()).reshape(1, 1) for f in both], dim=1)

    expected = loop(outputs_of, 4, list(model.parameters()))
    assert_all_equal(expected, model, x, function=both)
    cross = ntkgen.ntk(model, x, function=both).reshape(4, 2, 4, 2)[:, 0, :, 1]
    assert_equal(cross, expected.reshape(4, 2, 4, 2)[:, 0, :, 1])


def test_other_samples_in_the_columns():
    model, x = solution(), draw(7, 2)
    square = ntkgen.reference_ntk(model, x, function=by_autograd)
    for entry in (ntkgen.ntk, ntkgen.reference_ntk, lambda *a, **k: ntkgen.KernelFunction(*a, **k)(model)):
        assert_equal(entry(model, x[:4], x[4:], function=by_autograd), square[:4, 4:])
    operator = ntkgen.NTKOperator(model, x[:4], x[4:], function=by_autograd)
    assert_equal(operator @ torch.eye(3).double(), square[:4, 4:])
    assert_equal(operator.T @ torch.eye(4).double(), square[4:, :4])


def test_a_function_of_the_rows_against_another_of_the_columns(tmp_path):
    model, x = solution(), draw(7, 2)
    both = ntkgen.reference_ntk(model, x, function=(values, by_autograd)).reshape(7, 2, 7, 2)[:, 0, :, 1]
    asked = {"function": values, "columns_function": by_autograd}
    assert_all_equal(both, model, x, **asked)
    assert_equal(ntkgen.ntk(model, x[:5], x[2:], **asked), both[:5, 2:])
    assert_equal(ntkgen.ntk(model, x, columns_function=by_autograd), both)
    store = stored(tmp_path / "k.zarr", model, x, x[:3], **asked)
    assert_equal(torch.from_numpy(store.array[...]), both[:, :3])
    assert store.manifest.identity["columns_function"] == ["test_adapter.by_autograd"]
    with pytest.raises(ModelError, match="different numbers of outputs: expected equal ones, found 1 and 2"):
        ntkgen.ntk(model, x, function=values, columns_function=(values, by_autograd))


# complex numbers ------------------------------------------------------------------------------------------------------


class Spectral(nn.Module):
    """One layer of a Fourier neural operator, whose output is left complex."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(1, 3)
        self.weight = nn.Parameter(torch.randn(3, 2, 3, dtype=torch.complex64))

    def forward(self, x):
        return torch.einsum("bkc,cok->bko", torch.fft.rfft(torch.tanh(self.lift(x)), dim=1)[:, :3], self.weight)


def complex_layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Spectral()
    model.lift.double()
    model.weight = nn.Parameter(model.weight.to(torch.complex128))
    return model


def test_complex_parameters_and_complex_outputs():
    model, x = complex_layer(), draw(3, 8, 1)
    params = list(model.parameters())
    expected = loop(lambda i: torch.view_as_real(model(x[i : i + 1])), 3, params)
    assert expected.shape == (36, 36)
    assert_all_equal(expected, model, x)


# forms of samples -----------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, a, b):
        return self.fc(a) * b


def test_a_tuple_and_a_dictionary_are_arguments_and_a_list_is_one_tensor():
    model = seeded(TwoInputs)
    a, b = draw(4, 3), draw(4, 2, seed=1)
    expected = loop(lambda i: model(a[i : i + 1], b[i : i + 1]), 4, list(model.parameters()))
    assert_all_equal(expected, model, (a, b))
    assert_equal(ntkgen.ntk(model, {"b": b.numpy(), "a": a}), expected)
    linear = seeded(lambda: nn.Linear(3, 2))
    of_tensor = ntkgen.ntk(linear, a)
    for x in (list(a), list(a.numpy())):
        assert torch.equal(ntkgen.ntk(linear, x), of_tensor)
    for x in (a.tolist(), tuple(map(tuple, a.tolist()))):
        assert torch.equal(ntkgen.ntk(linear, x), ntkgen.ntk(linear, a.float()))
    assert_equal(ntkgen.ntk(linear, (a,)), of_tensor)


def test_samples_are_shared_and_numbers_of_equal_samples_are_equal():
    x = draw(5, 2)
    x[1] = x[0]
    given = Given.of(solution(), (x,), (x[:2],))
    assert copy.deepcopy(given.model)._ntkgen_data.leaves[0] is given.model._ntkgen_data.leaves[0]
    assert given.rows.tolist() == [0, 0, 2, 3, 4]
    assert given.columns.tolist() == [0, 0]
    assert [tuple(side.shape) for side in given.data.sides()] == [(5, 2), (2, 2)]


def test_a_plain_call_has_no_adapter():
    model, x = solution(), draw(3, 2)
    assert Given.of(model, x).model is model
    with_form = Given.of(model, x, None, Target.of(None, None, "*weight"))
    assert with_form.model is not model
    restored = pickle.loads(pickle.dumps(with_form.model))  # as a worker of a cluster gets it
    assert list(restored.state_dict()) == list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert restored.get_parameter("0.weight") is restored.state_dict(keep_vars=True)["0.weight"]


KINDS = []  # global, because a list in a closure is copied with the network


def seen(module, batch):
    KINDS.append([part.dtype for part in batch])
    return module(batch[0])


def test_integers_are_kept_and_floats_are_cast():
    batch = (draw(3, 2).float(), torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
    ntkgen.ntk(solution().float(), batch, function=seen)
    rest = [torch.int64, torch.bool]
    assert [torch.float64, *rest] in KINDS
    assert [torch.float32, *rest] in KINDS


# functions of a user --------------------------------------------------------------------------------------------------


def test_a_function_may_refer_to_the_network():
    model, x = solution(), draw(3, 2)
    expected = ntkgen.ntk(model, x)
    assert_equal(ntkgen.ntk(model, x, function=lambda module, batch: model(batch)), expected)

    class Problem:
        def residual(self, module, batch):
            return module(batch) * 2

    assert_equal(ntkgen.ntk(model, x, function=Problem().residual), 4 * expected)


def test_a_compiled_network_keeps_its_wrappers_and_plain_names():
    model, x = solution(), draw(3, 2)
    expected = ntkgen.ntk(model, x, params="2.*")
    inside = nn.Sequential(torch.compile(model[0]), model[1], torch.compile(model[2]))
    for compiled in (torch.compile(model), inside):
        names = [name for name, _ in compiled.named_modules()]
        assert_equal(ntkgen.ntk(compiled, x, function=values, params="2.*"), expected)
        assert [name for name, _ in compiled.named_modules()] == names


def test_nodes_of_a_graph_are_samples():
    model, X = solution(), draw(6, 2)
    A = draw(6, 6, seed=1)

    def node(module, numbers):
        return (A @ module(X))[numbers]

    params = list(model.parameters())
    expected = loop(lambda i: (A @ model(X))[i : i + 1], 6, params)
    assert_all_equal(expected, model, torch.arange(6), function=node)


# parts of the parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("2.*", {"2.weight", "2.bias"}),
        (["*weight", "!0.*"], {"2.weight"}),
        ("!*bias", {"0.weight", "2.weight"}),
        (["0.bias", "2.bias"], {"0.bias", "2.bias"}),
    ],
)
def test_patterns_choose_parameters(patterns, names):
    model, x = solution(), draw(4, 2)
    chosen = [param for name, param in model.named_parameters() if name in names]
    assert len(chosen) == len(names)
    expected = loop(lambda i: model(x[i : i + 1]), 4, chosen)
    assert_all_equal(expected, model, x, params=patterns)


def test_parts_add_up_to_the_whole():
    model, x = solution(), draw(4, 2)
    parts = [ntkgen.ntk(model, x, params=pattern) for pattern in ("0.*", "2.*")]
    assert_equal(sum(parts), ntkgen.ntk(model, x))


def test_a_tied_parameter_has_all_its_names(gpt2, prompts):
    by_head = ntkgen.ntk(gpt2, prompts, select="logits[:, -1, :2]", params="lm_head.*")
    by_table = ntkgen.ntk(gpt2, prompts, select="logits[:, -1, :2]", params="transformer.wte.weight")
    assert torch.equal(by_head, by_table)


def test_a_kernel_function_of_a_part_takes_the_network_and_its_state():
    model, x = solution(), draw(4, 2)
    function = ntkgen.KernelFunction(model, x, function=values, params="2.*", per_layer=True)
    assert function.layers == ["2"]
    other = solution()
    with torch.no_grad():
        other[0].weight.mul_(2)
    expected = ntkgen.ntk(other, x, params="2.*")
    for state in (other, other.state_dict()):
        assert_equal(function(state)["2"], expected)
    other[0].bias.requires_grad = False  # no part of this kernel
    assert_equal(function(other)["2"], expected)
    other[2].bias.requires_grad = False
    with pytest.raises(InputError, match="trains other parameters"):
        function(other)


# bad inputs -----------------------------------------------------------------------------------------------------------

X = draw(4, 2)


def counted():
    calls = []

    def function(module, batch):
        calls.append(1)
        return module(batch) * len(calls)

    return function


def nan_later(module, batch):
    return module(batch).where(batch[:, :1] != 1e3, torch.nan)


WITH_LATER = torch.cat([draw(40, 2), torch.full((1, 2), 1e3, dtype=torch.float64)])

BAD = {
    "nothing selected": (X, {"select": "[:, 5:]"}, ModelError, r"No output is selected.*shape \(0,\)"),
    "no such output": (X, {"select": "logits"}, ModelError, "expected that its result has 'logits', found one tensor"),
    "sample selected": (X, {"select": "[0]"}, ModelError, "first axis is that of the 3 samples"),
    "too large": (X, {"select": "[:, 9]"}, ModelError, r"does not fit the network's result.*\(1,\) for each sample"),
    "not read": (X, {"select": "logits.sum()"}, InputError, "cannot be read"),
    "no expression": (X, {"select": "logits[:, "}, InputError, "cannot be read"),
    "no selection": (X, {"select": 3}, InputError, "text or a function"),
    "no match": (X, {"params": "0.wieght"}, InputError, "No parameter matches.*0.weight"),
    "no match of a module": (X, {"params": ["0.*", "!3.*"]}, InputError, "No parameter matches the pattern '3.*'"),
    "all excluded": (X, {"params": "!*"}, InputError, "choose no trainable parameter"),
    "no patterns": (X, {"params": []}, InputError, "patterns of their names.*found an empty list"),
    "a number of parameters": (X, {"params": 3}, InputError, "patterns of their names.*found something of type int"),
    "true": (X, {"params": True}, InputError, "patterns of their names.*found something of type bool"),
    "parameters": (X, {"params": [X, X]}, InputError, "patterns of their names.*found a list of Tensor"),
    "an iterator": (
        X,
        {"params": iter([X])},
        InputError,
        "patterns.*found something of type list_iterator",
    ),
    "one number": (torch.ones(()), {}, InputError, r"a single number, of shape \(\)"),
    "none beside samples": ((X, None), {}, InputError, "NoneType as input 1.*belongs into `function`"),
    "a number beside samples": ((X, 3), {}, InputError, "found int as input 1.*belongs into `function`"),
    "a named constant": ({"input": X, "flag": None}, {}, InputError, "NoneType.*belongs into `function`"),
    "selection fails": (X, {"select": lambda o: o.logits}, ModelError, r"<lambda> raises an error.*\(1,\) for each"),
    "no function": (X, {"function": 3.0}, InputError, "must be a function"),
    "its result": (X, {"function": X}, InputError, "must be a function"),
    "different axes": ((X, X[:3]), {}, ShapeError, "different numbers of samples.*0: 4, 1: 3"),
    "no arguments": ({}, {}, InputError, "keyword arguments"),
    "empty": ({"x": X[:0]}, {}, InputError, "at least one"),
    "integers": ((torch.ones(4, 2, dtype=torch.int64),), {}, ModelError, "floating-point numbers instead of integers"),
    "plain integers": (torch.ones(4, 2, dtype=torch.int64), {}, ModelError, "floating-point numbers instead of"),
    "unknown argument": ({"y": X}, {}, ModelError, "unexpected keyword argument 'y'"),
    "mixes": (X, {"function": lambda m, x: m(x) - m(x).mean(0)}, ModelError, "mixes the samples"),
    "changes": (X, {"function": counted()}, ModelError, "change between two calls"),
    "sums": (X, {"function": lambda m, x: m(x).sum()}, ModelError, "first axis"),
    "detached": (X, {"function": lambda m, x: m(x).detach()}, ModelError, "depend on none of its trainable"),
    "nan later": (WITH_LATER, {"function": nan_later}, NtkgenError, "not finite"),
}


def product(model, x, **asked):
    operator = ntkgen.NTKOperator(model, x, **asked)
    return operator @ torch.ones(operator.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("entry", [ntkgen.ntk, product])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, entry):
    x, asked, kind, message = BAD[case]
    with pytest.raises(kind, match=message) as raised:
        entry(solution(), x, **asked)
    assert "\n" not in str(raised.value)


def test_several_values_need_a_selection_and_their_names_are_told(bert):
    with pytest.raises(ModelError, match=r"last_hidden_state, pooler_output.*`select`"):
        ntkgen.ntk(bert, tokens(3, 4))


def test_rows_and_columns_have_the_same_arguments():
    with pytest.raises(ShapeError, match="different inputs: expected a, b for both, found a for the columns"):
        data_of({"a": X, "b": X}, {"a": X})


def test_frozen_parameters_are_not_chosen():
    model = solution()
    model[0].requires_grad_(False)
    with pytest.raises(InputError, match=r"only frozen ones, such as 0\.bias"):
        ntkgen.ntk(model, X, params="0.*")


def test_an_array_may_hold_samples_of_any_form():
    linear = seeded(lambda: nn.Linear(2, 1))
    arrays = {"input": np.asarray(X)}
    assert_equal(ntkgen.ntk(linear, arrays), ntkgen.ntk(linear, X))


# kernels on disk ------------------------------------------------------------------------------------------------------


def stored(path, model, x, against=None, **asked):
    """A kernel of `ntkgen.compute` in float64, in tiles of two samples."""
    return ntkgen.compute(
        model, x, against, store=path, dtypes="float64", tile_side=asked.pop("tile_side", None), fsync=False, **asked
    )


def test_a_store_has_the_same_kernel_and_names_what_it_is_of(gpt2, prompts, tmp_path):
    asked = {"select": "logits[:, -1, [5, 7]]", "params": ["*attn*", "!*bias"]}
    store = stored(tmp_path / "k.zarr", gpt2, prompts, **asked, tile_side=4)
    expected = ntkgen.reference_ntk(gpt2, prompts, **asked)
    assert_equal(torch.from_numpy(store.array[...]), expected)
    assert store.manifest.certificate.is_good
    identity = store.manifest.identity
    assert identity["inputs"] == ["attention_mask", "input_ids"]
    assert {name: identity[name] for name in asked} == asked
    assert identity["precision"] == "float64"


def test_residuals_and_forces_on_disk(tmp_path):
    model, x = solution(), draw(5, 2)
    store = stored(tmp_path / "r.zarr", model, x, function=(values, by_autograd))
    assert_equal(torch.from_numpy(store.array[...]), ntkgen.reference_ntk(model, x, function=(values, by_autograd)))
    assert store.manifest.identity["function"] == ["test_adapter.values", "test_adapter.by_autograd"]
    atoms, positions = seeded(Energy), draw(5, 3, 2)
    store = stored(tmp_path / "f.zarr", atoms, positions[:3], positions[3:], function=forces, labels=[1, 0, 2])
    expected = ntkgen.reference_ntk(atoms, positions[:3], positions[3:], function=forces)
    assert_equal(torch.from_numpy(store.array[...]), expected)


def test_a_store_is_continued_and_another_one_is_refused(tmp_path):
    model, x = seeded(TwoInputs), {"a": draw(6, 3), "b": draw(6, 2, seed=1)}

    def interrupt(stage, done, total, note=""):
        if stage == "tiles" and done == 2:
            raise KeyboardInterrupt

    asked = {"select": "[:, :1]", "params": "fc.*", "tile_side": 2}
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path / "k.zarr", model, x, **asked, report=interrupt)
    assert ntkgen.open(tmp_path / "k.zarr").missing_tiles()
    others = [
        ({**x, "b": x["b"] + 1}, asked, "samples"),
        (x, {**asked, "select": "[:, 1:]"}, "select"),
        (x, {**asked, "params": "fc.weight"}, "params"),
        (x, {**asked, "function": lambda module, batch: module(**batch)}, "function"),
    ]
    for samples, other, differing in others:
        with pytest.raises(FingerprintError, match=differing) as raised:
            stored(tmp_path / "k.zarr", model, samples, **other)
        assert "\n" not in str(raised.value)
    store = stored(tmp_path / "k.zarr", model, {"b": x["b"], "a": x["a"]}, **asked)
    del asked["tile_side"]
    assert_equal(torch.from_numpy(store.array[...]), ntkgen.reference_ntk(model, x, **asked))


def test_outputs_of_any_shape_on_disk(tmp_path):
    model, x = seeded(Energy), draw(4, 3, 2)
    store = stored(tmp_path / "k.zarr", model, x)
    assert_equal(torch.from_numpy(store.array[...]), ntkgen.reference_ntk(model, x))


def last_state(model, x):
    return model(x)[0][:, -1]


def test_recurrent_layers_and_complex_numbers_on_disk(tmp_path):
    lstm, x = seeded(lambda: nn.LSTM(2, 3, batch_first=True)), draw(4, 5, 2)
    expected = loop(lambda i: last_state(lstm, x[i : i + 1]), 4, list(lstm.parameters()))
    assert_all_equal(expected, lstm, x, select="0[:, -1]")
    assert_equal(torch.from_numpy(stored(tmp_path / "l.zarr", lstm, x, select="0[:, -1]").array[...]), expected)
    operator, x = complex_layer(), draw(3, 8, 1)
    expected = ntkgen.reference_ntk(operator, x)
    assert_equal(torch.from_numpy(stored(tmp_path / "c.zarr", operator, x).array[...]), expected)


def test_bad_input_leaves_no_store(tmp_path):
    for asked in ({"params": "x.*"}, {"select": "logits"}, {"function": lambda m, x: m(x).sum()}):
        with pytest.raises(InputError):
            stored(tmp_path / "k.zarr", solution(), X, **asked)
    assert not list(tmp_path.glob("k.zarr/*")) or not has_store(LocalFolder(tmp_path / "k.zarr"))
