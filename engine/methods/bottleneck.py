"""Bottleneck adapters: y = W x + b, then y + up(f(down(y))), at the end of a sublayer.

Houlsby et al. 2019 place one after attention and one after the feed-forward; Pfeiffer et al. 2021 one after the
feed-forward alone. `up` starts at zero, so a model starts as it was. Saved and loaded like peft's folders, by an own type.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.engine.errors import ModelError
from regraft.engine.methods.settings import AdapterSettings
from regraft.engine.methods.walk import attention_ends, feed_forward_ends

FUNCTIONS = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "tanh": torch.tanh,
    "silu": nn.functional.silu,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class BottleneckSpec:
    """What is written to adapter_config.json. `targets`: full paths of the linear layers that carry an adapter."""

    kind: str
    size: int
    nonlinearity: str
    dropout: float
    targets: tuple[str, ...]
    peft_type: str = "REGRAFT_BOTTLENECK"


class Bottleneck(nn.Module):
    """x + up(f(down(x))). Shape: [.., H] -> [.., H]."""

    def __init__(self, hidden: int, spec: BottleneckSpec) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, spec.size)
        self.up = nn.Linear(spec.size, hidden)
        self.dropout = nn.Dropout(spec.dropout)
        self.function: Any = FUNCTIONS[spec.nonlinearity]
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.function(self.down(self.dropout(x))))


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter behind it."""

    def __init__(self, base: nn.Linear, adapter: Bottleneck) -> None:
        super().__init__()
        self.base_layer, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.base_layer(x))


def bottleneck_spec(model: Any, settings: AdapterSettings) -> BottleneckSpec:
    """Where the adapters go and how wide they are. Raises ModelError where the sublayers are not found."""
    targets = feed_forward_ends(model)
    if settings.kind == "houlsby":
        ends = attention_ends(model)
        if len(ends) != len(targets):
            raise ModelError(
                f"adapter.kind: houlsby: {type(model).__name__} ends {len(ends)} attention and {len(targets)} feed-forward "
                "sublayers in ways that are known; use kind: pfeiffer or method: lora"
            )
        targets = ends + targets
    if not targets:
        raise ModelError(f"method: adapter: the feed-forward layers of {type(model).__name__} were not found; use lora")
    hidden = model.get_submodule(targets[0]).out_features
    size = settings.size or (max(1, hidden // settings.reduction) if settings.reduction else 64)
    return BottleneckSpec(settings.kind, size, settings.nonlinearity, settings.dropout, tuple(targets))


def add_bottlenecks(model: Any, spec: BottleneckSpec) -> None:
    """Put the adapters in place. Raises ModelError when a target is not a linear layer of this model."""
    for name in spec.targets:
        parent, _, last = name.rpartition(".")
        try:
            base = model.get_submodule(name)
        except AttributeError:
            raise ModelError(
                f"the adapter is for a model with a layer {name}; {type(model).__name__} has none"
            ) from None
        adapter = Bottleneck(base.out_features, spec).to(base.weight.device)
        setattr(model.get_submodule(parent), last, AdaptedLinear(base, adapter))


def write_spec(folder: Path, spec: BottleneckSpec, base: str) -> None:
    """adapter_config.json, as peft names it."""
    values = asdict(spec) | {"targets": list(spec.targets), "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_spec(folder: Path) -> BottleneckSpec:
    """Raises ModelError where adapter_config.json is not what `write_spec` wrote."""
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("base_model_name_or_path", None)
    try:
        return BottleneckSpec(**values | {"targets": tuple(values["targets"])})
    except (KeyError, TypeError):
        wanted = ", ".join(field.name for field in fields(BottleneckSpec))
        raise ModelError(f"{file}: expected the keys {wanted}; found {', '.join(values) or 'none'}") from None
