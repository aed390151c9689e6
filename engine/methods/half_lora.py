"""LoRA over bf16 weights on a CPU: the low-rank term is added to the product, on tiles in the same sums.

    u = x A^T,   y = x W^T + u (s B)^T + b
    v = dy s B,  dx = dy W + v A,   dA = v^T x,   dB = s dy^T u        x, W, b, A, B, u, v, y, dx in bf16; dA, dB in fp32

Layers that share their input are one product: their A_i stand one below the other, their B_i on the diagonal of one matrix.
Shape: x [T, K]; n layers of M outputs each, rank r; A [R, K], B [n M, R], where R is n r rounded up to what is multiplied
together and the rest is zero. A frozen weight is cast once, A and B once an optimizer step; the weights that peft sees stay fp32.
Dropout on the way to A and DoRA's magnitudes are not among these sums: such layers stay peft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regraft.engine.half_weights import HALF, HalfWeights
from regraft.engine.products import products, shaped

ADAPTER = "default"


def is_one_pair(module: Any) -> bool:
    """Whether a module is peft's layer with one LoRA pair and nothing besides: no magnitudes, no bias of the update."""
    a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if not isinstance(a, nn.ModuleDict) or not isinstance(b, nn.ModuleDict) or list(a) != [ADAPTER]:
        return False
    plain = not getattr(module, "lora_variant", {}) and not getattr(module, "fan_in_fan_out", False)
    return plain and type(a[ADAPTER]) is nn.Linear and type(b[ADAPTER]) is nn.Linear and b[ADAPTER].bias is None


def fits(layers: Sequence[Any]) -> bool:
    """Whether LoRA layers are alike, in fp32, and without dropout."""
    if not all(is_one_pair(layer) and type(layer.base_layer) is nn.Linear for layer in layers):
        return False
    bases = [layer.base_layer for layer in layers]
    if any(base.weight.dtype != torch.float32 for base in bases):
        return False
    if any(type(layer.lora_dropout[ADAPTER]) is not nn.Identity for layer in layers):
        return False
    kinds = {
        (layer.in_features, layer.base_layer.bias is None, layer.r[ADAPTER], layer.scaling[ADAPTER]) for layer in layers
    }
    return len(kinds) == 1


class HalfLora:
    """bf16 weights of frozen linear layers over the same input, and of their LoRA pairs."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.base = HalfWeights([layer.base_layer for layer in layers])
        self._made_from: tuple = ()
        self._down = self._up = torch.empty(0)

    @property
    def downs(self) -> list[Tensor]:
        return [layer.lora_A[ADAPTER].weight for layer in self.layers]

    @property
    def ups(self) -> list[Tensor]:
        return [layer.lora_B[ADAPTER].weight for layer in self.layers]

    @property
    def scale(self) -> float:
        return float(self.layers[0].scaling[ADAPTER])

    def pairs(self) -> tuple[Tensor, Tensor]:
        """A [R, K] and s B [O, R] as they are now, in bf16."""
        made_from = (self.scale, *((w.data_ptr(), w._version) for w in (*self.downs, *self.ups)))
        if made_from != self._made_from:
            with torch.no_grad():
                self._down, self._up = self._cast()
            self._made_from = made_from
        return self._down, self._up

    def _cast(self) -> tuple[Tensor, Tensor]:
        rank, inputs = self.downs[0].shape
        side = products(self.base.current()[0]).SIDE
        whole = -(-rank * len(self.layers) // side) * side
        down = self.downs[0].new_zeros(whole, inputs, dtype=HALF)
        up = self.downs[0].new_zeros(sum(len(one) for one in self.ups), whole, dtype=HALF)
        for (rows, columns), a, b in zip(self.blocks(), self.downs, self.ups, strict=True):
            down[columns] = a
            up[rows, columns] = b * self.scale
        return down, up

    def blocks(self) -> list[tuple[slice, slice]]:
        """Where each layer's B stands: its outputs, its ranks."""
        rank, found, start = len(self.downs[0]), [], 0
        for i, up in enumerate(self.ups):
            found.append((slice(start, start + len(up)), slice(i * rank, (i + 1) * rank)))
            start += len(up)
        return found


class _HalfLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, half: HalfLora, gelu: bool, keep: bool, *_: Tensor) -> Tensor:
        weight, bias = half.base.current()
        down, up = half.pairs()
        ctx.by = products(weight)
        rows = ctx.by.as_rows(x)
        inner = ctx.by.linear(rows, down, None)
        if gelu:
            out, active = ctx.by.linear_gelu(rows, weight, bias, (inner, up), keep=keep)
        else:
            out, active = None, ctx.by.linear(rows, weight, bias, (inner, up))
        ctx.save_for_backward(rows, weight, down, up, inner, out)
        ctx.half, ctx.dtype = half, x.dtype
        return shaped(active, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, weight, down, up, inner, out = ctx.saved_tensors
        slopes = ctx.by.as_rows(grad)
        if out is not None:
            slopes = ctx.by.gelu_gradient(slopes, out)
        back = ctx.by.input_gradient(slopes, up)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = shaped(ctx.by.input_gradient(slopes, weight, (back, down)), grad).to(ctx.dtype)
        d_down, _ = ctx.by.weight_gradients(back, rows, bias=False)
        d_up, _ = ctx.by.weight_gradients(inner, slopes, bias=False)  # [R, O]
        blocks = ctx.half.blocks()
        d_downs = [d_down[columns] for _, columns in blocks]
        d_ups = [d_up[columns, outputs].t() * ctx.half.scale for outputs, columns in blocks]
        return dx, None, None, None, *d_downs, *d_ups


def half_lora(x: Tensor, half: HalfLora, gelu: bool = False) -> Tensor:
    """The layers' outputs side by side in bf16, or their GELU, differentiable in x and in the LoRA pairs.
    [.., K] -> [.., sum of M]."""
    return _HalfLora.apply(x, half, gelu, torch.is_grad_enabled(), *half.downs, *half.ups)
