"""bf16 weights kept beside the fp32 ones that are trained, for the matrix products of a CPU.

    y = x W^T + b,   dx = dy W,   dW = dy^T x,   db = sum dy        x, W, b, dy in bf16; dW, db handed on in fp32

These are autocast's numbers without autocast's work: it casts every weight in each micro-batch, without gradients even
each time it is used, and puts a merged projection together in fp32 first. Here a weight is cast when it has changed,
once an optimizer step. Parameters, state dict and what is saved stay in fp32 and never notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel

HALF = torch.bfloat16


class HalfWeights:
    """Weights [O, I] and biases [O] of linear layers over the same input, one below the other, in bf16."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = list(layers)
        self._made_from: tuple = ()
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    @property
    def masters(self) -> list[Tensor]:
        """Weights of the layers, then their biases."""
        weights = [layer.weight for layer in self.layers]
        return weights + [layer.bias for layer in self.layers if layer.bias is not None]

    def current(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are now; cast anew where a layer's have changed."""
        # Whatever writes into a parameter raises its version; what puts other memory into it changes its address.
        made_from = tuple((w.data_ptr(), w._version) for w in self.masters)
        if made_from != self._made_from or self._weight is None:
            with torch.no_grad():
                self._weight = torch.cat([layer.weight.to(HALF) for layer in self.layers])
                biases = [layer.bias.to(HALF) for layer in self.layers if layer.bias is not None]
                self._bias = torch.cat(biases) if biases else None
            self._made_from = made_from
        return self._weight, self._bias


class _HalfLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, half: HalfWeights, *masters: Tensor) -> Tensor:
        weight, bias = half.current()
        narrow = x.to(HALF)
        ctx.save_for_backward(narrow, weight)
        ctx.dtype, ctx.sizes = x.dtype, [layer.out_features for layer in half.layers]
        return torch.nn.functional.linear(narrow, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        narrow, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).to(HALF)
        inputs, _, *masters = ctx.needs_input_grad
        dx = (rows @ weight).view(*grad.shape[:-1], -1).to(ctx.dtype) if inputs else None
        count = len(ctx.sizes)
        found: list[Tensor | None] = [None] * len(masters)
        if any(masters[:count]):
            whole = rows.t() @ narrow.reshape(-1, narrow.shape[-1])
            found[:count] = [part.float() for part in whole.split(ctx.sizes)]
        if any(masters[count:]):
            found[count:] = [part.float() for part in rows.sum(0).split(ctx.sizes)]
        return dx, None, *(part if asked else None for part, asked in zip(found, masters, strict=True))


def half_linear(x: Tensor, half: HalfWeights) -> Tensor:
    """The layers' outputs side by side in bf16, differentiable in x and in the fp32 weights. [.., I] -> [.., sum of O]."""
    return _HalfLinear.apply(x, half, *half.masters)


def in_force(x: Tensor) -> bool:
    """Whether autocast asks for bf16 products of x's device."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == HALF


def bind_half_weights(running: RunningModel) -> int:
    """Hold bf16 weights beside those of every plain linear layer, and beside merged projections; how many layers."""
    from regraft.engine.fast import _merged_attention_forward

    count = 0
    for module in running.model.modules():
        bound = vars(module).get("forward")
        if type(module) is nn.Linear and bound is None and module.weight.dtype == torch.float32:
            module.regraft_half = HalfWeights([module])  # type: ignore[assignment]
            module.forward = _linear_forward.__get__(module)  # type: ignore[method-assign]
            count += 1
        elif getattr(bound, "__func__", None) is _merged_attention_forward:
            module.regraft_half = HalfWeights([module.query, module.key, module.value])
    return count


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    if in_force(x):
        return half_linear(x, self.regraft_half)
    return torch.nn.functional.linear(x, self.weight, self.bias)
