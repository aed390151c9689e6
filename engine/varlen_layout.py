"""How a packed batch is attended on a GPU: by `cu_seqlens` alone, without looking at a length on the host."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft.engine.packing import PackedBatch
from regraft.kernels.varlen import first_rows_attention, varlen_attention


@dataclass
class VarlenLayout:
    """`Layout` for kernels that take `cu_seqlens` [B + 1]. Sequences have at most `longest` tokens, `tokens` in all.

    Every call to `site` in a forward numbers one more place that draws dropout; all draw from one seed [1] int64, which
    comes from torch's generator unless it is given.
    """

    cu_seqlens: Tensor
    longest: int
    tokens: int
    seed: Tensor | None = None
    sites: int = field(default=0, init=False)

    @classmethod
    def of(cls, batch: PackedBatch, longest: int | None = None, seed: Tensor | None = None) -> VarlenLayout:
        return cls(batch.cu_seqlens, longest or batch.max_seqlen, batch.tokens, seed)

    @property
    def starts(self) -> Tensor:
        """Row of each sequence's first token, [B] int64."""
        return self.cu_seqlens[:-1].long()

    def site(self, p: float) -> tuple[Tensor | None, int]:
        """Seed and number of the next place that drops with probability p."""
        if p and self.seed is None:
            self.seed = torch.randint((1 << 63) - 1, (1,), dtype=torch.int64, device=self.cu_seqlens.device)
        self.sites += 1
        return (self.seed if p else None), self.sites

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float, window: int | None) -> Tensor:
        """Attention within each sequence, [T, H, D] each."""
        return self._attend(torch.stack((q, k, v), dim=1), scale, dropout_p, window)

    def attend_merged(self, qkv: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        """The same from one tensor [T, 3, H, D], as a merged projection gives it."""
        return self._attend(qkv, scale, dropout_p, None)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        """Attention of one query a sequence: q [B, H, D], k, v [T, H, D] -> [B, H, D]."""
        seed, site = self.site(dropout_p)
        options = {"scale": scale, "p": dropout_p, "seed": seed, "site": site}
        return first_rows_attention(q, k, v, self.cu_seqlens, self.longest, **options)

    def means(self, hidden: Tensor) -> Tensor:
        """Mean of each sequence's rows: [T, H] -> [B, H]."""
        from regraft.kernels.pooling import segment_pool

        return segment_pool(hidden, self.cu_seqlens, "mean")

    def _attend(self, qkv: Tensor, scale: float, p: float, window: int | None) -> Tensor:
        seed, site = self.site(p)
        options = {"scale": scale, "p": p, "seed": seed, "site": site, "window": window}
        return varlen_attention(qkv.contiguous(), self.cu_seqlens, self.longest, **options)
