"""Attention: what is computed for a sample has the same bits whichever other samples share its batch and its tile."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CPU, Call
from strategies import pieces_of
from torch import Tensor, nn

import ntkgen
from ntkgen.checks.rows import ExactRows
from ntkgen.checks.whole import whole_kernel
from ntkgen.inputs import Inputs
from ntkgen.jacobian.adapter import Given, Target
from ntkgen.jacobian.choice import plan_jacobian
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.network import Network, prepare
from ntkgen.jacobian.outputs import output_map
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.store.schema import Samples

# Seven samples; those of the second set are others, but for the samples 1 and 5.
NUM_SAMPLES, KEPT = 7, (1, 5)
OTHERS = [i for i in range(NUM_SAMPLES) if i not in KEPT]


@dataclass(frozen=True)
class Attention:
    """A network with attention, and two sets of samples that have some samples in common."""

    model: nn.Module
    x: Any
    other: Any
    options: dict[str, Any]

    def prepared(self, x: Any) -> tuple[Network, Tensor]:
        """The network as the engine takes it, and the samples or their numbers."""
        given = Given.of(self.model, x, None, Target.of(None, self.options.get("select"), None, None))
        return prepare(given.model, given.rows, policy("float32")), given.rows


def tokens(seed: int, length: int = 6) -> Tensor:
    return torch.randint(3, 30, (NUM_SAMPLES, length), generator=torch.Generator().manual_seed(seed))


def changed(x: Tensor, other: Tensor) -> Tensor:
    """The other samples, but for those that both sets have in common."""
    other = other.clone()
    other[list(KEPT)] = x[list(KEPT)]
    return other


def mask(lengths: list[int], *, is_left: bool = False) -> Tensor:
    full = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    return full.flip(1) if is_left else full


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval()


def gpt2_model() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="GPT-2 and BERT are built by transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def gpt2() -> Attention:
    x = tokens(1)
    return Attention(gpt2_model(), x, changed(x, tokens(2)), {"select": "logits[:, -1, [5, 7]]"})


def gpt2_padded_on_the_left() -> Attention:
    ids, lengths, others = tokens(1), mask([6, 4, 6, 2, 3, 6, 5], is_left=True), mask([6] * 7)
    x = {"input_ids": ids, "attention_mask": lengths}
    other = {"input_ids": changed(ids, tokens(2)), "attention_mask": changed(lengths, others)}
    return Attention(gpt2_model(), x, other, {"select": "logits[:, -1, [5, 7]]"})


def bert_with_masks() -> Attention:
    transformers = pytest.importorskip("transformers", reason="GPT-2 and BERT are built by transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    ids, lengths = tokens(1), mask([6, 4, 3, 2, 6, 6, 5])
    x = {"input_ids": ids, "attention_mask": lengths}
    # in the batches of the other set no token is masked, except in those of the samples in common
    other = {"input_ids": changed(ids, tokens(2)), "attention_mask": changed(lengths, mask([6] * 7))}
    return Attention(seeded(lambda: transformers.BertForSequenceClassification(config)), x, other, {})


def vit() -> Attention:
    from torchvision.models import VisionTransformer

    def make() -> nn.Module:
        model = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3)
        nn.init.normal_(model.heads.head.weight)  # it begins as zero
        return model

    x, other = torch.randn(2, NUM_SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return Attention(seeded(make), x, changed(x, other), {})


NETWORKS = [gpt2, gpt2_padded_on_the_left, bert_with_masks, vit]
every_network = pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
made = cache(lambda make: make())


def tensors_of(block):
    return [block.logits, block.rows, *(t for pair in block.pairs for t in (pair.inputs, pair.cotangents))]


@every_network
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_factors_of_a_sample(make, batch_size):
    case = made(make)
    blocks = []
    for x in (case.x, case.other):
        network, rows = case.prepared(x)
        plan = plan_jacobian(network.profile, pieces_of(7, batch_size, 16, 1 << 20), precision="float32")
        assert network.fallback == ()
        with exact_arithmetic(CPU, threads=1):
            blocks += [compute_factors(network, plan, rows), compute_factors(network, plan, rows[3:5])]
    whole, part, other, _ = map(tensors_of, blocks)
    for tensor, second in zip(whole, other, strict=True):
        assert torch.equal(tensor[list(KEPT)], second[list(KEPT)])
    assert not torch.isclose(whole[0][OTHERS], other[0][OTHERS]).all(dim=1).any()  # the others are others
    if 3 % batch_size == 0:  # the batch of sample 3 begins with it, and is padded in the smaller block
        assert all(torch.equal(tensor[3:5], second) for tensor, second in zip(whole, part, strict=True))


@every_network
def test_the_bytes_of_a_store(make, tmp_path):
    case = made(make)
    settings = {"tile_side": 6, "dtypes": ("float32",), "certify": False, "fsync": False, **case.options}
    stores = [
        ntkgen.compute(case.model, x, store=tmp_path / f"{name}.zarr", **settings)
        for name, x in (("x", case.x), ("other", case.other))
    ]
    m = stores[0].grid.num_outputs
    rows = np.concatenate([np.arange(i * m, (i + 1) * m) for i in KEPT])
    kernels = [np.asarray(store.kernel("float32")) for store in stores]
    diagonals = [store.read("diagonal") for store in stores]
    assert kernels[0][np.ix_(rows, rows)].tobytes() == kernels[1][np.ix_(rows, rows)].tobytes()
    assert diagonals[0][..., rows].tobytes() == diagonals[1][..., rows].tobytes()
    assert not np.array_equal(kernels[0], kernels[1])


@every_network
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_the_products_of_the_operator(make, precision):
    case = made(make)
    operators = [ntkgen.NTKOperator(case.model, x, precision=precision, **case.options) for x in (case.x, case.other)]
    m = operators[0].num_outputs
    v = torch.zeros(NUM_SAMPLES, m, 2, dtype=operators[0].dtype)
    v[KEPT[0], :, 0] = v[KEPT[1], :, 1] = torch.arange(1.0, m + 1)
    found = [(operator @ v.flatten(0, 1)).view(NUM_SAMPLES, m, 2)[list(KEPT)] for operator in operators]
    assert operators[0].push == operators[1].push
    assert torch.equal(*found)


@every_network
def test_the_reference(make):
    case = made(make)
    kernels = [ntkgen.reference_ntk(case.model, x, **case.options) for x in (case.x, case.other)]
    m = len(kernels[0]) // NUM_SAMPLES
    found = [kernel.view(NUM_SAMPLES, m, NUM_SAMPLES, m)[list(KEPT)][:, :, list(KEPT)] for kernel in kernels]
    assert torch.equal(*found)
    assert not torch.equal(*kernels)


# attention is plain ---------------------------------------------------------------------------------------------------


SEEN = set()


def with_attention(self: Call, x: Tensor) -> Tensor:
    cuda = torch.backends.cuda
    fused = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    SEEN.add((*fused, torch.backends.mha.get_fastpath_enabled()))
    return self.head(F.scaled_dot_product_attention(*self.projections(x).chunk(3, dim=-1)).mean(1))


def test_no_pass_uses_fused_attention(tmp_path):
    """Backward passes of fused attention may depend on the batch, and some cannot be differentiated again."""
    model = seeded(lambda: Call(with_attention, projections=nn.Linear(4, 12), head=nn.Linear(4, 2)))
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    operator = ntkgen.NTKOperator(model, x)
    inputs = Inputs(x, Samples(np.arange(5), np.zeros(5, np.int64)))
    uses: list[Callable[[], Any]] = [
        lambda: ntkgen.ntk(model, x),
        lambda: ntkgen.KernelFunction(model, x)(model),
        lambda: ntkgen.reference_ntk(model, x),
        lambda: operator @ torch.ones(10),
        lambda: ntkgen.compute(model, x, store=tmp_path / "k.zarr", fsync=False, certify=False),  # with its diagonal
        lambda: whole_kernel(ExactRows.of(model, inputs, output_map("full", 2)), "none"),
    ]
    for use in uses:
        SEEN.clear()
        use()
        assert {(False, False, False, False)} == SEEN
    model(x)
    assert len(SEEN) == 2  # as before
