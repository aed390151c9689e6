"""What a run will take, before it runs: parameters, memory by part, steps, tokens and time.

Weights, gradients, moments and averages are counted; activations are counted as what autograd keeps for the backward
pass of the largest micro-batch; what the process holds besides (libraries, rows, workspace) is measured while ten steps are taken.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from regraft.engine.config import RunConfig, parse_config
from regraft.engine.errors import ModelError, RegraftError
from regraft.engine.methods.settings import ADAPTERS, SECTIONS

PROBE_STEPS = 10
PLANNED = ("full", "bitfit", "lora", "qlora", "int8", "ia3", "adapter", "prompt", "prefix")
ALTERNATIVES = ("full", "bitfit", "lora", "qlora", "adapter")


@dataclass(frozen=True)
class Memory:
    """Bytes by part; `rest`: libraries, rows, kernels' workspace, measured."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    rest: int = 0

    @property
    def peak(self) -> int:
        # Activations are gone when the gradients are all there, but AdamW's first step makes its moments then.
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations + self.rest


@dataclass(frozen=True)
class MethodPlan:
    """One method: what is trained and what it takes. `note`: why it cannot be used, else ""."""

    method: str
    trained: int = 0
    total: int = 0
    memory: Memory = field(default_factory=lambda: Memory(0, 0, 0, 0, 0))
    note: str = ""


@dataclass(frozen=True)
class RunPlan:
    """The chosen method, the others, and the run's length. `seconds`: of all steps at the probe's speed."""

    chosen: MethodPlan
    others: tuple[MethodPlan, ...]
    steps: int
    tokens: int
    longest_step: int
    token_budget: int
    tokens_per_second: float
    seconds: float
    available: int
    device: str
    watts: float | None = None

    @property
    def fits(self) -> bool:
        return self.chosen.memory.peak <= self.available


def plan_run(config: RunConfig, *, alternatives: bool = True) -> RunPlan:
    """Prepare the run as `train` does, take ten steps in memory, and write nothing. Raises RegraftError."""
    from pathlib import Path

    from regraft.engine.training.recipes import recipe_of

    if config.method not in PLANNED:
        raise ModelError(
            f"method: {config.method}: it trains no encoder, so its memory is not planned; planned are {', '.join(PLANNED)}"
        )

    run = recipe_of(config)(config, Path(config.run), None, True)
    run.prepare()
    run.build()
    examples, batch_size = run.stepper.examples, config.training.batch_size
    largest = np.sort(np.argsort(-examples.lengths, kind="stable")[:batch_size])
    rate = _probe(run, largest)
    peak = _peak_bytes()
    chosen = _count(config.method, run.running.model, config, _activations(run, largest))
    counted = chosen.memory.peak
    rest = max(peak - counted, 0)
    chosen = _with_rest(chosen, rest + _read_back(config.method, run.running.model, run.vocabulary))
    others = tuple(
        _alternative(m, config, run, largest, rest) for m in ALTERNATIVES if alternatives and m != config.method
    )
    tokens = int(examples.lengths.sum() * run.plan.total_steps / run.plan.steps_per_epoch)
    return RunPlan(
        chosen,
        others,
        run.plan.total_steps,
        tokens,
        int(examples.lengths[largest].sum()),
        run.stepper.token_budget,
        rate,
        tokens / rate,
        _available(),
        run.accelerator.device.type,
        _watts(),
    )


def _probe(run: Any, largest: np.ndarray) -> float:
    """Ten steps, the largest first, and the largest evaluation batch; tokens a second of the steps after the first."""
    from regraft.engine.evaluation import evaluate

    run.stepper.rehearse(len(largest))
    tokens, seconds = 0, 0.0
    order = run.plan.order(0)
    for step in range(PROBE_STEPS):
        rows = run.plan.batch(step % run.plan.steps_per_epoch, order)
        began = time.perf_counter()
        tokens += run.stepper(step, rows).tokens
        seconds += time.perf_counter() - began
    # with its figures: what computes them is imported then, and stays
    evaluate(run.running, run.data.splits["dev"], run.data.task, accelerator=run.accelerator, most_batches=1)
    run.set_training_mode()
    return tokens / max(seconds, 1e-9)


