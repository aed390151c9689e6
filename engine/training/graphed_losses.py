"""Losses over shapes that depend on a step's bucket alone, so that a CUDA graph can hold them.

A task's own `batch_loss` may look at values to find out what to compute: which tokens begin a word, where a window ends.
Here that is settled on the host before the batch is filled up, and a graph only multiplies: a token or a sequence that
does not count has weight 0. The numbers are those of `batch_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from regraft.engine.buckets import Bucket, fill_rows
from regraft.engine.packing import PackedBatch
from regraft.engine.varlen_layout import VarlenLayout

if TYPE_CHECKING:
    from regraft.engine.tasks import Task

COMPARED = ("choice",)  # tasks whose loss is of several sequences together


class StepLoss(Protocol):
    """`fill` makes what the loss reads, on the host, in the bucket's shape; calling it gives the batch's loss []."""

    def fill(self, batch: PackedBatch, bucket: Bucket, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]: ...

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor, layout: VarlenLayout) -> Tensor: ...


@dataclass(frozen=True)
class SequenceLoss:
    """A loss of each sequence's own logits. Shape: logits [B, C], targets [B, ..], weights [B]."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]

    def fill(self, batch: PackedBatch, bucket: Bucket, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return fill_rows(targets, bucket.sequences), fill_rows(weights, bucket.sequences)

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor, layout: VarlenLayout) -> Tensor:
        return self.loss(logits, targets, weights)


@dataclass(frozen=True)
class WordLoss:
    """Cross-entropy of each word's tag at its first token; a sequence's weight is shared out over its words.

    Shape: logits [T, C], targets [T, 2] (tag and word of each token) and weights [B], filled up to tags [T] and weights [T].
    """

    nothing: int  # the tag that stands where none is wanted
    label_smoothing: float = 0.0

    def fill(self, batch: PackedBatch, bucket: Bucket, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        tags = targets[:, 0]
        counted = tags != self.nothing
        owner = torch.repeat_interleave(torch.arange(batch.sequences), torch.tensor(batch.lengths))
        words = torch.zeros(batch.sequences).index_add_(0, owner, counted.float())
        each = (weights / words.clamp(min=1))[owner] * counted
        return fill_rows(torch.where(counted, tags, 0), bucket.tokens), fill_rows(each.float(), bucket.tokens)

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor, layout: VarlenLayout) -> Tensor:
        functional = torch.nn.functional
        each = functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=self.label_smoothing)
        return (each * weights).sum()


@dataclass(frozen=True)
class WindowLoss:
    """Mean of start's and end's cross-entropy over the tokens of each window. Shape: logits [T, 2], targets [B, 2]."""

    def fill(self, batch: PackedBatch, bucket: Bucket, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return fill_rows(targets, bucket.sequences), fill_rows(weights, bucket.sequences)

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor, layout: VarlenLayout) -> Tensor:
        starts, ends = layout.cu_seqlens[:-1, None].long(), layout.cu_seqlens[1:, None].long()
        at = starts + torch.arange(layout.longest, device=logits.device)
        inside = at < ends
        cells = logits.float().index_select(0, torch.where(inside, at, starts).flatten())
        cells = cells.view(*at.shape, 2).masked_fill(~inside[..., None], float("-inf"))
        right = cells.gather(1, targets[:, None, :]).squeeze(1)
        return ((cells.logsumexp(dim=1) - right).mean(dim=-1) * weights).sum()


def step_loss(task: Task) -> StepLoss | str:
    """The task's loss in a form that a graph can hold; why there is none, where there is none."""
    from regraft.engine.tasks.base import FIRST, Task
    from regraft.engine.tasks.tagging import NO_TARGET

    made: Any = task
    if task.reads == FIRST and type(task).batch_loss is Task.batch_loss and task.type not in COMPARED:
        return SequenceLoss(task.loss)
    if task.type == "tagging":
        if made.crf is not None:
            return "a CRF's loss takes as many steps as a sequence has words"
        if made.alignment != "first":
            return "a word's tokens are averaged, of which each step has another number"
        return WordLoss(NO_TARGET, made.label_smoothing)
    if task.type == "answering":
        return WindowLoss()
    return f"the loss of task {task.type} looks at more than each sequence's own logits"
