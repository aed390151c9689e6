"""AdamW by torch's fused kernel, without torch.optim, which imports torch's compiler to make its first optimizer: that
takes longer than training a head does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FusedAdamW:
    """The update of `torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)`, to the bit.

    `grad_scale`: what gradients are divided by in the next step, or None.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.grad_scale: Tensor | None = None
        self._moments: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            first, second, steps = map(list, zip(*(self._moments_of(w) for w in weights), strict=True))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                weights,
                [w.grad for w in weights],
                first,
                second,
                [],
                steps,
                lr=group["lr"],
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=self.grad_scale,
                found_inf=None,
            )

    def state_dict(self) -> dict[str, Any]:
        """Moments of the weights in the order of the groups; None of one that was never updated."""
        weights = [w for group in self.param_groups for w in group["params"]]
        return {"moments": [self._moments.get(w) for w in weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        weights = [w for group in self.param_groups for w in group["params"]]
        for weight, moments in zip(weights, state["moments"], strict=True):
            if moments is not None:
                self._moments[weight] = tuple(m.clone() for m in moments)

    def _moments_of(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if weight not in self._moments:
            step = torch.zeros((), dtype=torch.float32, device=weight.device)
            self._moments[weight] = (torch.zeros_like(weight), torch.zeros_like(weight), step)
        return self._moments[weight]
