"""A regression learns in units of its labels' spread and is saved in the labels' own.

The learning rate that suits a pretrained encoder moves a weight by some 1e-5 a step: a head that starts near 0 would
take most of a run to reach ratings around 3, and never reach prices around 100,000. So while a model is trained, its
last linear layer's output x counts as `mean + spread * x`; when it is saved, mean and spread go into that layer's
weight and bias, and the saved model gives the same numbers with nothing beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class OutputScale:
    """`mean` and `spread` in the labels' unit; `layer` is the linear layer whose output the logits are."""

    mean: float
    spread: float
    layer: nn.Linear

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.float() * self.spread + self.mean

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Within the block the layer gives the scaled numbers by itself; its own weights are back afterwards."""
        weight, bias = self.layer.weight.data, self.layer.bias.data
        self.layer.weight.data = weight * self.spread
        self.layer.bias.data = bias * self.spread + self.mean
        try:
            yield
        finally:
            self.layer.weight.data, self.layer.bias.data = weight, bias


def output_layer(model: Any, outputs: int) -> nn.Linear | None:
    """The linear layer with a bias that gives the logits; None where the model's head has another form."""
    backbone = {id(module) for module in model.base_model.modules()}
    linear = [m for m in model.modules() if type(m) is nn.Linear and id(m) not in backbone]
    last = linear[-1] if linear else None
    return last if last is not None and last.bias is not None and last.out_features == outputs else None


def scale_output(model: Any, mean: float, spread: float) -> OutputScale | None:
    """The scale for a head of one output; None where it cannot be folded into the head, which then learns as it is."""
    layer = output_layer(model, 1)
    usable = layer is not None and spread > 0 and all(map(_is_plain, (mean, spread)))
    return OutputScale(mean, spread, layer) if usable and layer is not None else None


def _is_plain(value: float) -> bool:
    return bool(torch.isfinite(torch.tensor(value, dtype=torch.float32)))
