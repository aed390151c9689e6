"""LoRA on a CPU: the low-rank term is added to the product, where the products are our own in the same sums.

    u = x A^T,   y = x W^T + u (s B)^T + b
    v = dy s B,  dx = dy W + v A,   dA = v^T x,   dB = s dy^T u

In bf16 x, W, b, A, B, u, v, y and dx are in bf16, dA and dB in fp32; else all is in the type of the weights.
Layers that share their input are one product: their A_i stand one below the other, their B_i on the diagonal of one matrix.
Shape: x [T, K]; n layers of M outputs each, rank r; A [R, K], B [n M, R], where R is n r rounded up to what is multiplied
together and the rest is zero. A frozen weight is cast once, A and B once an optimizer step; the weights that peft sees stay fp32.
A frozen weight has no gradient: no product of T x M with T x K is made. A quantised one (QLoRA, int8) is made whole for the forward
and again for the backward, in memory that lasts as long as the product. Dropout on the way to A and DoRA's magnitudes are not
among these sums: such layers stay peft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regraft.engine.half_weights import HALF, HalfWeights, in_force
from regraft.engine.methods.quantise import QuantisedWeights, is_quantised
from regraft.engine.products import OwnWeights, faster, shaped
from regraft.kernels import linear_native, lora_native

ADAPTER = "default"


def is_one_pair(module: Any) -> bool:
    """Whether a module is peft's layer with one LoRA pair and nothing besides: no magnitudes, no bias of the update."""
    a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if not isinstance(a, nn.ModuleDict) or not isinstance(b, nn.ModuleDict) or list(a) != [ADAPTER]:
        return False
    plain = not getattr(module, "lora_variant", {}) and not getattr(module, "fan_in_fan_out", False)
    return plain and type(a[ADAPTER]) is nn.Linear and type(b[ADAPTER]) is nn.Linear and b[ADAPTER].bias is None


def fits(layers: Sequence[Any]) -> bool:
    """Whether LoRA layers are alike, over weights in fp32 or quantised ones, and without dropout."""
    if not all(is_one_pair(layer) and _is_known(layer.base_layer) for layer in layers):
        return False
    if any(type(layer.lora_dropout[ADAPTER]) is not nn.Identity for layer in layers):
        return False
    shared = [(layer.base_layer, layer.r[ADAPTER], layer.scaling[ADAPTER]) for layer in layers]
    return len({(type(base), base.in_features, base.bias is None, *pair) for base, *pair in shared}) == 1


def _is_known(base: Any) -> bool:
    return base.weight.dtype == torch.float32 if type(base) is nn.Linear else is_quantised(base)