def _alternative(method: str, config: RunConfig, run: Any, largest: np.ndarray, rest: int) -> MethodPlan:
    from regraft.engine.heads.live import model_of
    from regraft.engine.methods.adapt import adapt
    from regraft.engine.methods.speed import use_method_kernels
    from regraft.engine.models import RunningModel

    values = config.model_dump(mode="json") | {"method": method}
    for section, methods in SECTIONS.items():
        if method not in methods:
            values.pop(section, None)
    try:
        other = parse_config(values, source="plan")
        model = model_of(other, run.data.task)
        adapt(model, other, run.precision)
    except RegraftError as error:
        return MethodPlan(method, note=str(error))
    running = RunningModel(model, pad_token_id=run.data.tokenizer.pad_token_id, reads=run.data.task.reads)
    running.to(run.accelerator.device)
    if run.running.packed:
        running.run_packed()
    if other.model.kernels == "auto":
        running.use_kernels()
        use_method_kernels(running, other, run.precision)
    held, run.running, run.stepper.model = run.running, running, running
    try:
        used = run.vocabulary
        if used is not None:  # the rows were renumbered for the chosen method's smaller table
            running.model.get_input_embeddings().weight.data = used.module.weight.data
        running.train()
        activations = _activations(run, largest)
    finally:
        run.running, run.stepper.model = held, held
    counted = _count(method, model, other, activations)
    if used is not None and not model.get_input_embeddings().weight.requires_grad:
        whole = replace(counted.memory, weights=counted.memory.weights + used.left_out)  # it would not be cut then
        counted = replace(counted, memory=whole)
    return _with_rest(counted, rest + _read_back(method, model, used))


def _count(method: str, model: nn.Module, config: RunConfig, activations: int) -> MethodPlan:
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    gradients = sum(p.numel() * p.element_size() for p in trained)
    a_moment = 1 if config.training.optimizer != "adamw" else 4
    if config.training.offload_optimizer and torch.cuda.is_available():
        a_moment = 0  # they are in the memory of the host
    numbers = sum(p.numel() for p in trained)
    averages = gradients if config.training.ema else 0
    memory = Memory(weights, gradients, 2 * a_moment * numbers, averages, activations)
    return MethodPlan(method, numbers, sum(p.numel() for p in model.parameters()), memory)


def _read_back(method: str, model: nn.Module, used: Any) -> int:
    """Bytes of the whole model that a run reads from its folder when it ends, with all it holds still in memory; an
    adapter is small, and a GPU sees a tensor of it at a time."""
    if method in ADAPTERS or torch.cuda.is_available():
        return 0
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return whole if used is None else whole + used.left_out


def _with_rest(plan: MethodPlan, rest: int) -> MethodPlan:
    m = plan.memory
    memory = Memory(m.weights, m.gradients, m.optimizer, m.averages, m.activations, rest)
    return MethodPlan(plan.method, plan.trained, plan.total, memory, plan.note)


def _activations(run: Any, rows: np.ndarray) -> int:
    """Bytes that autograd keeps of the largest micro-batch of a step, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in [*run.running.parameters(), *run.running.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), storage.nbytes())
        return tensor

    from regraft.engine.batches import collate_examples
    from regraft.engine.packing import split_by_tokens

    stepper = run.stepper
    examples, rows = stepper.task.draw(stepper.examples, rows, (stepper.seed, 0))
    parts = list(split_by_tokens(examples.lengths[rows].tolist(), stepper.token_budget))
    part = rows[max(parts, key=lambda p: int(examples.lengths[rows[p]].sum()))]
    batch = collate_examples(examples, examples.sequences(part)).to(run.accelerator.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = run.running(batch)
    del output
    return sum(kept.values())


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _available() -> int:
    import psutil

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def _watts() -> float | None:
    """Power limit of the GPU; None where nothing tells."""
    if not torch.cuda.is_available():
        return None
    try:
        return float(torch.cuda.power_draw()) / 1000.0
    except Exception:  # whatever a driver's library raises: energy is a courtesy
        return None
