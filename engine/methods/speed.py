"""Faster forwards for adapted layers, bound on instances; peft's modules and state dict stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.engine.half_weights import bind_half_weights
from regraft.kernels.folded_lora import folded_lora

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.models import RunningModel

ADAPTER = "default"


def use_method_kernels(running: RunningModel, config: RunConfig, precision: str) -> int:
    """On a CPU: folded LoRA where it is exact and faster, in fp32, without dropout or magnitudes; in bf16, weights kept in
    bf16 beside the fp32 ones. On a GPU: LoRA by `speed_gpu`. How many layers."""
    if config.training.sharding != "none":
        return 0  # these hold whole weights, which sharding is there to spare
    on_cpu = next(running.model.parameters()).device.type == "cpu"
    if on_cpu and precision == "bf16":
        return bind_half_weights(running)
    if not on_cpu:
        from regraft.engine.methods.speed_gpu import bind_lora  # brings Triton along

        return sum(bind_lora(running).values()) if config.method in ("lora", "qlora") else 0
    plain = config.method == "lora" and not config.lora.dropout and not config.lora.dora
    return bind_folded_lora(running) if plain and precision == "fp32" else 0


def bind_folded_lora(running: RunningModel) -> int:
    """One matrix product a LoRA layer; queries, keys and values of BERT-like attention in one together."""
    from peft.tuners.lora import Linear

    merged = [m for m in running.model.modules() if running.packed and _merges(m)]
    for module in merged:
        parts = [module.query, module.key, module.value]
        base = torch.stack([p.base_layer.weight.data for p in parts])
        bias = torch.stack([p.base_layer.bias.data for p in parts])
        for part, weight, offset in zip(parts, base, bias, strict=True):
            # The same numbers in one piece of memory: nothing is held twice.
            part.base_layer.weight.data, part.base_layer.bias.data = weight, offset
        module.regraft_merged = (base, bias)
        if "forward" not in vars(module):
            module.forward = _attention_forward.__get__(module)
    layers = [m for m in running.model.modules() if type(m) is Linear]
    for layer in layers:
        layer.forward = _linear_forward.__get__(layer)  # type: ignore[method-assign]
    return len(layers)


def _merges(module: Any) -> bool:
    from peft.tuners.lora import Linear

    parts: list[Any] = [getattr(module, name, None) for name in ("query", "key", "value")]
    alike = all(type(p) is Linear and p.base_layer.bias is not None for p in parts)
    if not alike or not hasattr(module, "attention_head_size") or hasattr(module, "dense"):
        return False
    return len({(p.r[ADAPTER], p.scaling[ADAPTER], tuple(p.base_layer.weight.shape)) for p in parts}) == 1


def _linear_forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    base = self.base_layer
    if self.disable_adapters or self.merged:
        return base(x)
    bias = None if base.bias is None else base.bias[None]
    down, up = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
    flat = x.reshape(-1, x.shape[-1])
    out = folded_lora(flat, base.weight[None], bias, [down], [up], self.scaling[ADAPTER])
    return out.view(*x.shape[:-1], -1)


def _attention_forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    parts = (self.query, self.key, self.value)
    base, bias = self.regraft_merged
    down = [p.lora_A[ADAPTER].weight for p in parts]
    up = [p.lora_B[ADAPTER].weight for p in parts]
    qkv = folded_lora(hidden_states.squeeze(0), base, bias, down, up, self.query.scaling[ADAPTER])
    qkv = qkv.view(qkv.shape[0], 3, self.num_attention_heads, self.attention_head_size)
    p = self.dropout.p if self.training else 0.0
    out = self.regraft_state.layout.attend_merged(qkv, scale=self.scaling, dropout_p=p)
    return out.reshape(1, hidden_states.shape[1], -1), None
