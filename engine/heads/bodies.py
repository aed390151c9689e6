"""What stands between the combined features and the logits.

Pooled bodies take [B, H]; token bodies take cells [B, L, H] and lengths [B], and give the same whatever lies behind a
text's end. Those that know every token (`states`) do for tags too. Each says how wide its output is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regraft.engine.heads.recurrent import Reading, read, reads_rows


class Perceptron(nn.Module):
    """One hidden layer with GELU. Shape: [..., H] -> [..., hidden]."""

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
    """Two LSTMs, one from each end; of a text the largest value of each unit over its tokens (Conneau et al. 2017).

    Shape: [B, L, H] -> [B, 2 * hidden], `states` -> [B, L, 2 * hidden]. The second direction reads the tokens turned round
    by index, so padding is behind the text for both.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = 2 * hidden
        self.ahead = nn.LSTM(width, hidden, batch_first=True)
        self.back = nn.LSTM(width, hidden, batch_first=True)

    def states(self, cells: Tensor, lengths: Tensor) -> Tensor:
        """Each token's state in both directions; behind a text's end whatever comes."""
        if reads_rows(cells):
            return self._read(cells, lengths)
        back = _turned(read(self.back, _turned(cells, lengths)), lengths)
        return torch.cat([read(self.ahead, cells), back], dim=-1)

    def forward(self, cells: Tensor, lengths: Tensor) -> Tensor:
        if reads_rows(cells):
            both = self._read(cells, lengths)
        else:  # the largest value is the same in either order: nothing need be turned back
            both = torch.cat([read(self.ahead, cells), read(self.back, _turned(cells, lengths))], dim=-1)
        return torch.where(inside(cells, lengths)[..., None], both, -torch.inf).amax(dim=1)

    def _read(self, cells: Tensor, lengths: Tensor) -> Tensor:
        reading = Reading(lengths, cells)
        ahead = reading.states(self.ahead, cells, reading.ahead)
        return torch.cat([ahead, reading.states(self.back, cells, reading.back)], dim=-1)


def _turned(cells: Tensor, lengths: Tensor) -> Tensor:
    """Each text's tokens from its last to its first; what lies behind its end stays there."""
    at = torch.arange(cells.shape[1], device=cells.device)[None]
    index = torch.where(at < lengths[:, None], lengths[:, None] - 1 - at, at)
    return torch.gather(cells, 1, index[..., None].expand_as(cells))


class Convolutions(nn.Module):
    """Filters over 3, 4, 5 (`kernels`) tokens and ReLU; of a text the largest value over its tokens (Kim 2014).

    Shape: [B, L, H] -> [B, filters * len(kernels)], `states` -> [B, L, filters * len(kernels)].
    """

    def __init__(self, width: int, filters: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.width = filters * len(kernels)
        self.kernels = tuple(kernels)
        self.filters = nn.ModuleList(nn.Conv1d(width, filters, k) for k in kernels)

    def states(self, cells: Tensor, lengths: Tensor) -> Tensor:
        """What the filters find around each token; zeros behind a text's end."""
        within = inside(cells, lengths)[..., None]
        x = torch.where(within, cells, 0.0).transpose(1, 2)
        found = []
        for size, conv in zip(self.kernels, self.filters, strict=True):
            # One place for each token, so that a text shorter than the filter has places too.
            padded = nn.functional.pad(x, ((size - 1) // 2, size // 2))
            found.append(torch.relu(conv(padded)))
        return torch.where(within, torch.cat(found, dim=1).transpose(1, 2), 0.0)

    def forward(self, cells: Tensor, lengths: Tensor) -> Tensor:
        return self.states(cells, lengths).amax(dim=1)


def inside(cells: Tensor, lengths: Tensor) -> Tensor:
    """Which cells hold a token, [B, L] bool."""
    return torch.arange(cells.shape[1], device=cells.device)[None] < lengths[:, None]
