"""The training recipe, top to bottom: prepare, resume, step, evaluate, save, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from regraft.engine.config import RunConfig, config_hash
from regraft.engine.errors import MemoryShortError, NotFiniteError, RegraftError, TrainingError
from regraft.engine.figures import figure
from regraft.engine.files import remove_leftovers, write_text
from regraft.engine.heap import FreedMemory
from regraft.engine.machine import seconds_since_process_start, start_without_collector, thaw
from regraft.engine.progress import ProgressBar
from regraft.engine.training.folder import RunResult, clear_run_folder, fingerprints, open_run_folder, telling_full_disk
from regraft.engine.training.launch import check_processes
from regraft.engine.training.saving import best_model_whole, checkpoint_is_due, write_checkpoint
from regraft.engine.training.together import agreed, has_lost_others, meet, processes, together, who_is_missing

LOG_EVERY = 10


@dataclass(frozen=True)
class StepInfo:
    """One optimizer step, for a caller's `on_step`. `tokens`: real tokens; `seconds`: of this step alone."""

    step: int
    tokens: int
    seconds: float
    loss: float


def train(
    config: RunConfig,
    *,
    restart: bool = False,
    on_step: Callable[[StepInfo], None] | None = None,
    quiet: bool = False,
) -> RunResult:
    """Run a configuration to its end, from its last checkpoint if it was stopped before.

    Raises RegraftError; the run folder then holds the last checkpoint and the best model so far.
    """
    folder = Path(config.run)
    check_processes(config, processes())
    finished = open_run_folder(folder, config, restart)
    if finished is not None:
        return finished
    from regraft.engine.training.recipes import recipe_of

    run = recipe_of(config)(config, folder, on_step, quiet)
    run.restart = restart
    try:
        with telling_full_disk(folder):
            return run.go()
    except RegraftError:
        raise
    except Exception as error:
        from regraft.engine.training.step import out_of_memory

        if out_of_memory(error):
            raise run.without_memory(error) from error
        if processes() == 1 or not has_lost_others(error):
            raise
        raise who_is_missing(error, config.training.timeout) from error
    finally:
        thaw()


