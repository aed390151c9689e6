"""What stands between the combined features and the logits.

Pooled bodies take [B, H]; token bodies take cells [B, L, H] and lengths [B], and give the same whatever lies behind a
text's end. Each says how wide its output is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Perceptron(nn.Module):
    """One hidden layer with GELU. Shape: [B, H] -> [B, hidden]."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.width = hidden
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class AttentionPooling(nn.Module):
    """sum_t softmax(v . tanh(W h_t))_t h_t (Yang et al. 2016). Shape: [B, L, H] -> [B, H]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.score = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1, bias=False))

    def forward(self, cells: Tensor, lengths: Tensor) -> Tensor:
        scores = self.score(cells)[..., 0]
        weights = torch.softmax(torch.where(inside(cells, lengths), scores, -torch.inf), dim=1)
        return torch.einsum("bl,blh->bh", weights, cells)


class BiLSTM(nn.Module):
    """Two LSTMs, one from each end, and the largest value of each unit over the text (Conneau et al. 2017).

    Shape: [B, L, H] -> [B, 2 * hidden]. The second direction reads the tokens turned round by index, so padding is
    behind the text for both, and the whole exports as plain operators.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = 2 * hidden
        self.ahead = nn.LSTM(width, hidden, batch_first=True)
        self.back = nn.LSTM(width, hidden, batch_first=True)

    def forward(self, cells: Tensor, lengths: Tensor) -> Tensor:
        at = torch.arange(cells.shape[1], device=cells.device)[None]
        turned = torch.where(at < lengths[:, None], lengths[:, None] - 1 - at, at)
        turned_cells = torch.gather(cells, 1, turned[..., None].expand_as(cells))
        both = torch.cat([self.ahead(cells)[0], self.back(turned_cells)[0]], dim=-1)
        return torch.where(inside(cells, lengths)[..., None], both, -torch.inf).amax(dim=1)


class Convolutions(nn.Module):
    """Filters over 3, 4, 5 (`kernels`) tokens, ReLU, the largest value over the text (Kim 2014).

    Shape: [B, L, H] -> [B, filters * len(kernels)].
    """

    def __init__(self, width: int, filters: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.width = filters * len(kernels)
        self.kernels = tuple(kernels)
        self.filters = nn.ModuleList(nn.Conv1d(width, filters, k) for k in kernels)

    def forward(self, cells: Tensor, lengths: Tensor) -> Tensor:
        within = inside(cells, lengths)
        x = torch.where(within[..., None], cells, 0.0).transpose(1, 2)
        found = []
        for size, conv in zip(self.kernels, self.filters, strict=True):
            # One place for each token, so that a text shorter than the filter has places too.
            padded = nn.functional.pad(x, ((size - 1) // 2, size // 2))
            values = torch.where(within[:, None], torch.relu(conv(padded)), 0.0)
            found.append(values.amax(dim=2))
        return torch.cat(found, dim=1)


def inside(cells: Tensor, lengths: Tensor) -> Tensor:
    """Which cells hold a token, [B, L] bool."""
    return torch.arange(cells.shape[1], device=cells.device)[None] < lengths[:, None]
