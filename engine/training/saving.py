"""What a run writes on its way: checkpoints and the best model. One process writes, all take part, and all learn if it failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from regraft.engine.training.folder import telling_full_disk
from regraft.engine.training.together import agreed, processes, together

if TYPE_CHECKING:
    from regraft.engine.training.run import _Run

CHECKPOINT_SECONDS = 60.0
ASK_EVERY = 10  # steps between the questions whether it is time, where several processes have clocks of their own


def checkpoint_is_due(run: _Run) -> bool:
    """Whether to write a checkpoint after this step: the same answer in every process."""
    every = run.config.training.checkpoint_every
    if every is not None:
        return run.state.step % every == 0
    late = time.perf_counter() - run.last_saved > CHECKPOINT_SECONDS
    if processes() == 1:
        return late
    return run.state.step % ASK_EVERY == 0 and agreed(float(late), "largest") > 0


def write_checkpoint(run: _Run) -> None:
    """Write where the run stands."""
    from regraft.engine.training.checkpoint import content_of, save_checkpoint

    main, used = run.accelerator.is_main_process, run.vocabulary
    if run.history:
        run.state.history_bytes = run.history.bytes
    run.state.extra = {"vocabulary": [used.decayed, used.averaged]} if used else {}
    # The budget decides the micro-batches, and so which random numbers their dropout draws.
    if run.stepper is not None:
        run.state.extra |= {"token_budget": [run.config.training.token_budget, run.stepper.token_budget]}
    run.state.extra |= {"window": [[i.step, i.tokens, i.seconds, i.loss] for i in run.window]}
    model, scaler, content = run.running.model, run.accelerator.scaler, None
    if main or run.shards is not None:
        content = content_of(model, run.optimizer, scaler, run.averaged, run.shards, held=main)
    with together("writing a checkpoint"), telling_full_disk(run.folder):
        if main and content is not None:
            save_checkpoint(run.checkpoints, run.state, *content)
    run.last_saved = time.perf_counter()


@contextmanager
def best_model_whole(run: _Run) -> Iterator[None]:
    """Within the block the one process that writes has the whole model, as it is to be saved."""
    main = run.accelerator.is_main_process
    with (
        run.shards.whole(held=main) if run.shards is not None else nullcontext(),
        together("saving the best model"),
        telling_full_disk(run.folder),
        run.vocabulary.whole() if run.vocabulary and main else nullcontext(),
    ):
        yield
