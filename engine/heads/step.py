"""One optimizer step of a head: the main job's step, with ELMo's regulariser added."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from regraft.engine.features.rows import FeatureBatch, FeatureRows
from regraft.engine.heads.bodies import inside
from regraft.engine.heads.combine import ScalarMix
from regraft.engine.heads.head import Head
from regraft.engine.heads.order import BLOCK_BYTES, BlockPlan
from regraft.engine.tasks.base import FIRST, TOKENS
from regraft.engine.training.order import Plan
from regraft.engine.training.step import Stepper


class FeatureHead(nn.Module):
    """A head over stored features, as the training loop sees a model. Shape: FeatureBatch -> [B, C], or [T, C] of a head that
    judges tokens."""

    output_scale = None

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.model = head
        self.reads = TOKENS if head.gives_tokens else FIRST

    def forward(self, batch: FeatureBatch) -> Tensor:
        head = self.model
        if not head.reads_tokens:
            return head(batch.features)
        # Layers are combined before the cells are made: one vector a cell, not one a layer.
        cells, lengths = FeatureBatch(head.combined(batch.features), batch.lengths).cells()
        logits = head.judged(cells, lengths)
        return logits[inside(logits, lengths)] if head.gives_tokens else logits


@dataclass
class HeadStepper(Stepper):
    """`mix`: the learned combination of layers whose weights are held together, or None."""

    mix: ScalarMix | None = None

    def _gradients(self, step: int, rows: np.ndarray) -> Tensor:
        loss = super()._gradients(step, rows)
        if self.mix is not None and self.mix.penalty:
            # After all micro-batches and processes: the penalty belongs to the step, once.
            weights = self.mix.weights
            assert weights.grad is not None
            weights.grad.add_(weights.detach(), alpha=2 * self.mix.penalty)
            loss += self.mix.penalty * float(weights.detach().square().sum())
        return loss


def block_plan(plan: Plan, features: FeatureRows) -> BlockPlan:
    """The plan for features that may not fit memory: pieces of about BLOCK_BYTES as they lie on disk."""
    places = np.lexsort((features.where[:, 1], features.where[:, 0]))
    block = max(1, int(BLOCK_BYTES * len(features) / features.bytes))
    return BlockPlan(plan.rows, plan.batch_size, plan.seed, plan.epochs, plan.max_steps, block=block, places=places)
