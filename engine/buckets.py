"""Batches of few shapes: filled up to a bucket by dummy sequences, so that a captured graph can be replayed.

A dummy sequence is made of pad tokens and attends to itself alone; its weight in the loss is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.engine.packing import PackedBatch

STEPS = 8  # buckets an octave: a batch is filled up by an eighth at most, a sixteenth on average
SMALLEST_TOKENS = 128
SMALLEST_SEQUENCES = 8


@dataclass(frozen=True)
class Bucket:
    """The shape of a batch: `tokens` and `sequences` exactly, none longer than `longest`."""

    tokens: int
    sequences: int
    longest: int


def round_up(n: int, smallest: int) -> int:
    """The next size of a bucket: one of STEPS an octave, at least `smallest`."""
    step = max(1, (1 << (max(n, smallest) - 1).bit_length()) // (2 * STEPS))
    return max(smallest, -(-n // step) * step)


def bucket_of(batch: PackedBatch) -> Bucket:
    """The smallest bucket that takes the batch, at least one dummy sequence, and no dummy longer than its longest."""
    sequences = round_up(batch.sequences + 1, SMALLEST_SEQUENCES)
    while True:
        dummies = sequences - batch.sequences
        tokens = round_up(batch.tokens + dummies, SMALLEST_TOKENS)
        if tokens - batch.tokens <= dummies * batch.max_seqlen:
            return Bucket(tokens, sequences, max(32, 1 << (batch.max_seqlen - 1).bit_length()))
        sequences = round_up(sequences + 1, SMALLEST_SEQUENCES)


def fill_up(batch: PackedBatch, bucket: Bucket, pad_token_id: int) -> PackedBatch:
    """The batch (on the host) with dummy sequences behind it, of the bucket's shape; real tokens keep their rows."""
    dummies = bucket.sequences - batch.sequences
    spare = bucket.tokens - batch.tokens
    short, more = divmod(spare, dummies)
    lengths = [short + (i < more) for i in range(dummies)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32) + batch.tokens
    types = batch.token_type_ids
    return PackedBatch(
        input_ids=torch.cat([batch.input_ids, torch.full((spare,), pad_token_id, dtype=torch.int64)]),
        position_ids=torch.cat([batch.position_ids, positions]),
        cu_seqlens=torch.cat([batch.cu_seqlens, ends]),
        lengths=(*batch.lengths, *lengths),
        token_type_ids=None if types is None else torch.cat([types, torch.zeros(spare, dtype=torch.int64)]),
    )


def fill_rows(rows: Tensor, count: int) -> Tensor:
    """Rows of zeros behind `rows` [B, ..], [count, ..] in all: the dummies' targets and weights."""
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])
