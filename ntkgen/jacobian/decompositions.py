"""Attention and recurrent layers as simple calls of torch functions, whose junctions have known forms.

Each function has the signature of the torch function that it replaces, and computes the same in evaluation mode.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], State]
# What one direction of one layer does: from its weights, the function of a step, whose input gates are computed before.
Cell = Callable[[Sequence[Tensor]], tuple[Callable[[Tensor], Tensor], Step]]


def decomposition(function: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
    """Return the simple version of a composite function, or None if it has none for these arguments."""
    if function is F.multi_head_attention_forward:
        return _attention
    name = getattr(function, "__name__", "")
    if name in _RECURRENT and getattr(function, "__module__", "") == "torch" and len(args) == 9:  # not packed
        return _RECURRENT[name]
    return _CELLS.get(name) if getattr(function, "__module__", "") == "torch" else None


# attention ------------------------------------------------------------------------------------------------------------


def _attention(  # noqa: PLR0913, PLR0917 - the signature of torch
    query: Tensor,  # (queries, samples, embedding)
    key: Tensor,  # (keys, samples, embedding)
    value: Tensor,
    _embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,  # noqa: FBT001 - the signature of torch
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,  # noqa: FBT001, FBT002
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,  # noqa: FBT001, FBT002
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,  # noqa: FBT001, FBT002
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,  # noqa: FBT001, FBT002
    is_causal: bool = False,  # noqa: FBT001, FBT002, ARG001
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with several heads by matrix products and a softmax."""
    is_batched = query.ndim == 3
    if not is_batched:
        query, key, value = (each.unsqueeze(1) for each in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    size, samples = query.shape[2], query.shape[1]
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    q, k, v = _projected((query, key, value), in_proj_weight, separate, in_proj_bias)
    k, v = k if static_k is None else static_k, v if static_v is None else static_v
    padding = 0
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, samples, size)])
        v = torch.cat([v, bias_v.expand(1, samples, size)])
        padding += 1
    q, k, v = (each.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3) for each in (q, k, v))  # (n, heads, T, d)
    if add_zero_attn:
        k, v = (F.pad(each, (0, 0, 0, 1)) for each in (k, v))
        padding += 1
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        mask = attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (samples, num_heads))
        scores = _masked(scores, F.pad(mask, (0, padding)))
    if key_padding_mask is not None:
        scores = _masked(scores, F.pad(key_padding_mask, (0, padding))[:, None, None])
    attention = F.dropout(scores.softmax(-1), dropout_p, training)
    joined = (attention @ v).permute(2, 0, 1, 3).flatten(2)
    outputs = F.linear(joined, out_proj_weight, out_proj_bias)
    shown = attention.mean(1) if average_attn_weights else attention
    if not is_batched:
        outputs, shown = outputs.squeeze(1), shown.squeeze(0)
    return outputs, shown if need_weights else None


def _projected(
    inputs: tuple[Tensor, Tensor, Tensor],
    joint: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
    bias: Tensor | None,
) -> Sequence[Tensor]:
    """Compute queries, keys and values, by one product if all have the same input."""
    query, key, value = inputs
    if separate is None:
        assert joint is not None
        if query is key and key is value:
            return F.linear(query, joint, bias).chunk(3, -1)
    weights: Any = joint.chunk(3) if separate is None and joint is not None else separate
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, weight, b) for x, weight, b in zip(inputs, weights, biases, strict=True)]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask


# recurrent layers -----------------------------------------------------------------------------------------------------


def _lstm_cell(weights: Sequence[Tensor], has_biases: bool) -> tuple[Callable[[Tensor], Tensor], Step]:  # noqa: FBT001
    (w_ih, w_hh, *others) = weights
    b_ih, b_hh = others[:2] if has_biases else (None, None)
    projection = others[-1] if len(others) % 2 else None

    def inputs(x: Tensor) -> Tensor:
        gates = F.linear(x, w_ih, b_ih)
        return gates if b_hh is None else gates + b_hh

    def step(gates: Tensor, state: State) -> State:
        i, f, g, o = (gates + F.linear(state[0], w_hh)).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if projection is None else F.linear(h, projection)), c

    return inputs, step


