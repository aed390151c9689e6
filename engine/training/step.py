"""One optimizer step: the loss is a sum over all its sequences, divided once by their total weight.

So the same step is taken in one micro-batch or eight, on one process or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from regraft.engine.batches import collate_examples
from regraft.engine.errors import TrainingError
from regraft.engine.packing import split_by_tokens
from regraft.engine.tasks import Task
from regraft.engine.training.optimizer import clipped_step, gradient_norm
from regraft.engine.training.order import share_by_tokens

if TYPE_CHECKING:
    from accelerate import Accelerator

    from regraft.engine.examples import Examples
    from regraft.engine.training.graphed import GraphedGradients
    from regraft.engine.training.sharding import Shards
    from regraft.kernels.embedding import RowGradient


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the step's weight; `applied`: False when it was not finite and the weights were left alone."""

    loss: float
    grad_norm: float
    tokens: int
    applied: bool


@dataclass
class Stepper:
    """What a step needs. `token_budget` halves when a device runs out of memory; the step is then taken again."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any
    parameters: Sequence[torch.Tensor]
    task: Task
    examples: Examples
    seed: int
    token_budget: int
    max_grad_norm: float | None
    rows: RowGradient | None = None
    graphed: GraphedGradients | None = None
    shards: Shards | None = None

    def __call__(self, step: int, rows: np.ndarray) -> StepResult:
        """Take step number `step` over the units `rows`."""
        loss = self.gradients(step, rows)
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.shards is not None:
            self.shards.bring_gradients()
        norm = gradient_norm(self.parameters, self.rows)
        if self.shards is not None:
            norm = self.shards.whole_norm(norm)
        value = float(norm)
        applied = bool(np.isfinite(value)) and bool(np.isfinite(loss))
        if applied:
            clipped_step(self.optimizer, norm, self.max_grad_norm)
        if scaler is not None:
            scaler.update()
        self.clear()
        return StepResult(loss, value, int(self.examples.lengths[rows].sum()), applied)

    def gradients(self, step: int, rows: np.ndarray) -> float:
        """The step's gradients, with a smaller token budget from the time on when memory ran out; its loss."""
        while True:
            try:
                return self._gradients(step, rows)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self.shards is not None:
                    raise TrainingError(
                        f"out of memory in step {step} at a token budget of {self.token_budget}. The other processes are in "
                        "the middle of the same step, for weights are shared out: set training.token_budget to less and "
                        "start again"
                    ) from error
                longest = int(self.examples.lengths[rows].max())
                if self.token_budget <= longest:
                    raise
                self.token_budget = max(longest, self.token_budget // 2)
                self.clear()
                if self.graphed is not None:
                    self.graphed.forget()
                torch.cuda.empty_cache()

    def rehearse(self, batch_size: int) -> None:
        """Forward and backward of the largest step there can be, forgotten again: what would run out of memory late
        in an epoch does so now. Changes neither weights nor any later random number."""
        rows = np.argsort(-self.examples.lengths, kind="stable")[:batch_size]
        self.gradients(0, np.sort(rows))
        self.clear()

    def clear(self) -> None:
        """Forget all gradients."""
        if self.rows is not None:
            self.rows.clear()
        if self.shards is not None:
            self.shards.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, step: int, rows: np.ndarray) -> float:
        """Forward and backward of this process's share; returns the step's loss over all processes."""
        from regraft.engine.training.graphed import average_over_processes

        accelerator = self.accelerator
        # Every process draws the whole step, so that all know its weight.
        examples, rows = self.task.draw(self.examples, rows, (self.seed, step))
        total = float(examples.unit_weights[rows].sum())
        parts = self.micro_batches(examples, rows)
        # Gradients are averaged over processes; the loss is divided by the whole step's weight.
        factor = accelerator.num_processes / total if total > 0 else 0.0
        lost = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for number, (part, counts) in enumerate(parts):
            last = number == len(parts) - 1
            seed = step_seed(self.seed, step, accelerator.process_index, number)
            torch.manual_seed(seed)
            sequences = examples.sequences(part)
            weights = torch.from_numpy(examples.weights[sequences] * (1.0 if counts else 0.0))
            targets = torch.from_numpy(self.task.targets_of(examples, sequences))
            batch = collate_examples(examples, sequences)
            if self.graphed is not None:
                lost += self.graphed(batch, targets, weights, factor=factor, seed=seed)
                continue
            weights, targets = weights.to(accelerator.device), targets.to(accelerator.device)
            synced = last or self.shards is not None  # whole gradients are what shards are there to spare
            sync: Any = nullcontext() if synced else accelerator.no_sync(self.model)
            with sync:
                batch = batch.to(accelerator.device)
                loss = self.task.batch_loss(self.model(batch), targets, weights, batch.lengths) * factor
                accelerator.backward(loss)
            lost += loss.detach()
        if self.graphed is not None:
            average_over_processes(self.graphed.gradients, accelerator.num_processes)
        if accelerator.num_processes > 1:
            lost = accelerator.reduce(lost, reduction="mean")
        return float(lost)

    def micro_batches(self, examples: Examples, rows: np.ndarray) -> list[tuple[np.ndarray, bool]]:
        """This process's share of a step's rows in micro-batches, each with whether it counts. One that does not is there
        for the others' sake, who wait: for its gradients, and for every layer where weights are shared out."""
        shares = share_by_tokens(examples.lengths[rows], self.accelerator.num_processes)
        number = self.accelerator.process_index
        cut = [self._cut(examples, rows[s]) if n == number or self.shards else [] for n, s in enumerate(shares)]
        spare = max(1, *(len(parts) for parts in cut)) - len(cut[number])
        return [(part, True) for part in cut[number]] + [(rows[:1], False)] * spare

    def _cut(self, examples: Examples, mine: np.ndarray) -> list[np.ndarray]:
        return [mine[p] for p in split_by_tokens(examples.lengths[mine].tolist(), self.token_budget)]


def out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left; the host's allocator says so in an error of no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def step_seed(seed: int, step: int, process: int, part: int) -> int:
    """Seed of the dropout of one micro-batch: nothing of the generator's state has to be kept for a resume."""
    return int(np.random.SeedSequence([seed, step, process, part]).generate_state(1, np.uint64)[0] >> np.uint64(1))
