"""Counter-based dropout: one seed, one mask, in plain torch and in Triton; fair and independent decisions."""

from __future__ import annotations

import pytest
import torch

from checking import DEVICE, needs_triton
from regraft.kernels.lang import jit, tl
from regraft.kernels.philox import keep_mask, keep_tile, keep_tile_transposed, make_seed, philox, threshold_of


@jit
def _write_mask(seed_ptr, out_ptr, site, lane, threshold, R: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    seed = tl.load(seed_ptr)
    rows, columns, groups = tl.arange(0, R), tl.arange(0, C), tl.arange(0, C // 8)
    if TRANSPOSED:
        keep = keep_tile_transposed(seed, groups[:, None], rows[None, :], lane, site, threshold, C, R)
        tl.store(out_ptr + rows[None, :] * C + columns[:, None], keep.to(tl.int8))
    else:
        keep = keep_tile(seed, groups[None, :], rows[:, None], lane, site, threshold, R, C)
        tl.store(out_ptr + rows[:, None] * C + columns[None, :], keep.to(tl.int8))


def mask(seed: int, rows: int = 64, columns: int = 4096, p: float = 0.5, site: int = 0, lane: int = 0) -> torch.Tensor:
    return keep_mask(make_seed(seed, DEVICE), torch.arange(rows, device=DEVICE), columns, p, site=site, lane=lane)


def test_the_words_are_those_of_philox4x32_with_seven_rounds():
    # Random123's known answer for philox4x32-7: counter and key all zero, then all ones
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(w) for w in philox(zero, zero, zero, 0, 0)] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = zero - 1
    assert [int(w) for w in philox(ones, ones, ones, -1, -1)] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
def test_triton_and_plain_torch_draw_the_same_mask(transposed):
    seed = make_seed(int(torch.randint(1 << 62, (1,))), DEVICE)
    out = torch.empty(16, 64, dtype=torch.int8, device=DEVICE)
    _write_mask[(1,)](seed, out, 5, 3, threshold_of(0.3), 16, 64, transposed)
    wanted = keep_mask(seed, torch.arange(16, device=DEVICE), 64, 0.3, site=5, lane=3)
    assert torch.equal(out.bool(), wanted)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_of_kept_values_is_one_minus_p(p):
    kept = mask(int(torch.randint(1 << 62, (1,))), p=p).double()
    assert abs(float(kept.mean()) - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5 + 1 / 65536


def test_neighbours_in_every_direction_are_independent():
    seed = int(torch.randint(1 << 62, (1,)))
    here = mask(seed).float() - 0.5
    for lag in range(1, 17):
        assert abs(float((here[:, lag:] * here[:, :-lag]).mean())) < 0.003
    assert abs(float((here[1:] * here[:-1]).mean())) < 0.003
    for other in (mask(seed + 1), mask(seed, site=1), mask(seed, lane=1)):
        assert abs(float((here * (other.float() - 0.5)).mean())) < 0.003


def test_a_seed_beyond_32_bits_counts_in_full():
    assert not torch.equal(mask(1), mask(1 + (1 << 40)))
    assert torch.equal(mask(7), mask(7))


def test_a_probability_of_one_is_refused():
    with pytest.raises(ValueError, match=r"is 1.0, expected in \[0, 0.999992\)"):
        threshold_of(1.0)
