"""Faster forwards for adapted layers, bound on instances; peft's modules and state dict stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.engine.binding import is_exact_gelu
from regraft.engine.fast import attended
from regraft.engine.half_weights import bind_half_weights
from regraft.engine.methods.added_lora import ADAPTER, AddedLora, added_lora, fits
from regraft.engine.products import unwatched

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.models import RunningModel


def use_method_kernels(running: RunningModel, config: RunConfig, precision: str) -> int:
    """On a CPU, LoRA without dropout or magnitudes as one product a layer; in bf16, weights kept in bf16 beside the fp32 ones,
    LoRA's pairs too. On a GPU: LoRA by `speed_gpu`. How many layers."""
    if config.training.sharding != "none":
        return 0  # these hold whole weights, which sharding is there to spare
    if next(running.model.parameters()).device.type != "cpu":
        from regraft.engine.methods.speed_gpu import bind_lora  # brings Triton along

        return sum(bind_lora(running).values()) if config.method in ("lora", "qlora") else 0
    half = precision == "bf16"
    plain = (
        config.method == "lora" and not config.lora.dropout and not config.lora.dora and precision in ("fp32", "bf16")
    )
    held = bind_half_weights(running) if half else 0
    return held + (bind_added_lora(running, half=half) if plain else 0)


def bind_added_lora(running: RunningModel, *, half: bool) -> int:
    """LoRA layers each as one product with its low-rank term, and with GELU where that follows; queries, keys and values of
    BERT-like attention in one. How many layers."""
    from peft.tuners.lora import Linear

    layers = [m for m in running.model.modules() if type(m) is Linear and fits([m])]
    for layer in layers:
        layer.regraft_lora = AddedLora([layer], half=half)  # type: ignore[assignment]
        layer.forward = _linear_forward.__get__(layer)  # type: ignore[method-assign]
    for module in merged_projections(running):
        parts = [module.query, module.key, module.value]
        if fits(parts):
            if not half:
                _put_together(parts)
            module.regraft_lora = AddedLora(parts, half=half)
            module.forward = _attention_forward.__get__(module)
    for module in running.model.modules():
        if _ends_in_gelu(module) and "forward" not in vars(module):
            module.forward = _intermediate_forward.__get__(module)
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
    if self.merged and not self.disable_adapters and self.regraft_lora.half:
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
