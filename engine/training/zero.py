"""DeepSpeed's ZeRO 1, 2 and 3 (Rajbhandari et al. 2020), where DeepSpeed is installed.

accelerate brings the processes together; the model is given to DeepSpeed directly, since accelerate does that on accelerators
alone, and one way is tested everywhere. DeepSpeed clips, updates and forgets gradients in its own step. Weights stay fp32
and products run by autocast, as everywhere here. Checkpoints are whole and the same files as without DeepSpeed, so a
run goes on under any of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regraft.engine.errors import TrainingError
from regraft.engine.training.sharding import stage_of
from regraft.engine.training.step import Stepper, StepResult
from regraft.engine.training.together import processes

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.models import RunningModel

MOMENTS = ("exp_avg", "exp_avg_sq")


def settings_of(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration. Steps are cut up by the engine, so DeepSpeed accumulates nothing."""
    zero: dict[str, Any] = {"stage": stage_of(config)}
    if config.training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": processes(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.training.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def load_deepspeed(device: torch.device) -> Any:
    """The package, made to work on this device. On a CPU processes talk over gloo: what DeepSpeed has for it is compiled when
    it is first used, under a lock that outlives a process that is killed meanwhile."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _Groups:
    """The optimizer as the run sees it: groups whose learning rate it sets. Its state goes by `Zero`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        return None


class Zero:
    """A model under DeepSpeed, with what `Shards` offers: its parameters, whole for saving; its state as a plain AdamW's."""

    def __init__(self, running: RunningModel, optimizer: torch.optim.Optimizer, config: RunConfig) -> None:
        self.stage = stage_of(config)
        self.stepper: ZeroStepper | None = None  # takes its place when it is made
        self.running = running
        self.order = [p for group in optimizer.param_groups for p in group["params"]]
        self.sizes = [len(group["params"]) for group in optimizer.param_groups]
        self.parameters = [p for p in running.parameters() if p.requires_grad]
        deepspeed = load_deepspeed(self.order[0].device)
        self.model, wrapped, _, _ = deepspeed.initialize(
            model=running, optimizer=optimizer, config=settings_of(config), dist_init_required=False
        )
        self.optimizer = _Groups(wrapped.param_groups)
        running.runs_in_step = self.stage == 3

    @property
    def _states(self) -> list[dict[str, Tensor]]:
        return [state for state in self.model.optimizer.optimizer.state.values() if "step" in state]

    def _link(self) -> None:
        """Stages 1 and 2 tie each parameter to its moments after the update of the first group, when the other groups have
        none yet; once more, when all have."""
        own = self.model.optimizer
        if self.stage < 3 and self._states:
            own._hp_optimizer_states_linked = False
            own._lazy_init_hp_params_optimizer_state()

    def forget(self) -> None:
        """Moments and count of steps as at the start."""
        for state in self._states:
            for value in state.values():
                value.zero_()

    def clear(self) -> None:
        """DeepSpeed has."""

    @contextmanager
    def whole(self, *, held: bool) -> Iterator[None]:
        """Within the block the model's weights are whole; every process has to enter."""
        import deepspeed

        everything = list(self.running.parameters())
        with deepspeed.zero.GatheredParameters(everything, enabled=self.stage == 3):
            yield

    def whole_state(
        self, weights: dict[str, Any], state: dict[str, Any], optimizer: Any, *, held: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A checkpoint as one process would write it; every process has to call."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        joined = {name: _kept(safe_get_full_fp32_param(p), held) for name, p in weights.items()}
        step = self._states[0]["step"].detach().clone().cpu() if self._states else torch.tensor(0.0)
        moments = {
            # A count of its own: what is one tensor when it is written is one when it is read, and counted on by each.
            number: {"step": step.clone()}
            | {key: _kept(safe_get_full_optimizer_state(p, key), held) for key in MOMENTS}
            for number, p in enumerate(self.order)
        }
        groups, first = [], 0
        for group, size in zip(self.optimizer.param_groups, self.sizes, strict=True):
            own = {k: v for k, v in group.items() if k != "params"}
            groups.append(own | {"params": list(range(first, first + size))})
            first += size
        return joined, {**state, "optimizer": {"state": moments, "param_groups": groups}}

    def own_state(
        self, weights: dict[str, Tensor], state: dict[str, Any], into: dict[str, Any], optimizer: Any
    ) -> dict[str, Any]:
        """Take a checkpoint: weights, moments and the count of steps."""
        if not self._states and self.stepper is not None:
            longest = int(self.stepper.examples.lengths.argmax())
            self.stepper.rehearse([np.array([longest])])  # moments exist from the first step on
        self._link()
        self.put(weights, into)
        for name, value in weights.items():
            self._set(into[name], value)
        kept = state["optimizer"]["state"]
        for number, values in kept.items():
            for key in MOMENTS:
                self._set(self.order[number], values[key], key)
        taken = max((float(values["step"]) for values in kept.values()), default=0.0)  # one count: all step together
        for own in self._states:
            own["step"].fill_(taken)
        return state

    def _set(self, parameter: Any, whole: Tensor, moment: str | None = None) -> None:
        """Take this process's part of a whole weight in fp32, or of one of its moments."""
        from deepspeed import utils

        whole = whole.to(self.model.device)
        if self.stage == 3:
            # Its own way to set the whole does not know that the last part is filled up to the length of the others.
            count = parameter.ds_tensor.ds_numel
            first = count * torch.distributed.get_rank()
            whole = torch.nn.functional.pad(whole.flatten(), (0, count))[first : first + count]
        where = "local" if self.stage == 3 else "full"
        if moment is None:
            getattr(utils, f"safe_set_{where}_fp32_param")(parameter, whole)
        else:
            getattr(utils, f"safe_set_{where}_optimizer_state")(parameter, whole, moment)

    @torch.no_grad()
    def put(self, values: dict[str, Tensor], into: dict[str, Any]) -> None:
        """Copy whole tensors into the weights that the model computes with."""
        import deepspeed

        found = {name: into[name] for name in values if name in into}
        with deepspeed.zero.GatheredParameters(list(found.values()), modifier_rank=0, enabled=self.stage == 3):
            for name, target in found.items():
                target.data.copy_(values[name])


def _kept(whole: Tensor, held: bool) -> Tensor:
    return whole.detach().cpu() if held else whole.new_empty(0)


@dataclass
class ZeroStepper(Stepper):
    """A step whose last backward pass is DeepSpeed's own, with clipping and update."""

    def __post_init__(self) -> None:
        self.shards.stepper = self

    @property
    def engine(self) -> Any:
        return self.model

    def _apply(self, loss: float, tokens: int) -> StepResult:
        # By now the step has been taken.
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"loss {loss}, norm of its gradient {norm}: not finite, and DeepSpeed has taken the step. Start again to go on "
                "from the last checkpoint; a lower training.learning_rate or precision: fp32 is the usual cure"
            )
        return StepResult(loss, norm, tokens, True)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)
        if last:
            self.engine.step()

    def rehearse(self, steps: Sequence[np.ndarray]) -> None:
        """A step at no learning rate, for its memory and so that moments exist; they are forgotten again."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        super().rehearse(steps)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.shards.forget()
