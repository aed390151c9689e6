"""Several sequences as one row of real tokens: no pad token exists from here to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """B sequences, T tokens in all.

    Shape: input_ids [T] int64, position_ids [T] int64 (each sequence from `position_offset`), cu_seqlens [B + 1]
    int32 (cu_seqlens[i] is where sequence i starts), token_type_ids [T] int64 or None. `lengths` is the same as
    cu_seqlens on the host, so that nothing has to ask the device. `marks` [M] int64: rows of the tokens whose logits
    are wanted, for a head that reads only those.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    token_type_ids: Tensor | None = None
    marks: Tensor | None = None

    def __post_init__(self) -> None:
        tokens = sum(self.lengths)
        if self.input_ids.shape != (tokens,) or self.position_ids.shape != (tokens,):
            raise ValueError(f"lengths sum to {tokens}, input_ids have {tuple(self.input_ids.shape)}")
        if self.cu_seqlens.shape != (len(self.lengths) + 1,):
            raise ValueError(f"{len(self.lengths)} sequences, cu_seqlens have {tuple(self.cu_seqlens.shape)}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError("a packed batch holds at least one sequence, and each at least one token")

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    def to(self, device: torch.device | str) -> PackedBatch:
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        types = None if self.token_type_ids is None else move(self.token_type_ids)
        marks = None if self.marks is None else move(self.marks)
        return PackedBatch(
            move(self.input_ids),
            move(self.position_ids),
            move(self.cu_seqlens),
            self.lengths,
            types,
            marks,
        )


def pack(
    sequences: Sequence[np.ndarray],
    *,
    position_offset: int = 0,
    token_types: Sequence[np.ndarray] | None = None,
    marks: np.ndarray | None = None,
) -> PackedBatch:
    """Pack token id arrays into one batch. `position_offset`: 0, or padding_idx + 1 for the RoBERTa family.
    `marks` [M]: rows whose logits are wanted."""
    lengths = np.fromiter((len(s) for s in sequences), dtype=np.int64, count=len(sequences))
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    starts = np.repeat(cu_seqlens[:-1].astype(np.int64), lengths)
    positions = np.arange(int(cu_seqlens[-1]), dtype=np.int64) - starts + position_offset
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(sequences).astype(np.int64)),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths=tuple(int(n) for n in lengths),
        token_type_ids=None if token_types is None else torch.from_numpy(np.concatenate(token_types).astype(np.int64)),
        marks=None if marks is None else torch.from_numpy(marks.astype(np.int64)),
    )


def split_by_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of micro-batches, in order, each of at most `budget` tokens (a longer single sequence stands alone)."""
    part: list[int] = []
    total = 0
    for index, length in enumerate(lengths):
        if part and total + length > budget:
            yield part
            part, total = [], 0
        part.append(index)
        total += length
    if part:
        yield part
