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
    comes from torch's generator unless it is given. `lengths` on the host: only where the batch is not a graph's.
    """

    cu_seqlens: Tensor
    longest: int
    tokens: int
    seed: Tensor | None = None
    lengths: tuple[int, ...] = ()
    sites: int = field(default=0, init=False)
    halves: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, init=False)

    @classmethod
    def of(cls, batch: PackedBatch, longest: int | None = None, seed: Tensor | None = None) -> VarlenLayout:
        return cls(batch.cu_seqlens, longest or batch.max_seqlen, batch.tokens, seed, batch.lengths)

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

    def attend_rotary(
        self, qkv: Tensor, angles: tuple[Tensor, Tensor], *, scale: float, dropout_p: float, window: int | None
    ) -> Tensor:
        """Attention from one tensor [T, 3, H, D], with rotary positions of queries and keys put in as they are loaded.
        angles: cos, sin [1, T, D], of which the second half repeats the first."""
        return self._attend(qkv, scale, dropout_p, window, *self._halves(angles))

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        """Attention of one query a sequence: q [B, H, D], k, v [T, H, D] -> [B, H, D]."""
        seed, site = self.site(dropout_p)
        return first_rows_attention(
            q, k, v, self.cu_seqlens, self.longest, scale=scale, p=dropout_p, seed=seed, site=site
        )

    def means(self, hidden: Tensor) -> Tensor:
        """Mean of each sequence's rows: [T, H] -> [B, H]."""
        from regraft.kernels.pooling import segment_pool

        return segment_pool(hidden, self.cu_seqlens, "mean")

    def _halves(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # Every layer of a kind is given the same angles: half of them is cut out once a batch.
        for whole, cos, sin in self.halves:
            if whole is angles[0]:
                return cos, sin
        cos, sin = (x[0, :, : x.shape[-1] // 2].contiguous() for x in angles)
        self.halves.append((angles[0], cos, sin))
        return cos, sin

    def _attend(
        self,
        qkv: Tensor,
        scale: float,
        p: float,
        window: int | None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        seed, site = self.site(p)
        options = {"scale": scale, "p": p, "seed": seed, "site": site, "window": window, "cos": cos, "sin": sin}
        return varlen_attention(qkv.contiguous(), self.cu_seqlens, self.longest, **options)  # type: ignore[arg-type]
