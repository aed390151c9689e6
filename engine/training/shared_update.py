"""AdamW by the processes of one machine together: each averages and updates its share of weights that all of them hold.

Gradients are summed share by share and go no further than to the process that updates with them; there is one copy of weights and
moments for all, in memory that they share. So a step of two processes computes and moves half of what it would where each did
the whole update (ZeRO's stage 1, Rajbhandari et al. 2020, without sending the weights back).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regraft.engine.training.average import LINE, Exchange, cut, pieces
from regraft.engine.training.common_memory import CommonMemory
from regraft.engine.training.optimizer import is_plain_adamw, say_changed
from regraft.engine.training.together import agreed
from regraft.kernels import adamw_native
from regraft.kernels.adamw_native import Update

if TYPE_CHECKING:
    from regraft.kernels.embedding import RowGradient

MOMENTS = ("exp_avg", "exp_avg_sq")
SAID_BYTES = LINE  # of each process: its sum of squares and its loss


class _Share(NamedTuple):
    """Numbers `start` to `end` of weight `number`, and the sum of their gradients."""

    number: int
    start: int
    end: int
    gradient: Tensor


class SharedUpdate:
    """The update of `optimizer` (AdamW as torch has it) shared out among processes; `of_all` makes one."""

    def __init__(self, optimizer: torch.optim.AdamW, exchange: Exchange, memory: CommonMemory) -> None:
        self._optimizer, self._exchange, self._memory = optimizer, exchange, memory
        self._weights = _weights_of(optimizer)
        self._groups = [group for group in optimizer.param_groups for _ in group["params"]]
        self._said = [torch.frombuffer(part, dtype=torch.float64, count=2) for part in memory.parts]
        self._summed: list[_Share] = []
        self._move()

    @classmethod
    def of_all(cls, optimizer: Any, exchange: Exchange | None) -> SharedUpdate | None:
        """Every process has to call, after the same number of steps. None, in all of them, where the update is not AdamW's in C,
        where a weight is empty or has no moments yet, or where there is no memory for it."""
        usable = exchange is not None and is_plain_adamw(optimizer)
        weights = _weights_of(optimizer) if usable else []
        held = [t for p in weights for t in _held(optimizer, p).values()]
        usable = len(held) == 3 * len(weights) and all(t.numel() for t in held) and adamw_native.runs_here(held)
        if agreed(float(usable), "smallest") == 0.0 or exchange is None:
            return None
        size = sum(map(_room, held)) if exchange.rank == 0 else 0
        memory = CommonMemory.of_all(exchange.count, SAID_BYTES + size)
        return None if memory is None else cls(optimizer, exchange, memory)

    def _move(self) -> None:
        """Put weights and moments into the first process's part; they are the same everywhere. One by one: what held them is
        free again before the next is moved."""
        start, common = SAID_BYTES, self._memory.parts[0]
        for weight in self._weights:
            for name, held in _held(self._optimizer, weight).items():
                # A tensor of its own each, which is saved without the others.
                place = torch.frombuffer(common, dtype=held.dtype, count=held.numel(), offset=start).view(held.shape)
                if self._memory.rank == 0:
                    place.copy_(held.detach())
                if name == "weight":
                    weight.data = place
                else:
                    self._optimizer.state[weight][name] = place
                start += _room(held)
        self._memory.meet()

    def leave(self) -> None:
        """Give this process weights of its own again, and forget the moments: what follows may write them."""
        for weight in self._weights:
            weight.data = weight.data.clone()
        self._optimizer.state.clear()

    @torch.no_grad()
    def sum(self, lost: Tensor, rows: RowGradient | None = None) -> tuple[float, float]:
        """Sum the gradients of all processes, each its share; the loss [] and the norm of the whole mean gradient. `rows`: a
        gradient of which only these differ from zero, which every process gets whole."""
        exchange, rank, self._summed = self._exchange, self._exchange.rank, []
        by_rows = None if rows is None else rows.weight
        dense = {n: p.grad for n, p in enumerate(self._weights) if p.grad is not None and p is not by_rows}
        gradients, numbers, squares = [g.contiguous() for g in dense.values()], list(dense), 0.0
        for message in cut(gradients, exchange.count):
            own, others = exchange.swap(pieces(gradients, message))
            squares += adamw_native.square_sum(own, others)
            mine = message[rank] if own else []
            self._summed += [_Share(numbers[p.number], p.start, p.end, g) for p, g in zip(mine, own, strict=True)]
        if rows is not None:
            squares += self._sum_rows(rows)
        self._said[rank].copy_(torch.tensor([squares, float(lost)], dtype=torch.float64))
        self._memory.meet()
        squares, losses = torch.stack(self._said).sum(0).tolist()
        return losses / exchange.count, squares**0.5 / exchange.count

    def _sum_rows(self, rows: RowGradient) -> float:
        """Add the others' rows to this process's; their sum of squares, from one process, and 0 from the others."""
        for ids, some in self._exchange.rows_of_others(*rows.own()):
            rows.add(ids.clone(), some)  # which it remembers
        number = next(n for n, p in enumerate(self._weights) if p is rows.weight)
        for message in cut([rows.buffer], self._exchange.count):
            for piece in message[self._exchange.rank] if self._exchange.rank < len(message) else ():
                gradient = rows.buffer.view(-1)[piece.start : piece.end]
                self._summed.append(_Share(number, piece.start, piece.end, gradient))
        return adamw_native.square_sum([rows.rows()]) if self._exchange.rank == 0 else 0.0

    @torch.no_grad()
    def step(self, norm: float, max_norm: float | None) -> None:
        """Update with what `sum` found, scaled to a norm of `max_norm` at most."""
        updates = []
        for share in self._summed:
            weight, group = self._weights[share.number], self._groups[share.number]
            state = self._optimizer.state[weight]
            here = [t.detach().view(-1)[share.start : share.end] for t in (weight, *(state[name] for name in MOMENTS))]
            options = group["lr"], group["weight_decay"], group["betas"], group["eps"]
            # A count of its own for each share: the update raises it.
            updates.append(Update(here[0], share.gradient, here[1], here[2], state["step"].clone(), *options))
        over = 1.0 if max_norm is None else max(norm / max_norm, 1.0)
        adamw_native.adamw(updates, over * self._exchange.count)
        torch._foreach_add_([self._optimizer.state[p]["step"] for p in self._weights if p.grad is not None], 1)
        self._summed = []
        self._memory.meet()
        say_changed(self._optimizer)


def _weights_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _held(optimizer: Any, weight: Tensor) -> dict[str, Tensor]:
    """A weight and its moments; the weight alone before its first step."""
    state = optimizer.state.get(weight, {})
    return {"weight": weight} | {name: state[name] for name in MOMENTS if name in state}


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // LINE) * LINE
