"""Fused kernels bound on instances of BERT-like and ModernBERT-like modules: fewer launches and fewer passes on a GPU.

State dict, `save_pretrained`, PEFT and export never notice. Each kind of module is bound where it is built like
BERT's, and stays bound only where the logits on random sequences stay the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.binding import (
    Kinds,
    bind_kinds,
    is_exact_gelu,
    is_intermediate,
    is_output,
    logits_of_small,
    small_batch,
    stays_same,
)
from regraft.engine.fast import is_rotary_attention, rotary_forward
from regraft.engine.varlen_layout import VarlenLayout
from regraft.kernels.embedding_norm import embedding_layer_norm
from regraft.kernels.gelu import bias_geglu, bias_gelu
from regraft.kernels.norm import dropout_add_layer_norm

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel


def bind_fused(running: RunningModel) -> dict[str, int]:
    """Bind what can be bound on a packed model: how many modules of each kind are. Attention goes by `cu_seqlens`."""
    # A checkpointed layer runs twice, and its second run would draw other masks from the seed than its first.
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in running.model.modules())
    if not running.packed or checkpointed:
        return {}
    batch = small_batch(running)
    before = logits_of_small(running, batch)
    running.layout_of = VarlenLayout.of  # type: ignore[method-assign]
    if not stays_same(running, batch, before, "attention by cu_seqlens"):
        del running.layout_of
        return {}
    running.bound = bind_kinds(running, KINDS)
    return running.bound


def _computing_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _output_forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    x = self.dense(hidden_states)
    p = self.dropout.p if self.dropout.training else 0.0
    seed, site = self.regraft_state.layout.site(p)
    norm = self.LayerNorm
    options = {"eps": norm.eps, "p": p, "seed": seed, "site": site}
    return dropout_add_layer_norm(x, input_tensor.to(x.dtype), norm.weight, norm.bias, **options)


def _intermediate_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return bias_gelu(nn.functional.linear(hidden_states, self.dense.weight), self.dense.bias)


def _is_embeddings(module: Any) -> bool:
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    if not all(type(getattr(module, name, None)) is nn.Embedding for name in names):
        return False
    parts = [type(getattr(module, name, None)) for name in ("LayerNorm", "dropout")]
    plain = getattr(module, "position_embedding_type", "absolute") == "absolute"
    return plain and parts == [nn.LayerNorm, nn.Dropout] and module.word_embeddings.max_norm is None


def _embeddings_forward(
    self: Any,
    input_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values_length: int = 0,
) -> Tensor:
    if input_ids is None or position_ids is None or inputs_embeds is not None:
        raise NotImplementedError("packed rows come as input_ids with position_ids")
    ids = input_ids[0]
    types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids[0]
    p = self.dropout.p if self.dropout.training else 0.0
    seed, site = self.regraft_state.layout.site(p)
    tables = (self.word_embeddings.weight, self.position_embeddings.weight, self.token_type_embeddings.weight)
    out = embedding_layer_norm(
        ids, position_ids[0], types, *tables, self.LayerNorm.weight, self.LayerNorm.bias, eps=self.LayerNorm.eps, p=p,
        seed=seed, site=site, padding_idx=self.word_embeddings.padding_idx, out_dtype=_computing_dtype(tables[0]),
    )  # fmt: skip
    return out[None]


def _is_gated(module: Any) -> bool:
    # ModernBertMLP and its kin: Wo(drop(gelu(values) * gates)), both halves from one product
    up, down = getattr(module, "Wi", None), getattr(module, "Wo", None)
    sizes = [getattr(up, "out_features", 0), getattr(down, "in_features", -1)]
    plain = isinstance(getattr(module, "drop", None), nn.Dropout | nn.Identity)
    return plain and sizes[0] == 2 * sizes[1] and is_exact_gelu(getattr(module, "act", None))


def _gated_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return self.Wo(self.drop(bias_geglu(self.Wi(hidden_states))))


KINDS: Kinds = {
    "dropout + residual + LayerNorm": (is_output, _output_forward),
    "bias + GELU": (is_intermediate, _intermediate_forward),
    "embeddings + LayerNorm": (_is_embeddings, _embeddings_forward),
    "GeGLU": (_is_gated, _gated_forward),
    "rotary attention": (is_rotary_attention, rotary_forward),
}