class _Run:
    """One run's parts. `go` is the recipe."""

    restart = False
    # What `build` sets where a method uses it.
    vocabulary: Any = None
    unfreezing: Any = None
    shards: Any = None
    stepper: Any = None
    state: Any = None

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        on_step: Callable[[StepInfo], None] | None,
        quiet: bool,
    ) -> None:
        self.config, self.folder, self.on_step, self.quiet = config, folder, on_step, quiet
        self.freed = FreedMemory()

    def go(self) -> RunResult:
        with start_without_collector():
            meet(self.config.training.timeout)
            self.prepare()
            self.build()
        self.resume()
        self.rehearse_if_tight()
        with ProgressBar("training", self.plan.total_steps, done=self.state.step, shown=self.speaks) as bar:
            self.bar = bar
            while self.state.step < self.plan.total_steps and not self.state.stopped_early:
                self.take_step()
                if self.evaluation_due():
                    self.evaluate()  # ends in a checkpoint
                else:
                    if checkpoint_is_due(self):
                        write_checkpoint(self)
            if self.state.evaluated_at != self.state.step:
                self.evaluate()
        return self.finish()

    def forget_moments(self) -> None:
        """Make room on a CPU for the best weights, which are read beside the last ones: no step follows."""
        if self.stepper is not None:
            self.stepper.leave()
        if self.accelerator.device.type == "cpu" and self.shards is None:
            getattr(self.optimizer, "state", {}).clear()  # a small head's own optimizer has none
            self.freed.give_back()

    def rehearse_if_tight(self) -> None:
        """Take the largest step first where memory could run out: in the first minute rather than late in an epoch."""
        from regraft.engine.training.setup import could_run_out
        from regraft.engine.training.sharding import stage_of

        if self.state.step == self.plan.total_steps or (self.state.step and stage_of(self.config)):
            return  # DeepSpeed had a rehearsal when it took its moments back, and another would make it forget them
        rows = self.config.training.batch_size
        longest = np.sort(self.data.splits["train"].lengths)[-rows:]
        at_once = min(int(longest.sum()), max(self.stepper.token_budget, int(longest[-1])))
        # Each process sees memory of its own, and all of them have to take the step.
        if agreed(could_run_out(at_once, self.running.model, self.precision), "largest"):
            self.stepper.rehearse(self.plan.largest_steps(self.data.splits["train"].lengths))

    def without_memory(self, error: Exception) -> MemoryShortError:
        """Memory ran out where a smaller micro-batch is no help: while loading, in an update, in an evaluation."""
        from regraft.engine.training.step import LESS_MEMORY

        when = f"in step {self.state.step}" if self.state is not None else "before the first step"
        told = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        return MemoryShortError(f"out of memory {when} ({told}). Set {LESS_MEMORY}")

    def prepare(self) -> None:
        from regraft.engine.training.setup import choose_precision, prepare, set_threads

        threads = set_threads(self.config)
        self.precision = choose_precision(self.config)
        self.speaks = not self.quiet and int(os.environ.get("RANK", "0")) == 0
        self.data = prepare(self.config, self.say)
        self.threads = threads

    def say(self, line: str) -> None:
        if self.speaks:
            ProgressBar("", 0).say(line)

    def build(self) -> None:
        import torch
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        from regraft.engine.heads.live import model_of
        from regraft.engine.methods.adapt import adapt
        from regraft.engine.methods.speed import use_method_kernels
        from regraft.engine.models import RunningModel
        from regraft.engine.output_scale import scale_output
        from regraft.engine.training.offload import offloaded
        from regraft.engine.training.optimizer import AveragedWeights, build_optimizer
        from regraft.engine.training.setup import choose_token_budget
        from regraft.engine.training.sharding import (
            accelerate_options,
            attach_to_shards,
            is_shared_out,
            share_out,
            stage_of,
        )
        from regraft.engine.training.ways import set_way

        config, training = self.config, self.config.training
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(self.precision, self.precision),
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(
                project_dir=str(self.folder), logging_dir=str(self.folder / "trackers")
            ),
            step_scheduler_with_optimizer=False,
            **accelerate_options(config),
        )
        torch.manual_seed(training.seed)  # a fresh head is drawn here
        task = self.data.task
        shared_out = is_shared_out(config)
        if training.sharding != "none" and not shared_out:
            self.say("training.sharding: there is one process, which holds everything")
        with together("loading the model"):
            model = model_of(config, task, self.data.new_words)
            attach_to_shards(model, task) if shared_out else task.attach(model)
        everything = sum(p.numel() for p in model.parameters())
        self.adaptation = adapt(model, config, self.precision)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.running = RunningModel(model, pad_token_id=self.data.tokenizer.pad_token_id, reads=task.reads)
        if task.scale is not None:
            self.running.output_scale = scale_output(model, *task.scale)
        self.running.to(self.accelerator.device)
        if config.model.packing == "auto":
            self.running.run_packed()
            if not self.running.packed:
                self.say(f"padded: {self.running.reason}")
        if config.model.kernels == "auto" and stage_of(config) < 3:  # it follows modules, which the kernels pass by
            self.running.use_kernels()
            use_method_kernels(self.running, config, self.precision)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.vocabulary = self.use_rows_in_use(model)
        self.set_training_mode()
        train_split = self.data.splits["train"]
        self.plan = self.make_plan()
        optimizer = build_optimizer(model, training, plus_ratio=config.lora.plus_ratio)
        if self.vocabulary:
            self.vocabulary.decay_with(optimizer)
        prepared: Any
        if shared_out:
            self.shards = share_out(self.running, optimizer, self.accelerator, config)
            prepared, optimizer, self.parameters = self.shards.model, self.shards.optimizer, self.shards.parameters
        else:
            prepared = self.wrapped()
            self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = offloaded(optimizer, training, self.accelerator.device, self.say)
        self.averaged = AveragedWeights(self.parameters, training.ema) if training.ema else None
        self.unfreezing = self.gradual_unfreezing(model)
        self.stepper = self.make_stepper(
            accelerator=self.accelerator,
            model=prepared,
            optimizer=self.optimizer,
            parameters=self.parameters,
            task=task,
            examples=train_split,
            seed=training.seed,
            token_budget=int(agreed(choose_token_budget(config, model, self.precision), "smallest")),
            max_grad_norm=training.max_grad_norm,
            rows=self.bind_row_gradient(model),
            shards=self.shards,
            share_update=self.accelerator.num_processes > 1 and self.averaged is None,
        )
        set_way(self)
        how = "packed" if self.running.packed else "padded"
        how += f", weights shared out among {processes()} processes" if shared_out else ""
        self.say(
            f"{config.model.name}: {trained:,} of {everything:,} parameters trained, {how}, {self.precision}, "
            f"{self.threads} threads, {self.plan.total_steps:,} steps of {training.batch_size}"
        )

    def wrapped(self) -> Any:
        """The model as its processes share it."""
        if self.accelerator.num_processes == 1 or self.accelerator.device.type != "cuda":
            return self.accelerator.prepare_model(self.running)
        import torch

        from regraft.kernels.capture import on_stream

        # DDP keeps a node for every parameter, bound to the stream it was made on; the default one cannot be captured.
        with on_stream(torch.cuda.Stream()):
            return self.accelerator.prepare_model(self.running)

    def make_plan(self) -> Any:
        from regraft.engine.training.order import Plan

        training, rows = self.config.training, len(self.data.splits["train"])
        return Plan(rows, training.batch_size, training.seed, training.epochs, training.max_steps)

    def make_stepper(self, **parts: Any) -> Any:
        from regraft.engine.training.sharding import stage_of
        from regraft.engine.training.step import Stepper

        if stage_of(self.config):
            from regraft.engine.training.zero import ZeroStepper

            return ZeroStepper(**parts)
        return Stepper(**parts)

    def gradual_unfreezing(self, model: Any) -> Any:
        from regraft.engine.methods.unfreeze import GradualUnfreezing

        wanted = self.config.unfreeze
        if not wanted.gradual:
            return None
        if self.accelerator.num_processes > 1:
            raise TrainingError(
                "unfreeze.gradual: what is trained changes on the way, which several processes cannot do"
            )
        return GradualUnfreezing(model, self.plan.steps_per_epoch if wanted.every == "epoch" else wanted.every)

    def use_rows_in_use(self, model: Any) -> Any:
        """Cut the word embedding down to the rows that the run's texts name; None where that gains nothing."""

        from regraft.engine.vocabulary import cut_to_rows_in_use

        used, splits = cut_to_rows_in_use(model, self.running, self.data.splits, self.config)
        self.data = replace(self.data, splits=splits)
        return used

    def bind_row_gradient(self, model: Any) -> Any:
        from regraft.engine.fast import bind_embedding

        on_cpu = self.shards is None and self.accelerator.device.type == "cpu"
        usable = on_cpu and self.config.model.kernels == "auto" and not self.config.unfreeze.gradual
        return bind_embedding(model) if usable else None

    def set_training_mode(self) -> None:
        self.running.train()

    def resume(self) -> None:
        from regraft.engine.training.checkpoint import Progress, latest_checkpoint, load_checkpoint
        from regraft.engine.training.history import History

        self.checkpoints = self.folder / "checkpoints"
        main = self.accelerator.is_main_process
        if main:
            if self.restart:  # only now: what could go wrong with data and model has not
                clear_run_folder(self.folder)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        self.accelerator.wait_for_everyone()
        latest = latest_checkpoint(self.checkpoints)
        self.state = Progress()
        if latest is not None:
            self.state = load_checkpoint(
                latest, self.running.model, self.optimizer, self.accelerator.scaler, self.averaged, shards=self.shards
            )
            if self.vocabulary:
                self.vocabulary.decayed, self.vocabulary.averaged = self.state.extra.get("vocabulary", (1.0, 1.0))
            asked, used = self.state.extra.get("token_budget", (None, None))
            if self.stepper is not None and asked == self.config.training.token_budget:
                self.stepper.token_budget = used  # not what is free today: micro-batches stay what they were
            self.say(f"going on from step {self.state.step} ({latest})")
        self.history = None
        if main:
            self.write_settings()
            if self.config.trackers:
                self.accelerator.init_trackers("regraft")
            self.history = History(
                self.folder / "metrics.jsonl", keep_bytes=self.state.history_bytes, accelerator=self.accelerator
            )
        self.order_of = -1
        self.order = np.empty(0, dtype=np.int64)
        self.session_started = self.last_saved = time.perf_counter()
        self.seconds_before = self.state.seconds
        self.window = [StepInfo(*values) for values in self.state.extra.get("window", [])]

    def write_settings(self) -> None:
        from regraft.engine.training.folder import versions_of

        config = self.config.model_dump(mode="json")
        write_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        write_text(self.folder / "versions.json", json.dumps(versions_of(self.config), indent=2) + "\n")
        mark: dict[str, Any] = {"config_hash": config_hash(self.config), "config": config, "finished": False}
        mark["data"] = fingerprints(self.config)
        write_text(self.folder / "run.json", json.dumps(mark, indent=2) + "\n")

    def take_step(self) -> None:
        from regraft.engine.training.optimizer import set_learning_rate
        from regraft.engine.training.schedule import learning_rate_share

        state, training = self.state, self.config.training
        began = time.perf_counter()
        step = state.step
        epoch = self.plan.epoch_of(step)
        if epoch != self.order_of:
            self.order, self.order_of = self.new_order(epoch), epoch
        rows = self.plan.batch(step, self.order)
        set_learning_rate(self.optimizer, learning_rate_share(training, step, self.plan.total_steps))
        if self.unfreezing:
            self.unfreezing.at(step)
        known = step + 1 < self.plan.total_steps and self.plan.epoch_of(step + 1) == epoch
        result = self.stepper(step, rows, self.plan.batch(step + 1, self.order) if known else None)
        self.freed.after_step()
        if result.applied:
            state.bad_in_a_row = 0
            if self.averaged:
                self.averaged.update()
            if self.vocabulary:
                self.vocabulary.stepped(self.optimizer)
        else:
            state.skipped += 1
            state.bad_in_a_row += 1
            self.bad_step(step, rows, result.loss)
        state.step += 1
        state.tokens += result.tokens
        ended = time.perf_counter()
        state.seconds = self.seconds_before + ended - self.session_started
        info = StepInfo(step, result.tokens, ended - began, result.loss)
        self.log_step(info, result.grad_norm)
        if self.on_step:
            self.on_step(info)

    def new_order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in the order in which they are learned from."""
        return self.plan.order(epoch)

    def bad_step(self, step: int, rows: np.ndarray, loss: float) -> None:
        split = self.data.splits["train"]
        numbers = rows if split.row_of is None else split.row_of[split.sequences(rows)]
        places = ", ".join(split.rows.where(int(r)) for r in dict.fromkeys(numbers[:4]))
        places += " ..." if len(rows) > 4 else ""
        if self.history:
            self.history.add({"kind": "skipped", "step": step, "loss": repr(loss), "rows": [int(r) for r in rows]})
        self.bar.say(f"step {step}: loss {loss} or its gradient is not finite; step skipped (rows {places})")
        times = self.state.bad_in_a_row
        if times >= self.config.training.max_bad_steps:
            self.state.bad_in_a_row = 0  # started again, it tries as often again
            write_checkpoint(self)
            raise TrainingError(
                f"step {step}: loss or gradient not finite {times} times in a row, last with the rows "
                f"{places}. The weights of the last good step are in {self.checkpoints}; a lower "
                "training.learning_rate or precision: fp32 is the usual cure"
            )

    def log_step(self, info: StepInfo, norm: float) -> None:
        self.window.append(info)
        if info.step == 0 and self.history:
            self.history.add({"kind": "start", "seconds_to_first_step": round(seconds_since_process_start(), 3)})
        rate = sum(i.tokens for i in self.window) / max(1e-9, sum(i.seconds for i in self.window))
        self.bar.advance(1, loss=figure(info.loss), tokens_per_second=f"{rate:,.0f}")
        if (info.step + 1) % LOG_EVERY and self.state.step != self.plan.total_steps:
            return
        if self.history:
            self.history.add(
                {
                    "kind": "train",
                    "step": self.state.step,
                    "epoch": round(self.state.step / self.plan.steps_per_epoch, 4),
                    "loss": float(np.mean([i.loss for i in self.window])),
                    "learning_rate": max(g["lr"] for g in self.optimizer.param_groups),
                    "grad_norm": norm,
                    "tokens_per_second": round(rate, 1),
                    "seconds": round(self.state.seconds, 3),
                }
            )
        self.window.clear()

    def evaluation_due(self) -> bool:
        every = self.config.training.evaluate_every
        period = self.plan.steps_per_epoch if every == "epoch" else int(every)
        return self.state.step % period == 0 or self.state.step == self.plan.total_steps

    def evaluate(self) -> None:
        from regraft.engine.evaluation import in_short

        state, task, dev = self.state, self.data.task, self.data.splits["dev"]
        self.freed.give_back()
        if self.averaged:
            self.averaged.swap()
        try:
            found = self.figures(dev)
            value = found.metrics[task.metric]
            improved = self.improves(value)
            if improved:
                state.best_value, state.best_step, state.evaluations_without_gain = value, state.step, 0
                with best_model_whole(self):
                    self.save_best()
            else:
                state.evaluations_without_gain += 1
        finally:
            if self.averaged:
                self.averaged.swap()
            self.set_training_mode()
        state.evaluated_at = state.step
        stopping = self.config.training.early_stopping
        state.stopped_early = stopping is not None and state.evaluations_without_gain >= stopping.patience
        if self.history:
            epoch = round(state.step / self.plan.steps_per_epoch, 4)
            self.history.add(
                {"kind": "eval", "split": "dev", "step": state.step, "epoch": epoch, "metrics": found.metrics}
                | {"seconds": round(found.seconds, 3), "best": improved}
            )
        figures = "  ".join(f"{name} {figure(value)}" for name, value in in_short(found.metrics, task).items())
        self.bar.say(f"step {state.step}  dev {figures}{'  (best so far)' if improved else ''}")
        write_checkpoint(self)

    def figures(self, examples: Any) -> Any:
        """The model's figures on a split. Raises TrainingError where there are none: its outputs are not finite."""
        from regraft.engine.evaluation import evaluate

        try:
            return evaluate(self.running, examples, self.data.task, accelerator=self.accelerator)
        except NotFiniteError as error:
            kept = f"best/ holds that of step {self.state.best_step}" if self.state.best_step >= 0 else "none was saved"
            raise TrainingError(
                f"step {self.state.step}: {error}. Training went astray before, and this model is not kept ({kept}): a "
                "lower training.learning_rate, training.max_grad_norm or precision: fp32 is the usual cure"
            ) from None

    def improves(self, value: float) -> bool:
        best = self.state.best_value
        if best is None or not np.isfinite(best):
            return True
        stopping = self.config.training.early_stopping
        margin = stopping.min_delta if stopping else 0.0
        return value > best + margin if self.data.task.greater_is_better else value < best - margin

    def save_best(self) -> None:
        from regraft.engine.trained import save_trained

        if self.accelerator.is_main_process:
            save_trained(self.folder / "best", self.running, self.config, self.data, self.adaptation)

    def load_best(self) -> None:
        """Put the best model so far into memory, and see that `best/` holds it."""
        from regraft.engine.training.finish import load_best

        load_best(self)

    def findings(self) -> dict[str, Any]:
        """What a method learned besides its weights, for the report."""
        told = getattr(self.running.model, "findings", None)
        return told() if told else {}

    def finish(self) -> RunResult:
        from regraft.engine.training.finish import finish_run

        self.accelerator.wait_for_everyone()
        metrics = finish_run(self)
        if self.history:
            self.history.close()
        if self.config.trackers:
            self.accelerator.end_training()
        result = RunResult(self.folder, self.state.best_step, metrics, self.state.seconds, self.state.step)
        if self.accelerator.is_main_process:
            mark = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            mark |= {
                "finished": True,
                "result": {
                    "best_step": result.best_step,
                    "metrics": metrics,
                    "seconds": result.seconds,
                    "steps": result.steps,
                    "skipped": self.state.skipped,
                    "tokens": self.state.tokens,
                },
            }
            write_text(self.folder / "run.json", json.dumps(mark, indent=2) + "\n")
        return result


__all__ = ["RunResult", "StepInfo", "train"]
