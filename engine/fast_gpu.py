"""Fused kernels bound on instances of BERT-like modules: fewer launches and fewer passes on a GPU.

State dict, `save_pretrained`, PEFT and export never notice. Each kind of module is bound where it is built like
BERT's, and stays bound only where the logits on random sequences stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.varlen_layout import VarlenLayout
from regraft.kernels.embedding_norm import embedding_layer_norm
from regraft.kernels.gelu import bias_gelu
from regraft.kernels.norm import dropout_add_layer_norm

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel

PROOF_TOLERANCE = 1e-4


def bind_fused(running: RunningModel) -> dict[str, int]:
    """Bind what can be bound on a packed model: how many modules of each kind are. Attention goes by `cu_seqlens`."""
    from regraft.engine.fast import _logits, small_batch

    if not running.packed:
        return {}
    batch = small_batch(running)
    before = _logits(running, batch)
    running.layout_of = VarlenLayout.of  # type: ignore[method-assign]
    if not _same(_logits(running, batch), before):
        del running.layout_of
        return {}
    bound = {}
    for name, (built_alike, forward) in KINDS.items():
        found = [m for m in running.model.modules() if "forward" not in vars(m) and built_alike(m)]
        for module in found:
            module.forward = forward.__get__(module)
        try:
            kept = not found or _same(_logits(running, batch), before)
        except Exception:  # a module of like parts that is called in another way
            kept = False
        if not kept:
            for module in found:
                del module.forward
        bound[name] = len(found) if kept else 0
    return bound


def _same(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found.float(), wanted.float(), rtol=PROOF_TOLERANCE, atol=PROOF_TOLERANCE)


def _computing_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _is_output(module: Any) -> bool:
    # BertSelfOutput, BertOutput and their kin: LayerNorm(dropout(dense(x)) + residual)
    parts = [type(getattr(module, name, None)) for name in ("LayerNorm", "dropout")]
    return parts == [nn.LayerNorm, nn.Dropout] and isinstance(getattr(module, "dense", None), nn.Module) and not any(
        hasattr(module, name) for name in ("query", "word_embeddings")
    )  # fmt: skip


def _output_forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    x = self.dense(hidden_states)
    p = self.dropout.p if self.dropout.training else 0.0
    seed, site = self.regraft_state.layout.site(p)
    norm = self.LayerNorm
    options = {"eps": norm.eps, "p": p, "seed": seed, "site": site}
    return dropout_add_layer_norm(x, input_tensor.to(x.dtype), norm.weight, norm.bias, **options)


def _is_intermediate(module: Any) -> bool:
    # The exact GELU alone: its class in transformers, or torch's without approximation
    act = getattr(module, "intermediate_act_fn", None)
    exact = type(act).__name__ == "GELUActivation" or (type(act) is nn.GELU and act.approximate == "none")
    return exact and type(getattr(module, "dense", None)) is nn.Linear


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


KINDS: dict[str, tuple[Callable[[Any], bool], Callable[..., Tensor]]] = {
    "dropout + residual + LayerNorm": (_is_output, _output_forward),
    "bias + GELU": (_is_intermediate, _intermediate_forward),
    "embeddings + LayerNorm": (_is_embeddings, _embeddings_forward),
}
