"""Matrix products of linear layers on a CPU, by our own C where it is faster, bound on instances of nn.Linear.

    y = x W^T + b,   h = gelu(y)                       dx = dy W,   dW = dy^T x,   db = sum dy

In fp32 the weights are the layers' own; in bf16 they are kept beside them (half_weights.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regraft.engine.binding import is_intermediate
from regraft.kernels import linear_native, linear_torch


class Weights(Protocol):
    """Weights [O, I] and biases [O] of linear layers over the same input, one below the other."""

    layers: Sequence[nn.Linear]

    @property
    def masters(self) -> list[Tensor]:
        """What is trained: weights of the layers, then their biases."""

    def current(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are now, in the type that products are computed in."""


class OwnWeights:
    """The layers' own, as they are."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers

    @property
    def masters(self) -> list[Tensor]:
        return masters(self.layers)

    def current(self) -> tuple[Tensor, Tensor | None]:
        parts = [master.detach() for master in self.masters]
        weights, biases = parts[: len(self.layers)], parts[len(self.layers) :]
        return _joined(weights), _joined(biases) if biases else None


def _joined(parts: list[Tensor]) -> Tensor:
    """Tensors one below the other: as they lie where they do so in memory, else in new memory."""
    one, at = parts[0], parts[0].data_ptr()
    for part in parts:
        apart = part.data_ptr() != at or part.untyped_storage().data_ptr() != one.untyped_storage().data_ptr()
        if apart or not part.is_contiguous():
            return torch.cat(parts)
        at += part.numel() * part.element_size()
    return one.as_strided((sum(map(len, parts)), *one.shape[1:]), one.stride()) if len(parts) > 1 else one


def masters(layers: Sequence[nn.Linear]) -> list[Tensor]:
    """Weights of the layers, then their biases."""
    return [layer.weight for layer in layers] + [layer.bias for layer in layers if layer.bias is not None]


def products(weight: Tensor) -> Any:
    """Whose products a weight [O, I] takes part in: our own in C where the processor has what they need, else torch's."""
    return linear_native if linear_native.runs_here(weight) else linear_torch


def faster(x: Tensor, weight: Tensor) -> Any:
    """Whose products x [.., I] with a weight [O, I] are: as `products`, but few rows in fp32 are torch's."""
    in_fp32 = weight.dtype == torch.float32
    return linear_torch if in_fp32 and not linear_native.pays(x, weight) else products(weight)


def linear(x: Tensor, weights: Weights, gelu: bool = False) -> Tensor:
    """The layers' outputs side by side, or their GELU, differentiable (once) in x and in the layers' weights, in the
    type of `weights.current()`. [.., I] -> [.., sum of O]."""
    return _Linear.apply(x, weights, gelu, torch.is_grad_enabled(), *weights.masters)


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """[rows, O], perhaps filled up -> [.., O], one for each row of `like` [.., I]."""
    shape = (*like.shape[:-1], rows.shape[-1])
    if rows.numel() == math.prod(shape):
        # no view in autograd's eyes, who would refuse to let it be changed in place
        return torch.ops.aten._unsafe_view.default(rows, shape)
    return rows[: math.prod(shape[:-1])].view(shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Weights, gelu: bool, keep: bool, *_: Tensor) -> Tensor:
        weight, bias = weights.current()
        ctx.by = faster(x, weight)
        ctx.dtype, ctx.kind, ctx.sizes = x.dtype, weight.dtype, [layer.out_features for layer in weights.layers]
        rows = ctx.by.as_rows(x, weight.dtype)
        if gelu:
            out, active = ctx.by.linear_gelu(rows, weight, bias, keep=keep)
        else:
            out, active = None, ctx.by.linear(rows, weight, bias)
        inputs, _, _, _, *asked = ctx.needs_input_grad
        of_weights = any(asked[: len(ctx.sizes)])
        ctx.save_for_backward(rows if of_weights else None, weight if inputs else None, out)
        return shaped(active, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, weight, out = ctx.saved_tensors
        slopes = ctx.by.as_rows(grad, ctx.kind)
        if out is not None:
            slopes = ctx.by.gelu_gradient(slopes, out)
        inputs, _, _, _, *asked = ctx.needs_input_grad
        dx = shaped(ctx.by.input_gradient(slopes, weight), grad).to(ctx.dtype) if inputs else None
        count = len(ctx.sizes)
        of_weights, of_biases = any(asked[:count]), any(asked[count:])
        found: list[Tensor | None] = [None] * len(asked)
        if of_weights:
            dw, db = ctx.by.weight_gradients(slopes, rows, of_biases)
            found[:count] = dw.split(ctx.sizes)
        else:
            db = slopes.sum(0, dtype=torch.float32) if of_biases else None
        if db is not None:
            found[count:] = db.split(ctx.sizes)
        return dx, None, None, None, *(part if wanted else None for part, wanted in zip(found, asked, strict=True))


def bind_products(model: nn.Module) -> int:
    """Compute in C what nn.Linear holds in fp32, where that is faster than torch; how many layers."""
    plain: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    fp32 = [m for m in plain if m.weight.dtype == torch.float32]
    found = [m for m in fp32 if linear_native.runs_here(m.weight.detach())]
    for layer in found:
        layer.forward = linear_forward.__get__(layer)
    for module in model.modules():
        if is_intermediate(module) and module.dense in found and "forward" not in vars(module) and unwatched(module):
            module.forward = intermediate_forward.__get__(module)
    return len(found)


def is_bound(module: Any) -> bool:
    """Whether a module's forward is one of `bind_products`."""
    return getattr(vars(module).get("forward"), "__func__", None) in (linear_forward, intermediate_forward)


def unwatched(intermediate: Any) -> bool:
    """Whether nobody listens to one of the two parts, who would have to be called."""
    parts = (intermediate.dense, intermediate.intermediate_act_fn)
    return not any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)


def is_ours(x: Tensor, layers: Sequence[nn.Linear]) -> bool:
    """Whether products of x with these layers in fp32 go through `linear`.

    Where gradients are asked for this says yes whatever the number of rows, of which few are left to torch there: processes that
    share out gradients in the order in which they come (DeepSpeed) count on the same graph in all, and each has rows of its own."""
    if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return False
    weights = [layer.weight.detach() for layer in layers]
    if type(x) is not Tensor or any(t.dtype != torch.float32 for t in (x, *weights)):
        return False
    if torch.is_grad_enabled():
        return x.device.type == "cpu" and all(map(linear_native.runs_here, weights))
    return all(linear_native.pays(x, weight) for weight in weights)


def linear_forward(self: Any, x: Tensor) -> Tensor:
    """nn.Linear's, in C where that is faster."""
    if is_ours(x, [self]):
        return linear(x, OwnWeights([self]))
    return torch.nn.functional.linear(x, self.weight, self.bias)


def intermediate_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """That of a BERT-like layer's first half of its feed-forward, GELU in the same pass."""
    if is_ours(hidden_states, [self.dense]):
        return linear(hidden_states, OwnWeights([self.dense]), gelu=True)
    return self.intermediate_act_fn(self.dense(hidden_states))
