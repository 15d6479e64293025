"""Networks of tokens and of sequences for `networks.py`, each with its samples.

A network of language is built from a configuration, so nothing is downloaded. It maps token ids to some logits of the
last position.
"""

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A network and its samples.
Subject = tuple[nn.Module, Tensor]

VOCABULARY, TOKENS, WIDTH, HEADS, DEPTH = 100, 16, 64, 4, 2  # of the networks of language
STEPS, FEATURES, HIDDEN, CLASSES = 10, 8, 32, 5  # of the networks of sequences


# Options of several configurations of transformers.
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "attn_implementation": "eager"}
NO_ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": DEPTH,
    "max_position_embeddings": 2 * TOKENS,
}


# language -------------------------------------------------------------------------------------------------------------


class LastLogits(nn.Module):
    """Some logits of the last position of a network of language."""

    def __init__(self, body: nn.Module, outputs: int) -> None:
        super().__init__()
        self.body, self.outputs = body, outputs

    def forward(
        self,
        ids: Tensor,  # (samples, tokens), integers
    ) -> Tensor:  # (samples, outputs)
        """Return the logits of the first words of the vocabulary."""
        logits: Tensor = self.body(input_ids=ids, use_cache=False).logits
        return logits[:, -1, : self.outputs]


class ClassLogits(nn.Module):
    """The logits of a classifier of sequences."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(
        self,
        ids: Tensor,  # (samples, tokens), integers
    ) -> Tensor:  # (samples, outputs)
        """Return the logits of all classes."""
        logits: Tensor = self.body(input_ids=ids).logits
        return logits


def loaded(package: str) -> Any:
    """Import a package that need not be installed for the other rows. Its types are not checked."""
    return importlib.import_module(package)


def tokens(samples: int) -> Tensor:
    """Draw token ids."""
    return torch.randint(1, VOCABULARY, (samples, TOKENS))


def gpt2_body() -> Any:
    """Build a GPT-2 with tied embeddings."""
    transformers = loaded("transformers")
    sizes = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": DEPTH, "n_positions": 2 * TOKENS}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**COMMON, **sizes, **NO_ENDS))


def gpt2() -> Subject:
    return LastLogits(gpt2_body(), CLASSES), tokens(30)


def gpt2_lora() -> Subject:
    peft = loaded("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return LastLogits(peft.get_peft_model(gpt2_body(), adapter), CLASSES), tokens(30)  # the rest is frozen


def llama() -> Subject:
    transformers = loaded("transformers")
    config = transformers.LlamaConfig(**COMMON, **SIZES, **NO_ENDS, num_key_value_heads=HEADS // 2)
    return LastLogits(transformers.LlamaForCausalLM(config), CLASSES), tokens(30)


def bert() -> Subject:
    transformers = loaded("transformers")
    config = transformers.BertConfig(**COMMON, **SIZES, num_labels=3)
    return ClassLogits(transformers.BertForSequenceClassification(config)), tokens(30)


# sequences ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One layer of attention, the mean over positions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(
        self,
        x: Tensor,  # (samples, steps, features)
    ) -> Tensor:  # (samples, outputs)
        """Return the outputs of the head."""
        found: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return found


class Encoder(nn.Module):
    """Learned positions, a transformer encoder, the mean over positions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(STEPS, HIDDEN))
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 2 * HIDDEN, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(
        self,
        x: Tensor,  # (samples, steps, features)
    ) -> Tensor:  # (samples, outputs)
        """Return the outputs of the head."""
        found: Tensor = self.head(self.encoder(x + self.positions).mean(1))
        return found


class Recurrent(nn.Module):
    """A recurrent layer of PyTorch, and a head on its last time step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (1 + layer.bidirectional), CLASSES)

    def forward(
        self,
        x: Tensor,  # (samples, steps, features)
    ) -> Tensor:  # (samples, outputs)
        """Return the outputs of the head."""
        found: Tensor = self.head(self.layer(x)[0][:, -1])
        return found


class BareRecurrent(nn.Module):
    """A recurrent network of three matrices and a bias, without layers of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(FEATURES, HIDDEN) / math.sqrt(FEATURES))
        self.state = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / math.sqrt(HIDDEN))
        self.bias = nn.Parameter(0.1 * torch.randn(HIDDEN))
        self.out = nn.Parameter(torch.randn(HIDDEN, CLASSES) / math.sqrt(HIDDEN))

    def forward(
        self,
        x: Tensor,  # (samples, steps, features)
    ) -> Tensor:  # (samples, outputs)
        """Return the outputs of the last time step."""
        state = x.new_zeros(len(x), HIDDEN)
        for step in x.unbind(1):
            state = torch.tanh(step @ self.into + state @ self.state + self.bias)
        return state @ self.out


class SelectiveStateSpace(nn.Module):
    """A selective state space model, as in Gu, Dao (2023), arXiv:2312.00752, §3, computed step by step."""

    def __init__(self, state: int = 8) -> None:
        super().__init__()
        self.into = nn.Linear(FEATURES, HIDDEN)
        self.step = nn.Linear(HIDDEN, HIDDEN)
        self.read_write = nn.Linear(HIDDEN, 2 * state, bias=False)
        self.decay = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(HIDDEN, 1))
        self.skip = nn.Parameter(torch.ones(HIDDEN))
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(
        self,
        x: Tensor,  # (samples, steps, features)
    ) -> Tensor:  # (samples, outputs)
        """Return the outputs of the last time step."""
        inner = F.silu(self.into(x))
        lengths = F.softplus(self.step(inner))[..., None]  # (samples, steps, hidden, 1)
        write, read = self.read_write(inner)[:, :, None].chunk(2, -1)  # (samples, steps, 1, state)
        decays = torch.exp(-lengths * self.decay.exp())
        additions = lengths * write * inner[..., None]
        state = torch.zeros_like(additions[:, 0])
        for decay, addition in zip(decays.unbind(1), additions.unbind(1), strict=True):
            state = decay * state + addition
        found: Tensor = self.head((state * read[:, -1]).sum(-1) + self.skip * inner[:, -1])
        return found


def sequences(model: nn.Module, features: int = FEATURES) -> Subject:
    """Join a network with forty sequences."""
    return model, torch.randn(40, STEPS, features)
