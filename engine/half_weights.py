"""bf16 weights kept beside the fp32 ones that are trained, for the matrix products of a CPU.

    y = x W^T + b,   dx = dy W,   dW = dy^T x,   db = sum dy        x, W, b, dy in bf16; dW, db handed on in fp32

These are autocast's numbers without autocast's work: it casts every weight in each micro-batch, without gradients even
each time it is used, and puts a merged projection together in fp32 first. Here a weight is cast when it has changed,
once an optimizer step. Parameters, state dict and what is saved stay in fp32 and never notice. AdamW in C, which has every
weight at hand, writes the copies of those it changes (`copies_written`), so that nothing is left to cast.

Where the processor multiplies bf16 by tiles or by vectors, products are our own (kernels/linear_native.py): any number
of rows, GELU in the same pass, gradients of weights in fp32 as they were added up. Elsewhere they are torch's
(linear_torch.py), and rows are filled up with zeros to one of eight numbers between a power of two and the next: oneDNN
makes machine code anew for every shape of a bf16 product that it has not seen, and packed batches hardly ever have as
many rows as one before (18 ms for the products of a MiniLM layer of known shape, 87 ms of a new one).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.binding import is_intermediate
from regraft.engine.products import intermediate_forward, is_bound, linear, linear_forward, masters, unwatched

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel

HALF = torch.bfloat16
# Those that an optimizer may write; a copied model's are not among them, and cast as ever.
_alive: weakref.WeakSet[HalfWeights] = weakref.WeakSet()


class HalfWeights:
    """Weights [O, I] and biases [O] of linear layers over the same input, one below the other, in bf16."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = list(layers)
        self._made_from: tuple = ()
        self.cast: frozenset[int] = frozenset()  # ids of the masters that the bf16 memory was made from
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        _alive.add(self)

    @property
    def masters(self) -> list[Tensor]:
        return masters(self.layers)

    def current(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are now; cast anew where a layer's have changed."""
        made_from = self._stamp()
        if made_from != self._made_from or self._weight is None:
            with torch.no_grad():
                self._weight = _beside(self._weight, [layer.weight for layer in self.layers])
                biases = [layer.bias for layer in self.layers if layer.bias is not None]
                self._bias = _beside(self._bias, biases) if biases else None
            self._made_from, self.cast = made_from, frozenset(map(id, self.masters))
        return self._weight, self._bias

    def _stamp(self) -> tuple:
        # Whatever writes into a parameter raises its version; what puts other memory into it changes its address.
        return tuple((w.data_ptr(), w._version) for w in self.masters)

    def places(self) -> list[tuple[Tensor, Tensor]]:
        """Each master with its rows of the bf16 memory; none before the first cast, or if that is out of date."""
        weight, bias = self._weight, self._bias
        # of a first cast under inference_mode the version cannot be raised, by which autograd knows what was overwritten
        if weight is None or weight.is_inference() or self._made_from != self._stamp():
            return []
        masters, count = self.masters, len(self.layers)
        parts = list(weight.split([len(master) for master in masters[:count]]))
        if bias is not None:
            parts += bias.split([len(master) for master in masters[count:]])
        return list(zip(masters, parts, strict=True))

    def written(self) -> None:
        """Take the bf16 memory for what the masters are now."""
        torch.autograd.graph.increment_version([t for t in (self._weight, self._bias) if t is not None])
        self._made_from = self._stamp()


@contextmanager
def copies_written(weights: Iterable[Tensor]) -> Iterator[dict[int, Tensor]]:
    """bf16 memory by id of the weight that it copies: the block, which alone changes the weights and raises their versions,
    writes it too. A copy that is out of date, or of a weight that has one already, is left to be cast."""
    changed = {id(w) for w in weights}
    found: dict[int, Tensor] = {}
    mine = []
    for half in list(_alive):
        if changed.isdisjoint(half.cast):
            continue  # frozen ones, of which LoRA has many
        places = half.places()
        ids = {id(master) for master, _ in places}
        if changed & ids and len(ids) == len(places) and not found.keys() & ids:
            found.update((id(master), part) for master, part in places)
            mine.append(half)
    yield found
    for half in mine:
        half.written()


def _beside(held: Tensor | None, masters: Sequence[Tensor]) -> Tensor:
    """The masters one below the other in bf16, in the memory of those `held` before."""
    rows = [len(master) for master in masters]
    if held is None or held.device != masters[0].device:
        held = masters[0].new_empty(sum(rows), *masters[0].shape[1:], dtype=HALF)
    torch._foreach_copy_(list(held.split(rows)), list(masters))
    return held


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
        free = bound is None or is_bound(module)
        if type(module) is nn.Linear and free and module.weight.dtype == torch.float32:
            module.regraft_half = HalfWeights([module])  # type: ignore[assignment]
            module.forward = _linear_forward.__get__(module)  # type: ignore[method-assign]
            count += 1
        elif getattr(bound, "__func__", None) is _merged_attention_forward:
            module.regraft_half = HalfWeights([module.query, module.key, module.value])
    for module in running.model.modules():
        free = "forward" not in vars(module) or is_bound(module)
        if is_intermediate(module) and free and hasattr(module.dense, "regraft_half") and unwatched(module):
            module.forward = _intermediate_forward.__get__(module)
    return count


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    if in_force(x):
        return linear(x, self.regraft_half)
    return linear_forward(self, x)


def _intermediate_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if in_force(hidden_states):
        return linear(hidden_states, self.dense.regraft_half, gelu=True)
    return intermediate_forward(self, hidden_states)
