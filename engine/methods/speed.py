"""Faster forwards for adapted layers, bound on instances; peft's modules and state dict stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.engine.binding import is_exact_gelu
from regraft.engine.fast import attended
from regraft.engine.half_weights import bind_half_weights
from regraft.engine.methods.added_lora import AddedLora, added_lora, fits
from regraft.engine.products import unwatched

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.models import RunningModel


def use_method_kernels(running: RunningModel, config: RunConfig, precision: str) -> int:
    """On a CPU, LoRA without dropout or magnitudes, over whole weights or quantised ones, as one product a layer; in bf16, weights
    kept in bf16 beside the fp32 ones, LoRA's pairs too. On a GPU: LoRA by `speed_gpu`. How many layers."""
    if config.training.sharding != "none":
        return 0  # these hold whole weights, which sharding is there to spare
    if next(running.model.parameters()).device.type != "cpu":
        from regraft.engine.methods.speed_gpu import bind_lora  # brings Triton along

        return sum(bind_lora(running).values()) if config.method in ("lora", "qlora") else 0
    half = precision == "bf16"
    held = bind_half_weights(running) if half else 0
    return held + (bind_added_lora(running, half=half) if _is_plain(config, precision) else 0)


def _is_plain(config: RunConfig, precision: str) -> bool:
    if config.method not in ("lora", "qlora", "int8") or config.lora.dropout or config.lora.dora:
        return False
    # what products over weights in 4 bits run in has a key of its own
    compute = config.quantise.compute if config.method == "qlora" else "auto"
    return precision in ("fp32", "bf16") and compute in ("auto", precision)


def bind_added_lora(running: RunningModel, *, half: bool) -> int:
    """LoRA layers each as one product with its low-rank term, and with GELU where that follows; queries, keys and values of
    BERT-like attention in one. How many layers."""
    layers: list[Any] = [m for m in running.model.modules() if fits([m])]
    for layer in layers:
        layer.regraft_lora = AddedLora([layer], half=half)
        layer.forward = _linear_forward.__get__(layer)
    for module in running.model.modules():
        if running.packed and _merges(module):
            parts = [module.query, module.key, module.value]
            module.regraft_lora = AddedLora(parts, half=half)
            if module.regraft_lora.whole and not half:
                _put_together(parts)
            module.forward = _attention_forward.__get__(module)
    for module in running.model.modules():
        if _ends_in_gelu(module) and "forward" not in vars(module):
            module.forward = _intermediate_forward.__get__(module)
    return len(layers)


def _merges(module: Any) -> bool:
    """Whether the adapted queries, keys and values of an attention module can be one product."""
    parts: list[Any] = [getattr(module, name, None) for name in ("query", "key", "value")]
    if not hasattr(module, "attention_head_size") or hasattr(module, "dense") or not fits(parts):
        return False
    return len({part.base_layer.out_features for part in parts}) == 1 and parts[0].base_layer.bias is not None


def _put_together(parts: Sequence[Any]) -> None:
    # the same numbers in one piece of memory: nothing is held twice, and nothing is put together in each step
    for name in ("weight", "bias"):
        whole = torch.stack([getattr(p.base_layer, name).data for p in parts])
        for part, own in zip(parts, whole, strict=True):
            getattr(part.base_layer, name).data = own


def _ends_in_gelu(module: Any) -> bool:
    dense, act = (getattr(module, name, None) for name in ("dense", "intermediate_act_fn"))
    return is_exact_gelu(act) and isinstance(getattr(dense, "regraft_lora", None), AddedLora) and unwatched(module)


def _linear_forward(self: Any, x: Tensor, *given: Any, **named: Any) -> Tensor:
    if self.regraft_lora.takes(x) and not named:
        return added_lora(x, self.regraft_lora)
    if self.merged and not self.disable_adapters and self.regraft_lora.half and self.regraft_lora.whole:
        # peft merges through .data, which no version tells: not the copy in bf16
        return torch.nn.functional.linear(x, self.base_layer.weight, self.base_layer.bias)
    return type(self).forward(self, x, *given, **named)


def _intermediate_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if self.dense.regraft_lora.takes(hidden_states):
        return added_lora(hidden_states, self.dense.regraft_lora, gelu=True)
    return self.intermediate_act_fn(self.dense(hidden_states))


def _attention_forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    rows, parts = hidden_states.squeeze(0), (self.query, self.key, self.value)
    if self.regraft_lora.takes(rows):
        return attended(self, added_lora(rows, self.regraft_lora)), None
    return attended(self, torch.cat([part(rows) for part in parts], dim=-1)), None
