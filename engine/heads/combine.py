"""Several layers as one vector: the scalar mix of Peters et al. 2018, or all of them side by side."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

EPS = 1e-5  # of the normalisation of a layer, as torch has it


class ScalarMix(nn.Module):
    """gamma * sum_j softmax(w)_j h_j, each h_j layer-normalised first if `layer_norm`. Shape: [..., J, H] -> [..., H].

    `penalty` is lambda of ELMo's regulariser lambda * |w|^2, which pulls the weights of all layers together.
    """

    def __init__(self, layers: int, *, layer_norm: bool = False, penalty: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))
        self.layer_norm, self.penalty = layer_norm, penalty

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.is_cuda and not torch.compiler.is_exporting():  # on a CPU one small product is as fast
            return self.by_kernel(hidden)
        if self.layer_norm:
            hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=EPS)
        return self.gamma * torch.einsum("...jh,j->...h", hidden, torch.softmax(self.weights, dim=0))

    def by_kernel(self, hidden: Tensor) -> Tensor:
        """The same in one pass over the layers as they lie, forward and backward."""
        from regraft.kernels.mix import scalar_mix

        layers = hidden.flatten(0, -3).unbind(1)
        mixed = scalar_mix(layers, self.weights, self.gamma, normalise=self.layer_norm, eps=EPS)
        return mixed.view(*hidden.shape[:-2], hidden.shape[-1])

    def shares(self) -> list[float]:
        """Weight of each layer after the softmax."""
        return torch.softmax(self.weights.detach().double(), dim=0).tolist()


class Concatenation(nn.Module):
    """All layers side by side; one layer as it is. Shape: [..., J, H] -> [..., J * H]."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.flatten(-2)


class Standardise(nn.Module):
    """(x - mean) / std by the training rows' figures, so that one learning rate suits every encoder and layer.

    Shape: [..., J, H] -> the same.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, layers: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(layers, hidden))
        self.register_buffer("scale", torch.ones(layers, hidden))

    def fit(self, parts: Iterable[Tensor]) -> None:
        """Take the figures of the rows of all parts, [N, J, H] each (pairwise, Chan, Golub and LeVeque 1983)."""
        count, mean = 0, torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(mean)
        for part in parts:
            variance, here = torch.var_mean(part.double(), dim=0, correction=0)
            whole = count + len(part)
            away = here.to(mean.device) - mean
            squares += variance.to(mean.device) * len(part) + away.square() * (count * len(part) / whole)
            mean += away * (len(part) / whole)
            count = whole
        spread = (squares / count).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(spread > 1e-6, 1 / spread.clamp_min(1e-6), 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale
