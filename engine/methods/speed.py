"""Faster forwards for adapted layers, bound on instances; peft's modules and state dict stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.engine.binding import is_exact_gelu
from regraft.engine.fast import attended
from regraft.engine.half_weights import bind_half_weights, in_force
from regraft.engine.methods.half_lora import ADAPTER, HalfLora, fits, half_lora
from regraft.engine.products import unwatched
from regraft.kernels.folded_lora import folded_lora

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.models import RunningModel


def use_method_kernels(running: RunningModel, config: RunConfig, precision: str) -> int:
    """On a CPU: folded LoRA where it is exact and faster, in fp32, without dropout or magnitudes; in bf16, weights kept in
    bf16 beside the fp32 ones, LoRA's pairs too. On a GPU: LoRA by `speed_gpu`. How many layers."""
    if config.training.sharding != "none":
        return 0  # these hold whole weights, which sharding is there to spare
    on_cpu = next(running.model.parameters()).device.type == "cpu"
    plain = config.method == "lora" and not config.lora.dropout and not config.lora.dora
    if on_cpu and precision == "bf16":
        return bind_half_weights(running) + (bind_half_lora(running) if plain else 0)
    if not on_cpu:
        from regraft.engine.methods.speed_gpu import bind_lora  # brings Triton along

        return sum(bind_lora(running).values()) if config.method in ("lora", "qlora") else 0
    return bind_folded_lora(running) if plain and precision == "fp32" else 0


def bind_folded_lora(running: RunningModel) -> int:
    """One matrix product a LoRA layer; queries, keys and values of BERT-like attention in one together."""
    from peft.tuners.lora import Linear

    for module in merged_projections(running):
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


def merged_projections(running: RunningModel) -> list[Any]:
    """Attention modules of which the adapted queries, keys and values can be one product."""
    return [m for m in running.model.modules() if running.packed and _merges(m)]


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
    return attended(
        self, folded_lora(hidden_states.squeeze(0), base, bias, down, up, self.query.scaling[ADAPTER])
    ), None


def bind_half_lora(running: RunningModel) -> int:
    """LoRA layers over bf16 weights, each one product with its low-rank term, and with GELU where that follows; queries, keys
    and values of BERT-like attention in one. How many layers."""
    from peft.tuners.lora import Linear

    layers = [m for m in running.model.modules() if type(m) is Linear and fits([m])]
    for layer in layers:
        layer.regraft_half = HalfLora([layer])  # type: ignore[assignment]
        layer.forward = _half_forward.__get__(layer)  # type: ignore[method-assign]
    for module in merged_projections(running):
        parts = [module.query, module.key, module.value]
        if fits(parts):
            module.regraft_half = HalfLora(parts)
            module.forward = _half_attention_forward.__get__(module)
    for module in running.model.modules():
        if _ends_in_gelu(module) and "forward" not in vars(module):
            module.forward = _half_intermediate_forward.__get__(module)
    return len(layers)


def _ends_in_gelu(module: Any) -> bool:
    dense, act = (getattr(module, name, None) for name in ("dense", "intermediate_act_fn"))
    return is_exact_gelu(act) and isinstance(getattr(dense, "regraft_half", None), HalfLora) and unwatched(module)


def _adds_up(x: Tensor, layers: Sequence[Any]) -> bool:
    # neither merged into its weight nor switched off
    return in_force(x) and not any(getattr(layer, "disable_adapters", True) or layer.merged for layer in layers)


def _half_forward(self: Any, x: Tensor, *given: Any, **named: Any) -> Tensor:
    if _adds_up(x, [self]) and not named:
        return half_lora(x, self.regraft_half)
    if (
        self.merged and not self.disable_adapters
    ):  # peft merges through .data, which no version tells: not the copy in bf16
        return torch.nn.functional.linear(x, self.base_layer.weight, self.base_layer.bias)
    return type(self).forward(self, x, *given, **named)


def _half_intermediate_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if _adds_up(hidden_states, [self.dense]):
        return half_lora(hidden_states, self.dense.regraft_half, gelu=True)
    return self.intermediate_act_fn(self.dense(hidden_states))


def _half_attention_forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    rows, parts = hidden_states.squeeze(0), (self.query, self.key, self.value)
    if _adds_up(rows, parts):
        return attended(self, half_lora(rows, self.regraft_half)), None
    return attended(self, torch.cat([part(rows) for part in parts], dim=-1)), None
