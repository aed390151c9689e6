"""Metrics over rows: sharded over processes, exact, in memory that does not grow with rows times classes."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from regraft.engine.batches import by_length, collate_examples
from regraft.engine.errors import NotFiniteError
from regraft.engine.models import RunningModel
from regraft.engine.tasks import Task
from regraft.engine.tasks.base import FIRST, Metrics

if TYPE_CHECKING:
    from accelerate import Accelerator

    from regraft.engine.examples import Examples

# On two cores 8192 tokens run 5% faster than 2048 and cost MiniLM's process 0.5 GB more, beyond what training takes.
CPU_TOKENS, GPU_TOKENS = 2048, 8192
# (loss, row, (expected, predicted)) of a row, for the report
Worst = tuple[float, int, tuple[str, str]]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one split. `worst`: the rows that are most wrong, the worst first."""

    metrics: dict[str, float]
    accumulated: Metrics
    worst: list[Worst]
    rows: int
    tokens: int
    seconds: float


def evaluate(
    running: RunningModel,
    examples: Examples,
    task: Task,
    *,
    token_budget: int | None = None,
    accelerator: Accelerator | None = None,
    keep_worst: int = 0,
    progress: Callable[[int], None] | None = None,
    most_batches: int | None = None,
) -> Evaluation:
    """Run every row once and add up. Every process gets the same result; `progress` is called with rows done.

    `most_batches` looks at so many batches alone, the largest first: for who wants the cost and not the figures.
    Raises NotFiniteError where the model's outputs are NaN or infinite, of which no figure can be made."""
    started = time.perf_counter()
    metrics = task.metrics()
    worst: list[Worst] = []
    # The windows of a text are judged together, so a batch holds whole rows.
    batches = by_length(examples.row_lengths, token_budget or at_once(running))[:most_batches]
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine: list[Any] = batches[rank::processes]
    if getattr(running, "runs_in_step", False):  # the others wait for this process in every layer of every batch
        mine += [None] * (len(batches[::processes]) - len(mine))
    for rows in mine:
        if rows is None:
            drawn, sequences = task.draw(examples.ungrouped, examples.sequences_of_rows(batches[0]), (0, 0))
            run_outputs(running, drawn, sequences, accelerator)
            continue
        drawn, sequences = task.draw(examples.ungrouped, examples.sequences_of_rows(rows), (0, int(rows[0])))
        outputs = run_outputs(running, drawn, sequences, accelerator)
        refuse_not_finite(outputs, drawn, sequences)
        task.score(metrics, drawn, sequences, outputs)
        if keep_worst:
            found = task.worst_rows(drawn, sequences, outputs, keep_worst)
            worst = heapq.nlargest(keep_worst, [*worst, *found], key=lambda item: (item[0], -item[1]))
        if progress:
            progress(len(rows) * processes)
    if accelerator and processes > 1:
        metrics, worst = _merge(task, metrics, worst, keep_worst)
    tokens, rows_run = int(examples.store.lengths.sum()), len(examples.rows)
    return Evaluation(metrics.compute(), metrics, worst, rows_run, tokens, time.perf_counter() - started)


def in_short(metrics: dict[str, float], task: Task) -> dict[str, float]:
    """The figures to follow a run by: all; of several tasks the mean and each one's main figure."""
    tasks = getattr(task, "tasks", None)
    return metrics if tasks is None else dict(list(metrics.items())[: 1 + len(tasks)])


@torch.no_grad()
def run_outputs(
    running: RunningModel, examples: Examples, sequences: np.ndarray, accelerator: Accelerator | None = None
) -> Sequence[np.ndarray]:
    """What the head gives for each sequence, float32 with dropout off: [B, C] where it reads first rows, else one
    array [L, C] a sequence, of its tokens or of those that are marked."""
    was_training = running.training
    running.eval()
    try:
        batch = collate_examples(examples, sequences).to(next(running.parameters()).device)
        with nullcontext() if accelerator is None else accelerator.autocast():
            logits = running(batch)
        found, *pairs = [x.float().cpu().numpy() for x in (logits if isinstance(logits, tuple) else (logits,))]
    finally:
        if was_training:
            running.train()
    if running.reads == FIRST:
        return found
    each = np.split(found, np.cumsum(rows_read(examples, sequences))[:-1])
    return list(zip(each, pairs[0], strict=True)) if pairs else each  # type: ignore[arg-type]


def refuse_not_finite(outputs: Sequence[Any], examples: Examples, sequences: np.ndarray) -> None:
    """Raise NotFiniteError naming the first row whose outputs hold NaN or infinity; minus infinity is an answer too."""
    if isinstance(outputs, np.ndarray) and (outputs < np.inf).all():
        return
    for output, sequence in zip(outputs, sequences, strict=True):
        parts = output if isinstance(output, tuple) else (output,)
        if not all((part < np.inf).all() for part in parts):
            row = sequence if examples.row_of is None else examples.row_of[sequence]
            raise NotFiniteError(
                f"{examples.rows.where(int(row))}: the model's outputs for this row are NaN or infinite"
            )


def rows_read(examples: Examples, sequences: np.ndarray) -> np.ndarray:
    """How many rows of logits each sequence has where the head reads tokens, [B] int64."""
    lengths = examples.store.lengths[sequences]
    if examples.marks is None:
        return lengths
    marked = examples.marks[examples.tokens(sequences)]
    owner = np.repeat(np.arange(len(sequences)), lengths)
    return np.bincount(owner[marked], minlength=len(sequences))


def at_once(running: RunningModel) -> int:
    """Tokens of one forward pass without gradients."""
    return GPU_TOKENS if next(running.parameters()).device.type == "cuda" else CPU_TOKENS


def run_all(running: RunningModel, examples: Examples) -> list[np.ndarray]:
    """Outputs of every sequence, in order; sequences of like length run together."""
    outputs: list[Any] = [None] * len(examples.store)
    for batch in by_length(examples.store.lengths, at_once(running)):
        for number, found in zip(batch, run_outputs(running, examples, batch), strict=True):
            outputs[number] = found
    return outputs


def _merge(task: Task, mine: Metrics, worst: list, keep: int) -> tuple[Metrics, list]:
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object([(mine.state(), worst)])
    whole = task.metrics()
    for state, _ in gathered:
        whole.merge(state)
    everyone = [item for _, part in gathered for item in part]
    return whole, heapq.nlargest(keep, everyone, key=lambda item: (item[0], -item[1]))
