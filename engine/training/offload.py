"""AdamW whose moments stay in the host's memory: a GPU holds weights and gradients, and the host computes the update.

A step copies the gradients into pinned memory, updates a copy of the weights there, and copies that back. Of the 16 bytes
that AdamW in fp32 takes a parameter, 8 are left on the GPU; the price is 8 bytes a parameter over the bus in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from regraft.engine.config import TrainingConfig


class OffloadedAdamW:
    """`inner`, an AdamW that has taken no step, with its moments on the host. Its state is that of a plain AdamW.

    `param_groups` are the caller's, with the weights on their device; `grad_scale`: what gradients are divided by.
    """

    def __init__(self, inner: torch.optim.AdamW) -> None:
        self.param_groups: list[dict[str, Any]] = inner.param_groups
        self.grad_scale: Tensor | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []
        groups = [{**group, "params": [self._on_host(p) for p in group["params"]]} for group in inner.param_groups]
        self._inner = torch.optim.AdamW(groups, fused=True)

    def _on_host(self, weight: Tensor) -> Tensor:
        held = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.device.type == "cuda")
        held.copy_(weight.detach())
        self._pairs.append((weight, held))
        return held

    @property
    def state(self) -> dict[Tensor, Any]:
        """Moments by the host's copy of the weight they belong to."""
        return self._inner.state

    @torch.no_grad()
    def step(self) -> None:
        """One update of the weights."""
        for group, own in zip(self._inner.param_groups, self.param_groups, strict=True):
            group["lr"], group["weight_decay"] = own["lr"], own["weight_decay"]
        for weight, held in self._pairs:
            if weight.grad is None:
                held.grad = None
                continue
            if held.grad is None:
                held.grad = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.device.type == "cuda")
            held.grad.copy_(weight.grad, non_blocking=True)
        self._wait()
        scale = self.grad_scale
        self._inner.grad_scale = None if scale is None else scale.cpu()  # type: ignore[attr-defined]
        try:
            self._inner.step()
        finally:
            self._inner.grad_scale = None  # type: ignore[attr-defined]
        for weight, held in self._pairs:
            if weight.grad is not None:
                weight.copy_(held, non_blocking=True)
        self._wait()  # the next step's gradients are copied to where this one's weights are read from

    def _wait(self) -> None:
        if self._pairs and self._pairs[0][0].device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the weights' gradients."""
        for weight, _ in self._pairs:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The state of a plain AdamW over the same weights."""
        return self._inner.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a plain AdamW's state, and the weights as they are now."""
        self._inner.load_state_dict(state)
        for group, loaded in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update({key: value for key, value in loaded.items() if key != "params"})
        for weight, held in self._pairs:
            held.copy_(weight.detach())


def offloaded(optimizer: Any, training: TrainingConfig, device: torch.device, say: Callable[[str], None]) -> Any:
    """The optimizer with its moments on the host where that is asked for and they are not there anyway."""
    if not training.offload_optimizer or training.sharding.startswith("zero"):  # DeepSpeed has a way of its own
        return optimizer
    if device.type == "cpu":
        say("training.offload_optimizer: the run is on the CPU, so the moments are in its memory anyway")
        return optimizer
    return OffloadedAdamW(optimizer)
