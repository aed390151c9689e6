"""Clipping and AdamW as one CUDA graph: the last hundred launches of a step, none of which waits for the host.

    norm = |g|,   g <- g / max(1, norm / max_norm),   AdamW at rates that lie in a tensor,   g <- 0

Gradients lie where `GraphedGradients` keeps them; any number of micro-batches may have added to them, and processes may
have averaged them. Before each replay the learning rates are copied from pinned memory into a fixed tensor. Where loss
or norm is not finite, the fused kernel is told so by `found_inf` and leaves weights, moments and step counts as they
were. Loss and norm come to the host together, once a step.

The same code runs uncaptured on any device (`capture=False`): that is how it is tested without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.capture import capture

_log = logging.getLogger("regraft.training")


class CapturedOptimizer:
    """The step of `optimizer` over `parameters`, whose gradients stay where they are from one step to the next.

    `max_norm`: the gradients' norm is scaled down to it; None leaves it. The optimizer's own groups keep their rates as
    numbers, and its state dict is what it would be without this class. Raises TypeError for what is no fused AdamW.
    """

    def __init__(
        self, optimizer: Any, parameters: Sequence[Tensor], max_norm: float | None, *, capture: bool = True
    ) -> None:
        if not can_be_captured(optimizer):
            raise TypeError(f"optimizer: is {type(optimizer).__name__}, expected torch's AdamW with fused=True")
        self.optimizer, self.max_norm, self.capture = optimizer, max_norm, capture
        self.parameters = [p for p in parameters if p.requires_grad]
        device = self.parameters[0].device
        groups = len(optimizer.param_groups)
        self.rates = torch.zeros(groups, dtype=torch.float32, device=device)
        self._staged = torch.zeros(groups, dtype=torch.float32, pin_memory=device.type == "cuda")
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._report = torch.zeros(2, dtype=torch.float64, device=device)
        self._graph: Any = None
        self._warm = False
        self.reason = "" if capture else "capturing was not asked for"
        optimizer.register_load_state_dict_post_hook(lambda _: self.forget())

    def __call__(self, loss: Tensor) -> None:
        """Take the step; `loss` [] is that of all its micro-batches. `report` tells how it went."""
        self._fill(loss)
        if self._graph is not None:
            self._graph.replay()
        elif self.capture and self._warm:
            self._capture()
        else:
            # The first step is taken uncaptured: it makes the moments and lets the library set itself up.
            self._run()
            self._warm = True

    def report(self) -> tuple[float, float]:
        """Loss and gradient norm (before clipping) of the last step. Waits for the device."""
        loss, norm = self._report.tolist()
        return loss, norm

    def forget(self) -> None:
        """Let go of the graph: what it writes to has been replaced."""
        self._graph, self._warm = None, False

    def _fill(self, loss: Tensor) -> None:
        # The last step's report has been read, or its copies are done all the same: this memory is free again.
        for place, group in enumerate(self.optimizer.param_groups):
            self._staged[place] = group["lr"]
        self.rates.copy_(self._staged, non_blocking=True)
        self._loss.copy_(loss)

    @torch.no_grad()
    def _run(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch._foreach_norm(gradients)
        norm = torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))
        finite = torch.isfinite(norm) & torch.isfinite(self._loss)
        over = None if self.max_norm is None else (norm / self.max_norm).clamp(min=1.0)
        self._step(over, (~finite).float())
        torch._foreach_zero_(gradients)
        self._report.copy_(torch.stack((self._loss, norm.double())))

    def _step(self, over: Tensor | None, found_inf: Tensor) -> None:
        optimizer = self.optimizer
        groups = optimizer.param_groups
        held = [(group["lr"], group["capturable"]) for group in groups]
        capturing = self.rates.is_cuda and torch.cuda.is_current_stream_capturing()
        for place, group in enumerate(groups):
            group["lr"], group["capturable"] = self.rates[place], capturing
        optimizer.grad_scale, optimizer.found_inf = over, found_inf
        try:
            optimizer.step()
        finally:
            optimizer.grad_scale = optimizer.found_inf = None
            for group, (rate, capturable) in zip(groups, held, strict=True):
                group["lr"], group["capturable"] = rate, capturable

    def _capture(self) -> None:
        try:
            graph = capture(self._run)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.capture = False
            self.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
            _log.warning("the optimizer runs without a CUDA graph: %s", self.reason)
            self._run()
            return
        self._graph = graph
        graph.replay()  # capturing has recorded the step, not taken it


def can_be_captured(optimizer: Any) -> bool:
    """Whether it is AdamW in torch's fused form, whose rates may lie in a tensor."""
    return isinstance(optimizer, torch.optim.AdamW) and all(g.get("fused") for g in optimizer.param_groups)
