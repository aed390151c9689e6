"""Metrics over rows: sharded over processes, exact, in memory that does not grow with rows times classes."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from regraft.engine.batches import by_length, collate
from regraft.engine.models import RunningModel
from regraft.engine.tasks import Task
from regraft.engine.tasks.base import Metrics

if TYPE_CHECKING:
    from accelerate import Accelerator

    from regraft.engine.data.tokens import TokenStore


@dataclass(frozen=True)
class Evaluation:
    """Figures of one split. `worst`: (loss, row, logits) of the rows that are most wrong, the worst first."""

    metrics: dict[str, float]
    accumulated: Metrics
    worst: list[tuple[float, int, np.ndarray]]
    rows: int
    tokens: int
    seconds: float


def evaluate(
    running: RunningModel,
    store: TokenStore,
    targets: np.ndarray,
    task: Task,
    *,
    token_budget: int = 8192,
    accelerator: Accelerator | None = None,
    keep_worst: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run every row once and add up. Every process gets the same result; `progress` is called with rows done."""
    started = time.perf_counter()
    metrics = task.metrics()
    worst: list[tuple[float, int, np.ndarray]] = []
    batches = by_length(store.lengths, token_budget)
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for rows in batches[rank::processes]:
        logits = run_logits(running, store, rows, accelerator)
        metrics.update(logits, targets[rows])
        if keep_worst:
            losses = task.worst(logits, targets[rows])
            worst = heapq.nlargest(
                keep_worst,
                [*worst, *((float(x), int(r), z) for x, r, z in zip(losses, rows, logits, strict=True))],
                key=lambda item: (item[0], -item[1]),
            )
        if progress:
            progress(len(rows) * processes)
    if accelerator and processes > 1:
        metrics, worst = _merge(task, metrics, worst, keep_worst)
    return Evaluation(
        metrics.compute(), metrics, worst, len(targets), int(store.lengths.sum()), time.perf_counter() - started
    )


@torch.no_grad()
def run_logits(
    running: RunningModel, store: TokenStore, rows: np.ndarray, accelerator: Accelerator | None = None
) -> np.ndarray:
    """Logits [B, C] float32 of the rows, with dropout off."""
    was_training = running.training
    running.eval()
    try:
        batch = collate(store, rows).to(next(running.parameters()).device)
        if accelerator is None:
            return running(batch).float().cpu().numpy()
        with accelerator.autocast():
            return running(batch).float().cpu().numpy()
    finally:
        if was_training:
            running.train()


def _merge(task: Task, mine: Metrics, worst: list, keep: int) -> tuple[Metrics, list]:
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object([(mine.state(), worst)])
    whole = task.metrics()
    for state, _ in gathered:
        whole.merge(state)
    everyone = [item for _, part in gathered for item in part]
    return whole, heapq.nlargest(keep, everyone, key=lambda item: (item[0], -item[1]))