def _gru_cell(weights: Sequence[Tensor], has_biases: bool) -> tuple[Callable[[Tensor], Tensor], Step]:  # noqa: FBT001
    (w_ih, w_hh), (b_ih, b_hh) = weights[:2], weights[2:] if has_biases else (None, None)

    def step(gates: Tensor, state: State) -> State:
        (r, z, n), (h_r, h_z, h_n) = gates.chunk(3, -1), F.linear(state[0], w_hh, b_hh).chunk(3, -1)
        new, keep = (n + (r + h_r).sigmoid() * h_n).tanh(), (z + h_z).sigmoid()
        return ((1 - keep) * new + keep * state[0],)

    return lambda x: F.linear(x, w_ih, b_ih), step


def _simple_cell(activation: Callable[[Tensor], Tensor]) -> Any:
    def cell(weights: Sequence[Tensor], has_biases: bool) -> tuple[Callable[[Tensor], Tensor], Step]:  # noqa: FBT001
        (w_ih, w_hh), (b_ih, b_hh) = weights[:2], weights[2:] if has_biases else (None, None)

        def inputs(x: Tensor) -> Tensor:
            found = F.linear(x, w_ih, b_ih)
            return found if b_hh is None else found + b_hh

        return inputs, lambda gates, state: (activation(gates + F.linear(state[0], w_hh)),)

    return cell


def _layers_of(cell: Any, *, has_cell_state: bool) -> Callable[..., Any]:
    """Make the function of several layers and directions from that of a cell."""

    def compute(  # noqa: PLR0913, PLR0917 - the signature of torch
        x: Tensor,
        hx: Any,
        weights: Sequence[Tensor],
        has_biases: bool,  # noqa: FBT001
        num_layers: int,
        dropout: float,
        train: bool,  # noqa: FBT001
        bidirectional: bool,  # noqa: FBT001
        batch_first: bool,  # noqa: FBT001
    ) -> Any:
        directions = 2 if bidirectional else 1
        states = list(hx) if has_cell_state else [hx]
        count = len(weights) // (num_layers * directions)
        x = x.transpose(0, 1) if batch_first else x
        last: list[State] = []
        for layer in range(num_layers):
            found = []
            for direction in range(directions):
                number = layer * directions + direction
                inputs, step = cell(weights[number * count : (number + 1) * count], has_biases)
                state = tuple(each[number] for each in states)
                hidden, gates = [], inputs(x).unbind()
                for t in reversed(range(len(x))) if direction else range(len(x)):
                    state = step(gates[t], state)
                    hidden.append(state[0])
                found.append(torch.stack(hidden[::-1] if direction else hidden))
                last.append(state)
            x = found[0] if directions == 1 else torch.cat(found, -1)
            if layer + 1 < num_layers:
                x = F.dropout(x, dropout, train)
        ends = [torch.stack(each) for each in zip(*last, strict=True)]
        return (x.transpose(0, 1) if batch_first else x, *ends)

    return compute


def _one_step(cell: Any, *, has_cell_state: bool) -> Callable[..., Any]:
    """Make the function of a single step from that of a cell."""

    def compute(x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None) -> Any:
        given = [each for each in biases if each is not None]
        inputs, step = cell([w_ih, w_hh, *given], bool(given))
        found = step(inputs(x), tuple(hx) if has_cell_state else (hx,))
        return found if has_cell_state else found[0]

    return compute


_KINDS: dict[str, tuple[Any, bool]] = {
    "lstm": (_lstm_cell, True),
    "gru": (_gru_cell, False),
    "rnn_tanh": (_simple_cell(torch.tanh), False),
    "rnn_relu": (_simple_cell(torch.relu), False),
}
_RECURRENT = {name: _layers_of(cell, has_cell_state=has) for name, (cell, has) in _KINDS.items()}
_CELLS = {f"{name}_cell": _one_step(cell, has_cell_state=has) for name, (cell, has) in _KINDS.items()}
