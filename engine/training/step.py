"""One optimizer step: the loss is a sum over all its sequences, divided once by their total weight.

So the same step is taken in one micro-batch or eight, on one process or two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from regraft.engine.batches import collate_examples
from regraft.engine.errors import MemoryShortError
from regraft.engine.packing import split_by_tokens
from regraft.engine.tasks import Task
from regraft.engine.training.average import Average
from regraft.engine.training.optimizer import clipped_step, gradient_norm, room_for_moments
from regraft.engine.training.order import share_by_tokens
from regraft.engine.training.shared_update import SharedUpdate

if TYPE_CHECKING:
    from accelerate import Accelerator

    from regraft.engine.examples import Examples
    from regraft.engine.packing import PackedBatch
    from regraft.engine.training.captured_optimizer import CapturedOptimizer
    from regraft.engine.training.graphed import GraphedGradients
    from regraft.kernels.embedding import RowGradient

# What makes weights, gradients and moments smaller.
LESS_MEMORY = (
    "training.optimizer: adamw8bit, training.offload_optimizer: true (on a GPU), method: lora or qlora; `regraft plan` tells "
    "what each takes"
)


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the step's weight; `applied`: False when it was not finite and the weights were left alone."""

    loss: float
    grad_norm: float
    tokens: int
    applied: bool


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward, on the host. `seed`: of its dropout."""

    batch: PackedBatch
    targets: torch.Tensor
    weights: torch.Tensor
    seed: int


@dataclass
class Stepper:
    """What a step needs. `token_budget` halves when a device runs out of memory; the step is then taken again.

    `graphed` and `update`: gradients and update as CUDA graphs, where they can be captured. The next step's batches are
    then made while the device works on this one's.
    """

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
    update: CapturedOptimizer | None = None
    shards: Any = None
    share_update: bool = False
    _ahead: tuple[tuple[int, int], list[MicroBatch], float] | None = None
    _average: Average | None = None
    _shared: SharedUpdate | None = None

    def __call__(self, step: int, rows: np.ndarray, following: np.ndarray | None = None) -> StepResult:
        """Take step number `step` over the units `rows`. `following`: those of the next step, where they are known."""
        tokens = int(self.examples.lengths[rows].sum())
        if self._shared is not None:
            return self._apply_shared(self._shared, self._with_retries(step, rows), tokens)
        lost = self.gradients(step, rows)
        if self.update is not None and self.graphed is not None:
            self.update(lost)
            if following is not None:
                parts, factor = self.micro_batches(step + 1, following)
                self._ahead = ((step + 1, self.token_budget), list(parts), factor)
            loss, norm = self.update.report()
            return StepResult(loss, norm, tokens, _is_finite(loss, norm))
        result = self._apply(float(lost), tokens)
        if self.share_update and self._average is not None and result.applied:
            self.share_update = False  # asked once: it has moments now, and could be shared out or cannot
            self._shared = SharedUpdate.of_all(self.optimizer, self._average.shared)
        return result

    def _apply_shared(self, shared: SharedUpdate, lost: torch.Tensor, tokens: int) -> StepResult:
        loss, norm = shared.sum(lost, self.rows)
        applied = _is_finite(loss, norm)
        if applied:
            shared.step(norm, self.max_grad_norm)
        self.clear()
        return StepResult(loss, norm, tokens, applied)

    def leave(self) -> None:
        """No step follows: every process has weights of its own again."""
        if self._shared is not None:
            self._shared.leave()
            self._shared = None

    def _apply(self, loss: float, tokens: int) -> StepResult:
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.shards is not None:
            self.shards.bring_gradients()
        norm = gradient_norm(self.parameters, self.rows)
        if self.shards is not None:
            norm = self.shards.whole_norm(norm)
        value = float(norm)
        applied = _is_finite(loss, value)
        if applied:
            clipped_step(self.optimizer, norm, self.max_grad_norm)
        if scaler is not None:
            scaler.update()
        self.clear()
        return StepResult(loss, value, tokens, applied)

    def gradients(self, step: int, rows: np.ndarray) -> torch.Tensor:
        """The step's gradients, with a smaller token budget from the time on when memory ran out; its loss []."""
        lost = self._with_retries(step, rows)
        if self.shards is not None:
            return self.accelerator.reduce(lost, reduction="mean")
        if self._average is None:
            self._average = Average(self.accelerator.num_processes, self.accelerator.device)
        self._average([*(p.grad for p in self.parameters if p.grad is not None), lost])
        if self.rows is not None and self._average.processes > 1:
            self.rows.written()
        return lost

    def _with_retries(self, step: int, rows: np.ndarray) -> torch.Tensor:
        """This process's own gradients, and its part of the step's loss []."""
        while True:
            try:
                return self._gradients(step, rows)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._take_less(step, rows, error)
            # Out here nothing holds on to the failed pass any more.
            self.clear()
            if self.graphed is not None:
                self.graphed.forget()
            torch.cuda.empty_cache()

    def _take_less(self, step: int, rows: np.ndarray, error: Exception) -> None:
        """Halve the token budget. Raises MemoryShortError where that is of no use."""
        if self.shards is not None:
            raise MemoryShortError(
                f"out of memory in step {step} at a token budget of {self.token_budget}. The other processes are in "
                "the middle of the same step, for weights are shared out: set training.token_budget to less and "
                "start again"
            ) from error
        longest = int(self.examples.lengths[rows].max())
        if self.token_budget <= longest:
            raise MemoryShortError(
                f"out of memory in step {step} with one sequence at a time, the longest of {longest} tokens. Set "
                f"training.gradient_checkpointing: true, a smaller model.max_length, or {LESS_MEMORY}"
            ) from error
        self.token_budget = max(longest, self.token_budget // 2)

    def rehearse(self, steps: Sequence[np.ndarray]) -> None:
        """Forward and backward of these steps, the largest of the run, forgotten again: what would run out of memory late
        in an epoch does so now. Changes neither weights nor any later random number. `steps`: rows of each.

        Raises MemoryShortError where not even one sequence at a time fits beside the optimizer's moments."""
        try:
            room = room_for_moments(self.optimizer)  # they are made in the first update, and stay
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise MemoryShortError(f"out of memory for the optimizer's moments. Set {LESS_MEMORY}") from error
        for rows in steps:
            self.gradients(0, rows)
            self.clear()
        del room

    def clear(self) -> None:
        """Forget all gradients."""
        if self.rows is not None:
            self.rows.clear()
        if self.shards is not None:
            self.shards.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def micro_batches(self, step: int, rows: np.ndarray) -> tuple[Iterator[MicroBatch], float]:
        """This process's share of a step, and the factor of its losses: gradients are averaged over processes, the loss
        is divided by the whole step's weight. Depends on the step's number and the token budget alone."""
        accelerator = self.accelerator
        # Every process draws the whole step, so that all know its weight.
        examples, rows = self.task.draw(self.examples, rows, (self.seed, step))
        total = float(examples.unit_weights[rows].sum())
        parts = self._parts(examples, rows)

        def made() -> Iterator[MicroBatch]:
            for number, (part, counts) in enumerate(parts):
                sequences = examples.sequences(part)
                yield MicroBatch(
                    collate_examples(examples, sequences),
                    torch.from_numpy(self.task.targets_of(examples, sequences)),
                    torch.from_numpy(examples.weights[sequences] * (1.0 if counts else 0.0)),
                    step_seed(self.seed, step, accelerator.process_index, number),
                )

        return made(), accelerator.num_processes / total if total > 0 else 0.0

    def _gradients(self, step: int, rows: np.ndarray) -> torch.Tensor:
        """Forward and backward of this process's share; its part of the step's loss []. It waits for no other process, unless
        weights are shared out: memory may run out here, and it is done again."""
        accelerator, model = self.accelerator, without_ddp(self.model)
        ahead, self._ahead = self._ahead, None
        parts: Iterator[MicroBatch]
        if ahead is not None and ahead[0] == (step, self.token_budget):
            parts, factor = iter(ahead[1]), ahead[2]
        else:
            parts, factor = self.micro_batches(step, rows)
        lost = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        part = next(parts, None)
        while part is not None:
            seed_dropout(part.seed, accelerator.device)
            following = next(parts, None)
            if self.graphed is not None:
                lost += self.graphed(part.batch, part.targets, part.weights, factor=factor, seed=part.seed)
            else:
                weights, targets = part.weights.to(accelerator.device), part.targets.to(accelerator.device)
                batch = part.batch.to(accelerator.device)
                loss = self.task.batch_loss(model(batch), targets, weights, batch.lengths) * factor
                self.backward(loss, following is None)
                lost += loss.detach()
            part = following
        return lost

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Backward pass of one micro-batch; `last`: of the step."""
        self.accelerator.backward(loss)

    def _parts(self, examples: Examples, rows: np.ndarray) -> list[tuple[np.ndarray, bool]]:
        """This process's share of a step's rows in micro-batches, each with whether it counts. One that does not is there
        for the others' sake, who wait: for its gradients, and for every layer where weights are shared out."""
        shares = share_by_tokens(examples.lengths[rows], self.accelerator.num_processes)
        number = self.accelerator.process_index
        cut = [self._cut(examples, rows[s]) if n == number or self.shards else [] for n, s in enumerate(shares)]
        spare = max(1, *(len(parts) for parts in cut)) - len(cut[number])
        return [(part, True) for part in cut[number]] + [(rows[:1], False)] * spare

    def _cut(self, examples: Examples, mine: np.ndarray) -> list[np.ndarray]:
        lengths = examples.lengths[mine]
        if len(mine) and lengths.sum() <= self.token_budget:
            return [mine]
        return [mine[p] for p in split_by_tokens(lengths.tolist(), self.token_budget)]


def _is_finite(loss: float, norm: float) -> bool:
    """Whether a step may be applied."""
    return bool(np.isfinite(norm)) and bool(np.isfinite(loss))


def without_ddp(model: Any) -> Any:
    """The model itself: DistributedDataParallel sends what it has in the middle of a backward pass, and its buffers in a
    forward, after which no process could begin its step again."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left; the host's allocator says so in an error of no type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def step_seed(seed: int, step: int, process: int, part: int) -> int:
    """Seed of the dropout of one micro-batch: nothing of the generator's state has to be kept for a resume."""
    return int(np.random.SeedSequence([seed, step, process, part]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators that a forward pass on `device` draws from.

    torch.manual_seed does so for every kind of device there could be, and for each that is not in use it prints the stack, to
    be told should the call fail later: a quarter of a millisecond, of the one and a half that a step on stored features takes.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
