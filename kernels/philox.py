"""Dropout masks from a counter: the same seed, site and place give the same decision, so a backward makes the mask again.

    Philox4x32 with 7 rounds, counter (column // 8, row, lane, site), key = seed        (Salmon et al. 2011)

Each call gives 128 bits: eight decisions of 16 bits for eight neighbouring columns, so p is met to 1/65536, and the
scale is that of the p met. About 70 integer operations a call, 9 a decision; no byte is moved. `seed` is one int64 on
the device: a captured graph that is replayed with another seed in the same place draws other masks.

`site` tells apart the places of a model that draw at the same rows and columns (layer and position in it); `lane` the
heads of an attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.kernels.checks import expect, expect_range
from regraft.kernels.dropout import BELOW, LEVELS, scale_of
from regraft.kernels.lang import jit, tl

ROUNDS = 7
_MASK = 0xFFFFFFFF
_A, _B, _KEY_A, _KEY_B = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85


def threshold_of(p: float) -> int:
    """A 16-bit draw below this drops. 0 means no dropout at all. Raises ValueError for p outside [0, 1)."""
    expect_range("dropout p", p, 0, BELOW)
    return round(p * LEVELS)


def make_seed(value: int, device: torch.device | str = "cpu") -> Tensor:
    """The seed tensor [1] int64 that kernels take."""
    return torch.tensor([value & ((1 << 63) - 1)], dtype=torch.int64, device=device)


def resolve_seed(seed: Tensor | None, p: float, device: torch.device) -> Tensor | None:
    """The seed a kernel takes: None where p drops nothing; drawn from torch's generator of the device where none is given.

    Raises ValueError for p outside [0, 1) and for a seed that is not one int64 on `device`.
    """
    if not threshold_of(p):
        return None
    if seed is None:
        return torch.randint((1 << 63) - 1, (1,), dtype=torch.int64, device=device)
    expect("seed", seed, shape=(1,), dtype=torch.int64)
    if seed.device != device:
        raise ValueError(f"seed: is on {seed.device}, expected {device}")
    return seed


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor | int, c3: Tensor | int) -> tuple[Tensor, ...]:
    """Four words of 32 random bits a counter, in int64. Shape: counters broadcast together; seed [1] int64."""
    counters = torch.broadcast_tensors(c0, c1, *(torch.as_tensor(c, device=c0.device) for c in (c2, c3)))
    a0, a1, a2, a3 = (c.long() & _MASK for c in counters)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        a, b = _A * a0, _B * a2  # wraps at 64 bits, which leaves both halves right
        a0, a1, a2, a3 = ((b >> 32) & _MASK) ^ a1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ a3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return a0, a1, a2, a3


def keep_mask(seed: Tensor, rows: Tensor, columns: int, p: float, *, site: int, lane: Tensor | int = 0) -> Tensor:
    """Reference. Bool [..., columns], true where a value is kept. Shape: rows [...] integer; lane broadcasts with it."""
    groups = torch.arange(-(-columns // 8), device=rows.device)
    lanes = lane[..., None] if isinstance(lane, Tensor) else lane
    words = philox(seed, groups, rows[..., None], lanes, site)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (halves >= threshold_of(p)).flatten(-2)[..., :columns]


@jit
def keep_tile(seed, group, row, lane, site, threshold, R: tl.constexpr, C: tl.constexpr):
    """Triton. Bool [R, C] for columns in whole groups of eight: group [1, C // 8] int32, row [R, 1] int32."""
    zero = row * 0 + group * 0
    a, b, c, d = tl.philox(seed, zero + group, zero + row, zero + lane, zero + site, 7)
    even = tl.join(tl.join(a & 0xFFFF, c & 0xFFFF), tl.join(b & 0xFFFF, d & 0xFFFF))
    odd = tl.join(tl.join(a >> 16, c >> 16), tl.join(b >> 16, d >> 16))
    return tl.reshape(tl.join(even, odd), [R, C]).to(tl.int32) >= threshold


@jit
def keep_tile_transposed(seed, group, row, lane, site, threshold, C: tl.constexpr, R: tl.constexpr):
    """Triton. The transpose of `keep_tile`, [C, R]: group [C // 8, 1] int32, row [1, R] int32."""
    zero = row * 0 + group * 0
    a, b, c, d = tl.philox(seed, zero + group, zero + row, zero + lane, zero + site, 7)
    even = tl.join(tl.join(a & 0xFFFF, c & 0xFFFF), tl.join(b & 0xFFFF, d & 0xFFFF))
    odd = tl.join(tl.join(a >> 16, c >> 16), tl.join(b >> 16, d >> 16))
    bits = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))
    return tl.reshape(bits, [C, R]).to(tl.int32) >= threshold


__all__ = [
    "LEVELS",
    "keep_mask",
    "keep_tile",
    "keep_tile_transposed",
    "make_seed",
    "philox",
    "scale_of",
    "threshold_of",
]
