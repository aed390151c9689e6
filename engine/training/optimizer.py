"""AdamW with decay groups and layer-wise learning rates; clipping and the update in one pass over the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as every_optimizer

from regraft.engine.config import TrainingConfig
from regraft.engine.half_weights import copies_written
from regraft.engine.training.offload import OffloadedAdamW
from regraft.kernels import adamw_native
from regraft.kernels.adamw_native import Update
from regraft.kernels.embedding import RowGradient

_LAYER = re.compile(r"\.(\d+)\.")


def head_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are not the backbone's: the head, and a pooler inside the backbone."""
    backbone = f"{model.base_model_prefix}."
    return {n for n, _ in model.named_parameters() if not n.startswith(backbone) or ".pooler" in n}


def depth_of(name: str, layers: int, head: bool) -> int:
    """0 for embeddings, 1 .. layers for the layers, layers + 1 for the head and what follows the layers."""
    if head:
        return layers + 1
    found = _LAYER.search(name)
    if found:
        return int(found.group(1)) + 1
    return 0 if "embed" in name else layers + 1


def parameter_groups(model: nn.Module, config: TrainingConfig, plus_ratio: float = 1.0) -> list[dict]:
    """Groups for AdamW: no decay on biases and norms (one-dimensional weights), each layer its own learning rate.

    `base_lr` in each group is what the schedule multiplies; `plus_ratio` multiplies that of LoRA's B (LoRA+).
    """
    head = head_names(model)
    layers = getattr(model.config, "num_hidden_layers", 0)
    groups: dict[tuple[float, float], dict] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        is_head = name in head
        rate = config.head_learning_rate if is_head and config.head_learning_rate else config.learning_rate
        rate = getattr(weight, "learning_rate", rate)  # one that brings its own
        rate *= config.layer_decay ** (layers + 1 - depth_of(name, layers, is_head))
        rate *= plus_ratio if ".lora_B." in name else 1.0
        decay = config.weight_decay if weight.dim() > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "base_lr": rate, "weight_decay": decay})
        group["params"].append(weight)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: TrainingConfig, plus_ratio: float = 1.0) -> Any:
    """AdamW (Loshchilov and Hutter 2019), fused where torch has it for the device; or with 8-bit moments."""
    groups = parameter_groups(model, config, plus_ratio)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.epsilon, fused=True)
    from regraft.engine.methods.quantise import import_bitsandbytes

    bnb = import_bitsandbytes(f"training.optimizer: {config.optimizer}")
    paged = config.optimizer.startswith("paged") and torch.cuda.is_available()
    made = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    return made(groups, betas=config.betas, eps=config.epsilon)


def room_for_moments(optimizer: Any) -> list[Tensor]:
    """Memory of the size that the moments will take which the optimizer has not made yet: none for those that it keeps on
    the host, and none under DeepSpeed, which makes its own."""
    if not isinstance(optimizer, torch.optim.Optimizer) or getattr(optimizer, "is_paged", False):
        return []
    weights = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    dtype = None if isinstance(optimizer, torch.optim.AdamW) else torch.uint8
    return [torch.ones_like(p, dtype=dtype, requires_grad=False) for p in weights for _ in range(2)]


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share


def gradient_norm(parameters: Iterable[Tensor], rows: RowGradient | None = None) -> Tensor:
    """L2 norm of all gradients together, a scalar in fp32. `rows`: a gradient of which only these need be read."""
    own = None if rows is None else rows.weight
    gradients = [p.grad for p in parameters if p.grad is not None and p is not own]
    if rows is not None:
        gradients.append(rows.rows())
    if gradients and adamw_native.runs_here(gradients):
        return torch.tensor(adamw_native.square_sum(gradients), dtype=torch.float64).sqrt().float()
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))


def clipped_step(optimizer: Any, norm: Tensor, max_norm: float | None) -> None:
    """One update with the gradients scaled to at most `max_norm` in all, without a pass of its own for the scaling:
    the fused kernel divides by `grad_scale` while it reads them. In C where that runs, which writes bf16 copies too."""
    over = 1.0 if max_norm is None else float(norm) / max_norm
    if not isinstance(optimizer, torch.optim.AdamW | OffloadedAdamW):
        if over > 1.0:
            gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / over)
        optimizer.step()
        say_changed(optimizer)
        return
    updates = _native_updates(optimizer)
    if updates:
        with copies_written([u.weight for u in updates]) as copies:
            adamw_native.adamw(updates, max(over, 1.0), [copies.get(id(u.weight)) for u in updates])
            say_changed(optimizer)
        return
    if over > 1.0:
        optimizer.grad_scale = torch.tensor(over, dtype=torch.float32, device=norm.device)  # type: ignore[union-attr]
    try:
        optimizer.step()
    finally:
        optimizer.grad_scale = None  # type: ignore[union-attr]
    say_changed(optimizer)


def _native_updates(optimizer: Any) -> list[Update]:
    """A plain fused AdamW's next step over its own state; empty where torch is to take it."""
    if not is_plain_adamw(optimizer):
        return []
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not adamw_native.runs_here(gradients):
        return []
    updates = []
    for group in optimizer.param_groups:
        lists: list[list[Tensor]] = [[] for _ in range(6)]
        optimizer._init_group(group, *lists)  # torch's own: makes the state that is missing
        options = group["lr"], group["weight_decay"], group["betas"], group["eps"]
        weights, grads, averages, squares, _, steps = lists
        updates += [Update(*each, *options) for each in zip(weights, grads, averages, squares, steps, strict=True)]
    tensors = (x for u in updates for x in (u.weight, u.exp_avg, u.exp_avg_sq, u.step))
    return updates if adamw_native.runs_here(tensors) else []


def is_plain_adamw(optimizer: Any) -> bool:
    """Whether this is torch's fused AdamW, without what only torch's own step would do."""
    if type(optimizer) is not torch.optim.AdamW or getattr(optimizer, "found_inf", None) is not None:
        return False
    # hooks, and a `step` that something has put in the place of torch's, are for torch to run
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    everyones = every_optimizer._global_optimizer_pre_hooks, every_optimizer._global_optimizer_post_hooks
    if "step" in vars(optimizer) or any(own) or any(everyones):
        return False
    return all(map(_is_plain, optimizer.param_groups))


def _is_plain(group: dict[str, Any]) -> bool:
    others = ("amsgrad", "maximize", "foreach", "capturable", "differentiable")
    numbers = (group["lr"], group["weight_decay"], group["eps"], *group["betas"])
    return (
        bool(group["fused"]) and not any(group[o] for o in others) and all(isinstance(x, float | int) for x in numbers)
    )


def say_changed(optimizer: Any) -> None:
    """Raise the version of every weight."""
    # Fused kernels on a CPU write weights without raising their version, by which a copy of one knows that it is old.
    torch.autograd.graph.increment_version(p for group in optimizer.param_groups for p in group["params"])


class AveragedWeights:
    """Exponential moving average of the trained weights, used for evaluation and for what is saved.

    shadow = decay * shadow + (1 - decay) * weight, after every optimizer step.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.parameters = [p for p in parameters if p.requires_grad]
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1.0 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average; a second call exchanges them back."""
        for weight, average in zip(self.parameters, self.shadow, strict=True):
            held = weight.detach().clone()
            weight.copy_(average)
            average.copy_(held)