class AddedLora:
    """Frozen linear layers over the same input and their LoRA pairs, as they are multiplied: in bf16 where `half`. `whole`: weights that
    are there anyhow, and need not be made again for the backward."""

    def __init__(self, layers: Sequence[Any], *, half: bool) -> None:
        self.layers, self.half = list(layers), half
        bases = [layer.base_layer for layer in layers]
        self.whole = type(bases[0]) is nn.Linear
        self.base: HalfWeights | OwnWeights | QuantisedWeights
        if self.whole:
            self.base = HalfWeights(bases) if half else OwnWeights(bases)
        else:
            self.base = QuantisedWeights(bases, HALF if half else torch.float32)
        rank, self.blocks = self.layers[0].r[ADAPTER], list[tuple[slice, slice]]()
        end = 0
        for i, base in enumerate(bases):
            start, end = end, end + base.out_features
            self.blocks.append((slice(start, end), slice(i * rank, (i + 1) * rank)))
        # a module's own lookup is slow, and each step asks a hundred times
        self._downs, self._ups = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
        self._made_from: tuple = ()
        self._down = self._up = torch.empty(0)
        self._room: tuple[int, torch.dtype] | None = None
        self._places: list[Tensor] = []

    @property
    def weights(self) -> list[Tensor]:
        """What is trained: the A_i, then the B_i."""
        return [pair._modules[ADAPTER].weight for pair in (*self._downs, *self._ups)]

    @property
    def scale(self) -> float:
        return float(self.layers[0].scaling[ADAPTER])

    def takes(self, x: Tensor) -> bool:
        """Whether this is what x is multiplied with: adapters that are neither merged nor switched off, in the type asked for."""
        if any(getattr(layer, "disable_adapters", True) or layer.merged for layer in self.layers):
            return False
        if self.half:
            return in_force(x)
        plain = not torch.is_autocast_enabled(x.device.type) and not torch.jit.is_tracing()
        return plain and x.dtype == self.weights[0].dtype

    def pairs(self, step: int, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """A [R, K] and s B [O, R] as they are now, R a multiple of `step`; `weights`: `self.weights`."""
        scale = self.scale
        made_from = (step, scale, *((w.data_ptr(), w._version) for w in weights))
        if made_from != self._made_from:
            with torch.no_grad():
                kind = HALF if self.half else weights[0].dtype
                if (step, kind) != self._room or self._up.is_inference():
                    self._make_room(weights, step, kind)
                torch._foreach_copy_(self._places, list(weights))
                self._up.mul_(scale)
            self._made_from = made_from
        return self._down, self._up

    def _make_room(self, weights: Sequence[Tensor], step: int, kind: torch.dtype) -> None:
        """Zeros of the size of A and B, and where in them each weight stands."""
        whole = -(-self.blocks[-1][1].stop // step) * step
        self._down = weights[0].new_zeros(whole, weights[0].shape[1], dtype=kind)
        self._up = weights[0].new_zeros(self.blocks[-1][0].stop, whole, dtype=kind)
        self._places = [self._down[columns] for _, columns in self.blocks]
        self._places += [self._up[rows, columns] for rows, columns in self.blocks]
        self._room = (step, kind)


class _AddedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lora: AddedLora, gelu: bool, keep: bool, *weights: Tensor) -> Tensor:
        weight, bias = lora.base.current()
        ctx.by = faster(x, weight)
        down, up = lora.pairs(ctx.by.step(weight), weights)
        rows = ctx.by.as_rows(x, weight.dtype)
        ctx.at_once = ctx.by is linear_native and lora_native.runs_here(weight)
        if ctx.at_once:
            inner, out, active = lora_native.linear(rows, weight, bias, down, up, gelu=gelu, keep=keep)
        else:
            inner = ctx.by.linear(rows, down, None)
            if gelu:
                out, active = ctx.by.linear_gelu(rows, weight, bias, (inner, up), keep=keep)
            else:
                out, active = None, ctx.by.linear(rows, weight, bias, (inner, up))
        ctx.save_for_backward(rows, weight if lora.whole else None, down, up, inner, out if gelu else None)
        ctx.lora, ctx.scale, ctx.dtype = lora, lora.scale, x.dtype
        return shaped(active, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, weight, down, up, inner, out = ctx.saved_tensors
        if weight is None:
            weight, _ = ctx.lora.base.current()
        slopes = ctx.by.as_rows(grad, weight.dtype)
        inputs, blocks = ctx.needs_input_grad[0], ctx.lora.blocks
        if ctx.at_once:
            parts = slopes, rows, weight, down, up, inner, out
            dx, d_down, d_up = lora_native.gradients(*parts, inputs=inputs, scale=ctx.scale)
        else:
            if out is not None:
                slopes = ctx.by.gelu_gradient(slopes, out)
            back = ctx.by.input_gradient(slopes, up)
            dx = ctx.by.input_gradient(slopes, weight, (back, down)) if inputs else None
            d_down, _ = ctx.by.weight_gradients(back, rows, bias=False)
            d_up = ctx.by.weight_gradients(inner, slopes, bias=False)[0].t() * ctx.scale
        if dx is not None:
            dx = shaped(dx, grad).to(ctx.dtype)
        d_downs = [d_down[columns] for _, columns in blocks]
        d_ups = [d_up[outputs, columns] for outputs, columns in blocks]
        return dx, None, None, None, *d_downs, *d_ups


def added_lora(x: Tensor, lora: AddedLora, gelu: bool = False) -> Tensor:
    """The layers' outputs side by side, or their GELU, differentiable (once) in x and in the LoRA pairs.
    [.., K] -> [.., sum of M]."""
    return _AddedLora.apply(x, lora, gelu, torch.is_grad_enabled(), *lora.weights)
