"""LoRA on a GPU: every update added into its columns of the layer's output, queries, keys and values in one product.

peft runs a LoRA layer as six operations and a copy of its output; of three adapted projections that is twenty launches.
Here all `A` of an attention are one product, each `B` adds in place, and the backward is written out by hand
(`kernels/lora.py`); 4-bit weights are dequantised by one kernel (`kernels/nf4.py`). peft's modules and state dict stay as
they are. Layers of another kind (DoRA, several adapters, a bias of the update) are left to peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.methods.added_lora import ADAPTER, is_one_pair
from regraft.kernels.lora import lora_linear
from regraft.kernels.nf4 import NF4Weight, nf4_linear

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel


def bind_lora(running: RunningModel) -> dict[str, int]:
    """Bind plain LoRA layers, and merge the projections of BERT-like attention; how many of each."""
    modules = list(running.model.modules())
    merged = [m for m in modules if running.packed and "forward" not in vars(m) and _merges(m)]
    for module in merged:
        module.regraft_merged = _in_one_piece([getattr(module, name) for name in PROJECTIONS])
        module.forward = _attention_forward.__get__(module)
    alone = [m for m in modules if _is_plain_lora(m) and "forward" not in vars(m)]
    for layer in alone:
        layer.regraft_nf4 = _nf4_of(layer.base_layer)
        layer.forward = _linear_forward.__get__(layer)
    return {"merged attention": len(merged), "LoRA": len(alone)}


PROJECTIONS = ("query", "key", "value")


def _is_plain_lora(module: Any) -> bool:
    """peft's LoRA over a linear layer in 16 or 32 bits, or in NF4, with one adapter and nothing besides."""
    return is_one_pair(module) and (type(module.base_layer) is nn.Linear or _nf4_of(module.base_layer) is not None)


def _nf4_of(base: Any) -> NF4Weight | None:
    try:
        return NF4Weight.of(base.weight)
    except (AttributeError, ValueError, TypeError):
        return None


def _merges(module: Any) -> bool:
    # frozen projections with biases, at least one of them adapted, in a module built like BERT's
    if not hasattr(module, "attention_head_size") or hasattr(module, "dense"):
        return False
    parts = [getattr(module, name, None) for name in PROJECTIONS]
    bases = [p.base_layer if _is_plain_lora(p) else p for p in parts]  # type: ignore[union-attr]
    frozen = all(type(b) is nn.Linear and b.bias is not None and not b.weight.requires_grad for b in bases)
    shares = {(p.lora_dropout[ADAPTER].p if _has_dropout(p) else 0.0) for p in parts if _is_plain_lora(p)}  # type: ignore[union-attr]
    return frozen and len(shares) == 1 and len({tuple(b.weight.shape) for b in bases}) == 1  # type: ignore[union-attr]


def _has_dropout(layer: Any) -> bool:
    return isinstance(layer.lora_dropout[ADAPTER], nn.Dropout)


def _in_one_piece(parts: list[Any]) -> tuple[Tensor, Tensor]:
    """Weights [3 O, I] and biases [3 O] of three frozen layers in one piece of memory, of which each keeps its part."""
    bases = [p.base_layer if _is_plain_lora(p) else p for p in parts]
    weight = torch.stack([b.weight.data for b in bases])
    bias = torch.stack([b.bias.data for b in bases])
    for base, one, offset in zip(bases, weight, bias, strict=True):
        base.weight.data, base.bias.data = one, offset  # the same numbers: nothing is held twice
    return weight.flatten(0, 1), bias.flatten()


def _share(layer: Any) -> float:
    return layer.lora_dropout[ADAPTER].p if _has_dropout(layer) else 0.0


def _linear_forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    base = self.base_layer
    if self.disable_adapters or self.merged:
        return base(x)
    a, b, scale = [self.lora_A[ADAPTER].weight], [self.lora_B[ADAPTER].weight], self.scaling[ADAPTER]
    options = {"p": _share(self), "training": self.training}
    if self.regraft_nf4 is None:
        return lora_linear(x, base.weight, base.bias, a, b, scale, **options)
    return nf4_linear(x, self.regraft_nf4, base.bias) + lora_linear(x, None, None, a, b, scale, **options)


def _attention_forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    weight, bias = self.regraft_merged
    adapted = [(place, getattr(self, name)) for place, name in enumerate(PROJECTIONS)]
    adapted = [(place, part) for place, part in adapted if hasattr(part, "lora_A") and not _off(part)]
    rows, size = hidden_states.squeeze(0), weight.shape[0] // 3
    if adapted:
        qkv = lora_linear(
            rows,
            weight,
            bias,
            [part.lora_A[ADAPTER].weight for _, part in adapted],
            [part.lora_B[ADAPTER].weight for _, part in adapted],
            [part.scaling[ADAPTER] for _, part in adapted],
            columns=[place * size for place, _ in adapted],
            p=_share(adapted[0][1]),
            training=self.training,
        )
    else:
        qkv = nn.functional.linear(rows, weight, bias)
    qkv = qkv.view(qkv.shape[0], 3, self.num_attention_heads, self.attention_head_size)
    p = self.dropout.p if self.training else 0.0
    out = self.regraft_state.layout.attend_merged(qkv, scale=self.scaling, dropout_p=p)
    return out.reshape(1, hidden_states.shape[1], -1), None


def _off(layer: Any) -> bool:
    return layer.disable_adapters or layer.merged
