"""One optimizer step of a head: the main job's step, with ELMo's regulariser added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from regraft.engine.data.rows import Rows
from regraft.engine.examples import Examples
from regraft.engine.features.rows import FeatureBatch, FeatureRows
from regraft.engine.heads.combine import ScalarMix
from regraft.engine.heads.head import Head
from regraft.engine.heads.order import BLOCK_BYTES, BlockPlan
from regraft.engine.tasks import Task
from regraft.engine.tasks.base import FIRST
from regraft.engine.training.order import Plan
from regraft.engine.training.step import Stepper


class FeatureHead(nn.Module):
    """A head over stored features, as the training loop sees a model. Shape: FeatureBatch -> [B, C]."""

    reads = FIRST
    output_scale = None

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.model = head

    def forward(self, batch: FeatureBatch) -> Tensor:
        return self.model(*batch.cells()) if self.model.reads_tokens else self.model(batch.features)


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


def examples_of(task: Task, rows: Rows, features: FeatureRows, targets: np.ndarray) -> Examples:
    """Stored features as what a task learns from: one row of features, one target a text."""
    store: Any = features
    return Examples(rows, store, targets, task.weights(targets), counts=task.label_counts(targets))


def block_plan(plan: Plan, features: FeatureRows) -> BlockPlan:
    """The plan for features that may not fit memory: pieces of about BLOCK_BYTES as they lie on disk."""
    places = np.lexsort((features.where[:, 1], features.where[:, 0]))
    block = max(1, int(BLOCK_BYTES * len(features) / features.bytes))
    return BlockPlan(plan.rows, plan.batch_size, plan.seed, plan.epochs, plan.max_steps, block=block, places=places)
