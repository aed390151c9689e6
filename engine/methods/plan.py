"""What a run will take, before it runs: parameters, memory by part, steps, tokens and time.

Weights, gradients, moments and averages are counted; activations are counted as what autograd keeps for the backward
pass of the largest micro-batch; what the process holds besides (libraries, rows, workspace) is measured while ten steps are taken.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from regraft.engine.config import RunConfig, parse_config
from regraft.engine.errors import MemoryShortError, ModelError, RegraftError
from regraft.engine.heap import EVERY, resident
from regraft.engine.memory import host_memory
from regraft.engine.methods.plan_processes import of_one_process
from regraft.engine.methods.settings import ADAPTERS, SECTIONS
from regraft.engine.vocabulary import may_be_cut

Steps = Sequence[np.ndarray]  # the rows of each

PROBE_STEPS = 10
PLANNED = ("full", "bitfit", "lora", "qlora", "int8", "ia3", "adapter", "prompt", "prefix")


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
    def kept(self) -> int:
        """What stays between steps."""
        return self.weights + self.optimizer + self.averages

    @property
    def peak(self) -> int:
        # Activations are gone when the gradients are all there, but AdamW's first step makes its moments then.
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations + self.rest


@dataclass(frozen=True)
class Rest:
    """Bytes that the probe held besides what is counted: in its steps, and in its evaluation after them."""

    steps: int
    evaluation: int


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
    """The chosen method, the others, and the run's length; memory is that of one of `processes`.

    `tokens_per_second`, of one process, and `seconds`, of all steps at that speed: None where no step was taken, for what is
    counted (activations are then an estimate) does not fit.
    """

    chosen: MethodPlan
    others: tuple[MethodPlan, ...]
    steps: int
    tokens: int
    longest_step: int
    token_budget: int
    tokens_per_second: float | None
    seconds: float | None
    available: int
    device: str
    watts: float | None = None
    processes: int = 1
    sharding: str = "none"

    @property
    def fits(self) -> bool:
        return self.seconds is not None and self.chosen.memory.peak <= self.available


def plan_run(config: RunConfig, *, alternatives: bool = True, processes: int = 1) -> RunPlan:
    """Prepare the run as `train` does, take ten steps in memory, and write nothing. Raises RegraftError.

    `processes`: of one machine, for which it is planned; the probe itself runs in this one.
    """
    from pathlib import Path

    from regraft.engine.training.launch import check_processes
    from regraft.engine.training.order import share_by_tokens
    from regraft.engine.training.recipes import recipe_of
    from regraft.engine.training.step import out_of_memory

    if config.method not in PLANNED:
        raise ModelError(
            f"method: {config.method}: it trains no encoder, so its memory is not planned; planned are {', '.join(PLANNED)}"
        )
    check_processes(config, processes)
    run = recipe_of(config)(config, Path(config.run), None, True)
    run.prepare()
    try:
        run.build()
    except Exception as error:
        if not out_of_memory(error):
            raise
        if getattr(run, "running", None) is None:
            raise run.without_memory(error) from error
    examples = run.data.splits["train"]
    plan = run.make_plan()
    steps = plan.largest_steps(examples.lengths)
    tokens = int(examples.lengths.sum() * plan.total_steps / plan.steps_per_epoch)
    on_gpu = torch.cuda.is_available()
    share = 1 if on_gpu else processes  # a machine's processes have a GPU each, but its memory and cores together

    def planned(chosen: MethodPlan, others: tuple[MethodPlan, ...], rate: float | None, watts: float | None) -> RunPlan:
        return RunPlan(
            chosen,
            others,
            plan.total_steps,
            tokens,
            max(int(examples.lengths[rows].sum()) for rows in steps),
            _token_budget(run),
            rate,
            None if rate is None else tokens / rate * share / processes,
            _available() // share,
            "cuda" if on_gpu else "cpu",
            watts,
            processes,
            config.training.sharding,
        )

    # What is certain comes first: where even that is too much, a probe would be ended by the system, with no answer.
    guess = _count(config.method, run.running.model, config, _guessed_activations(run, steps, processes))
    try:
        if run.stepper is None or guess.memory.peak - guess.memory.activations // 2 > _available():
            raise MemoryShortError("what is counted does not fit")
        rate, watts, grown, evaluating = _probe(run, steps)
        peak = _peak_bytes() + grown
        chosen = _count(config.method, run.running.model, config, _activations(run, steps))
    except Exception as error:
        if not (isinstance(error, MemoryShortError) or out_of_memory(error)):
            raise
        memory = of_one_process(guess.memory, run.running.model, config, processes)
        return planned(replace(guess, memory=memory), (), None, None)
    aside = _put_aside(run.running.model, run.vocabulary)
    rest = Rest(max(peak - chosen.memory.peak - aside, 0), max(evaluating - chosen.memory.kept - aside, 0))
    mine = [rows[share_by_tokens(examples.lengths[rows], processes)[0]] for rows in steps]
    if processes > 1:
        chosen = replace(chosen, memory=replace(chosen.memory, activations=_activations(run, mine)))
    chosen = _whole(chosen, run.running.model, run.vocabulary, config, rest, processes)
    others = tuple(
        _alternative(m, config, run, mine, rest, processes) for m in PLANNED if alternatives and m != config.method
    )
    return planned(chosen, others, rate, watts)


def _token_budget(run: Any) -> int:
    from regraft.engine.training.setup import choose_token_budget

    if run.stepper is not None:
        return run.stepper.token_budget
    return choose_token_budget(run.config, run.running.model, run.precision)


def _guessed_activations(run: Any, steps: Steps, processes: int) -> int:
    """Bytes of the largest micro-batch's activations, from the model's size alone."""
    from regraft.engine.training.setup import activation_bytes

    lengths = [run.data.splits["train"].lengths[rows] for rows in steps]
    at_once = max(min(int(n.sum()) // processes, max(_token_budget(run), int(n.max()))) for n in lengths)
    a_token = activation_bytes(run.running.model, run.precision)
    if run.config.training.gradient_checkpointing:  # one value a layer, and all of one layer's
        layers = getattr(run.running.model.config, "num_hidden_layers", 12)
        a_token *= 1 / 34 + 1 / layers
    return int(at_once * a_token)


def _whole(counted: MethodPlan, model: Any, used: Any, config: RunConfig, rest: Rest, processes: int) -> MethodPlan:
    """The plan of one process with everything in it. `used`: what the word embedding was cut to, if it was."""
    memory, aside = counted.memory, _put_aside(model, used)
    after = memory.kept + aside + rest.evaluation + _beside_best(counted, model, used)
    counted = replace(counted, memory=replace(memory, rest=max(rest.steps + aside, after - memory.peak)))
    table = model.get_input_embeddings().weight
    if used is not None and not table.requires_grad:  # an adapter's backbone has all its rows, held or not
        counted = replace(counted, total=counted.total + used.left_out // table.element_size())
    return replace(counted, memory=of_one_process(counted.memory, model, config, processes))


def _probe(run: Any, steps: Steps) -> tuple[float, float | None, int, int]:
    """Ten steps, the largest first, and the largest evaluation batch; tokens a second of the steps after the first, watts,
    bytes by which freed memory will have grown when it is given back, and bytes held after the evaluation (0 on a GPU)."""
    from regraft.engine.evaluation import evaluate

    run.stepper.rehearse(steps)
    tokens, seconds = 0, 0.0
    order = run.plan.order(0)
    watts, held = [], []
    for step in range(PROBE_STEPS):
        rows = run.plan.batch(step % run.plan.steps_per_epoch, order)
        began = time.perf_counter()
        tokens += run.stepper(step, rows).tokens
        held.append(resident())
        seconds += time.perf_counter() - began
        watts.append(_watts())
    run.freed.give_back()
    # with its figures: what computes them is imported then, and stays
    evaluate(run.running, run.data.splits["dev"], run.data.task, accelerator=run.accelerator, most_batches=1)
    evaluating = 0 if torch.cuda.is_available() else resident()
    run.set_training_mode()
    drawn = [w for w in watts if w is not None]
    more = max(min(EVERY, run.plan.total_steps) / PROBE_STEPS - 1, 0)
    grown = 0 if torch.cuda.is_available() else int(max(held[-1] - held[0], 0) * more)
    return tokens / max(seconds, 1e-9), max(drawn, default=None), grown, evaluating


def _alternative(method: str, config: RunConfig, run: Any, steps: Steps, rest: Rest, processes: int) -> MethodPlan:
    from regraft.engine.heads.live import model_of
    from regraft.engine.methods.adapt import adapt
    from regraft.engine.training.step import out_of_memory

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
    try:
        return _counted_beside(model, other, run, steps, rest, processes)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return MethodPlan(method, note="out of memory while it was counted beside the chosen method")


def _counted_beside(model: Any, other: RunConfig, run: Any, steps: Steps, rest: Rest, processes: int) -> MethodPlan:
    from regraft.engine.methods.speed import use_method_kernels
    from regraft.engine.models import RunningModel

    running = RunningModel(model, pad_token_id=run.data.tokenizer.pad_token_id, reads=run.data.task.reads)
    running.to(run.accelerator.device)
    if run.running.packed:
        running.run_packed()
    if other.model.kernels == "auto":
        running.use_kernels()
        use_method_kernels(running, other, run.precision)
    held, run.running, run.stepper.model = run.running, running, running
    try:
        table = running.model.get_input_embeddings()
        used = run.vocabulary if may_be_cut(table, other) else None
        if used is not None:
            table.weight.data = used.module.weight.data
        running.train()
        activations = _activations(run, steps)
    finally:
        run.running, run.stepper.model = held, held
    counted = _count(other.method, model, other, activations)
    return _whole(counted, model, used, other, rest, processes)


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
    return MethodPlan(method, numbers, sum(_numbers(p) for p in model.parameters()), memory)


def _numbers(weight: Any) -> int:
    """How many numbers a weight stands for: in four bits two of them are stored as one."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def _beside_best(plan: MethodPlan, model: nn.Module, used: Any) -> int:
    """Bytes of what an evaluation finds to be the best: its whole word embedding while it is saved, and all of it when it
    is read at the end, without the moments. An adapter is small, and a GPU sees a tensor of it at a time."""
    if plan.method in ADAPTERS or torch.cuda.is_available():
        return 0
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    if used is None:
        return max(whole - plan.memory.optimizer, 0)
    return max(used.whole_bytes, whole + used.left_out - plan.memory.optimizer)


def _put_aside(model: Any, used: Any) -> int:
    """Bytes of the whole word embedding, kept on the host beside the rows in use where these are trained."""
    if used is None or torch.cuda.is_available():
        return 0
    return used.whole_bytes if model.get_input_embeddings().weight.requires_grad else 0


def _activations(run: Any, steps: Steps) -> int:
    """Bytes that autograd keeps of the largest micro-batch of these steps, weights left out."""
    return max(_activations_of(run, rows) for rows in steps)


def _activations_of(run: Any, rows: np.ndarray) -> int:
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
    """Bytes that this process may have in all."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return host_memory() + resident()


def _watts() -> float | None:
    """Power that the GPU draws at this moment; None where nothing tells."""
    if not torch.cuda.is_available():
        return None
    try:
        return float(torch.cuda.power_draw()) / 1000.0
    except Exception:  # whatever a driver's library raises: energy is a courtesy
        return None
