"""Faster forwards bound on instances of transformers' modules. State dict, PEFT and export never notice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.binding import bind_kinds, logits_of_small, small_batch, stays_same
from regraft.engine.half_weights import in_force
from regraft.engine.products import OwnWeights, is_ours, linear
from regraft.kernels.dropout import dropout
from regraft.kernels.embedding import RowGradient, row_embedding

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel


def bind_dropout(model: nn.Module) -> int:
    """Draw the bits of every nn.Dropout in bulk; returns how many there are."""
    count = 0
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.forward = _dropout_forward.__get__(module)  # type: ignore[method-assign]
            count += 1
    return count


def _dropout_forward(self: nn.Dropout, x: Tensor) -> Tensor:
    return dropout(x, self.p, self.training)


def bind_embedding(model: nn.Module) -> RowGradient | None:
    """Let the word embedding's gradient touch only the rows that were read; None where it is not a plain embedding, or
    shares its weight with another module."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad:
        return None
    owners = [m for m in model.modules() for w in vars(m).get("_parameters", {}).values() if w is embedding.weight]
    if len(owners) > 1 or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        return None
    gradient = RowGradient(embedding.weight, embedding.padding_idx)
    embedding.regraft_gradient = gradient  # type: ignore[assignment]
    embedding.forward = _embedding_forward.__get__(embedding)  # type: ignore[method-assign]
    return gradient


def _embedding_forward(self: Any, ids: Tensor) -> Tensor:
    if self.training and torch.is_grad_enabled():
        return row_embedding(ids, self.regraft_gradient)
    return torch.nn.functional.embedding(ids, self.weight)


def bind_merged_projections(running: RunningModel) -> int:
    """Queries, keys and values of BERT-like attention in one matrix product instead of three; returns how many."""
    found = [module for module in running.model.modules() if _splits_into_heads(module)]
    for module in found:
        module.forward = _merged_attention_forward.__get__(module)
    return len(found)


def _splits_into_heads(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("query", "key", "value")]
    plain = all(type(p) is nn.Linear and p.bias is not None for p in parts)
    # ALBERT's module of the same look also holds the output projection.
    return plain and hasattr(module, "attention_head_size") and not hasattr(module, "dense")


def _merged_attention_forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return attended(self, _merged_projection(self, hidden_states.squeeze(0))), None


def attended(attention: Any, merged: Tensor) -> Tensor:
    """What BERT-like attention gives of its queries, keys and values side by side. [T, 3 H] -> [1, T, H]."""
    qkv = merged.view(merged.shape[0], 3, attention.num_attention_heads, attention.attention_head_size)
    p = attention.dropout.p if attention.training else 0.0
    out = attention.regraft_state.layout.attend_merged(qkv, scale=attention.scaling, dropout_p=p)
    return out.reshape(1, merged.shape[0], -1)


def _merged_projection(self: Any, rows: Tensor) -> Tensor:
    half = getattr(self, "regraft_half", None)
    if half is not None and in_force(rows):
        return linear(rows, half)
    parts = [self.query, self.key, self.value]
    if is_ours(rows, parts):
        return linear(rows, OwnWeights(parts))
    weight = torch.cat([part.weight for part in parts])
    bias = torch.cat([part.bias for part in parts])
    return torch.nn.functional.linear(rows, weight, bias)


def bind_rotary(running: RunningModel) -> int:
    """ModernBERT-like attention from its one projection as it lies: positions are turned without a pass over separate
    queries and keys. Bound where the logits stay the same on random sequences; returns how many."""
    return bind_kinds(running, {"rotary attention": (is_rotary_attention, rotary_forward)})["rotary attention"]


def is_rotary_attention(module: Any) -> bool:
    # ModernBertAttention: one product for queries, keys and values, rotary positions, perhaps a window
    names = ("Wqkv", "Wo", "out_drop", "head_dim", "sliding_window", "attention_dropout")
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in names)


def rotary_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if position_embeddings is None or hidden_states.shape[0] != 1:
        raise NotImplementedError("packed rows come with their positions' angles")
    qkv = self.Wqkv(hidden_states).squeeze(0)
    # transformers hands over window + 1 to mean "at most `window` positions away"
    window = None if self.sliding_window is None else self.sliding_window - 1
    out = self.regraft_state.layout.attend_rotary(
        qkv.view(qkv.shape[0], 3, -1, self.head_dim),
        position_embeddings,
        scale=self.head_dim**-0.5,
        dropout_p=self.attention_dropout if self.training else 0.0,
        window=window,
    )
    return self.out_drop(self.Wo(out.reshape(1, out.shape[0], -1))), None


def bind_last_layer(running: RunningModel) -> bool:
    """Compute the last layer for the first row of each sequence alone, which is all that the head reads: queries,
    output projection and feed-forward of 7% of the rows. Bound where the layer is built like BERT's and the logits
    stay the same on random sequences; returns whether it was."""
    from regraft.engine.models import last_layer

    layer = last_layer(running.model)
    if layer is None or not _built_like_bert(layer):
        return False
    batch = small_batch(running)
    before = logits_of_small(running, batch)
    handles, running._handles = running._handles, []
    for handle in handles:
        handle.remove()
    layer.forward = _first_rows_forward.__get__(layer)
    kept = stays_same(running, batch, before, "the last layer for first rows alone")
    if not kept:
        del layer.forward
        running._install()
    return kept


def _built_like_bert(layer: nn.Module) -> bool:
    wanted = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    names = {name for name, _ in layer.named_modules()}
    return all(name in names for name in wanted) and hasattr(layer, "feed_forward_chunk")


def _first_rows_forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    attention = self.attention.self
    layout = attention.regraft_state.layout  # a prefix belongs to a layer
    rows = hidden_states.squeeze(0)
    first = rows.index_select(0, layout.starts)
    heads = (-1, attention.num_attention_heads, attention.attention_head_size)
    context = layout.attend_first(
        attention.query(first).view(heads),
        attention.key(rows).view(heads),
        attention.value(rows).view(heads),
        scale=attention.scaling,
        dropout_p=attention.dropout.p if self.training else 0.0,
    )
    attended = self.attention.output(context.reshape(first.shape[0], -1), first)
    return self.feed_forward_chunk(attended)[:, None]
