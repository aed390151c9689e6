"""The Triton kernels of variable-length attention: one forward, and a backward in two parts without atomics.

A program takes one block of one head of one sequence and visits only blocks of its own sequence, within the window.
`_backward_queries` recomputes the scores by rows and writes dq (and, on its way, sum(dout * out) of each row);
`_backward_keys` recomputes them transposed, by columns, and writes dk and dv. So every value is summed by one program
in one order. Seven matrix products instead of five are the price.

With ROTARY, queries and keys are held as two halves, rotated when they are loaded; their gradients are turned back
before they are stored. Softmax in base 2: factor = scale * log2(e).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regraft.kernels.lang import IS_INTERPRETED, dot, jit, load_as, next_power_of_2, round_to, store, tl
from regraft.kernels.philox import keep_tile, keep_tile_transposed
from regraft.kernels.shipped import TARGETS, Shipped

# Far below any score; finite, so that a row whose block is masked in full gives 0 and not NaN.
LOW = tl.constexpr(-1.0e30) if tl is not None else -1.0e30


@dataclass(frozen=True)
class Blocks:
    """Rows (queries) and columns (keys) of a block, and how it is run."""

    m: int
    n: int
    warps: int
    stages: int


def blocks_for(head_size: int, longest: int, itemsize: int, part: str, target: int, drop: bool, rotary: bool) -> Blocks:
    """Block of `part` ('forward', 'queries', 'keys') for sequences of at most `longest` tokens on sm_`target`."""
    if itemsize > 2:
        if IS_INTERPRETED:
            return Blocks(64, 64, 4, 1)
        # no tensor cores: a thread sums whole products in registers, which larger blocks would spill
        if part == "keys" and target < 90:
            return Blocks(16, 16, 4, 2)
        if part == "queries" and head_size > 64:
            return Blocks(16, 16, 8, 2)
        return Blocks(16, 32, 8, 2) if head_size > 64 or part == "keys" else Blocks(32, 32, 4, 2)
    if longest <= 32:
        return Blocks(32, 32, 4, 2)
    if IS_INTERPRETED:
        return Blocks(64, 64, 4, 2) if longest <= 256 else Blocks(256, 256, 4, 2)
    if target < 90:  # no products from shared memory: smaller blocks, or registers run out
        if part == "keys":
            return Blocks(16 if rotary else 32, 64, 8, 2)
        return Blocks(64, 32, 8 if part == "queries" and rotary and drop else 4, 2)
    if longest <= 64:
        return Blocks(64, 64, 4 if head_size <= 64 else 8, 2)
    if part == "forward":
        return Blocks(128, 64, 8, 2) if head_size > 64 else Blocks(128, 64, 8 if drop else 4, 3)
    if head_size > 64:
        return Blocks(64, 64, 8, 2)
    if part == "queries":
        return Blocks(128, 64, 8, 2)
    return Blocks(64, 64 if rotary and drop else 128, 8, 2)


@jit
def _columns(inside, column, LIMIT: tl.constexpr, WIDTH: tl.constexpr):
    # [rows, WIDTH]; no test of the columns where none is padding
    if LIMIT == WIDTH:
        here = inside[:, None]
    else:
        here = inside[:, None] & (column < LIMIT)[None, :]
    return here


@jit
def _load(pointer, row, inside, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    return tl.load(
        pointer + row[:, None] * STRIDE + column[None, :], mask=_columns(inside, column, D, WIDTH), other=0.0
    )


@jit
def _load_rotated(
    pointer, cos_ptr, sin_ptr, row, inside, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROTARY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Rows as they are (twice the same), or as two halves rotated.
    if ROTARY:
        HALF: tl.constexpr = D // 2
        column = tl.arange(0, WIDTH)
        here = _columns(inside, column, HALF, WIDTH)
        at = row[:, None] * STRIDE + column[None, :]
        a = load_as(pointer + at, here, ACC)
        b = load_as(pointer + at + HALF, here, ACC)
        angle = row[:, None] * HALF + column[None, :]
        cos = load_as(cos_ptr + angle, here, ACC)
        sin = load_as(sin_ptr + angle, here, ACC)
        KIND: tl.constexpr = pointer.dtype.element_ty
        x = round_to(a * cos - b * sin, KIND)
        y = round_to(b * cos + a * sin, KIND)
    else:
        x = _load(pointer, row, inside, STRIDE, D, WIDTH)
        y = x
    return x, y


@jit
def _store_unrotated(
    pointer, cos_ptr, sin_ptr, row, inside, x, y, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROTARY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    at = row[:, None] * STRIDE + column[None, :]
    if ROTARY:
        HALF: tl.constexpr = D // 2
        here = _columns(inside, column, HALF, WIDTH)
        angle = row[:, None] * HALF + column[None, :]
        cos = load_as(cos_ptr + angle, here, ACC)
        sin = load_as(sin_ptr + angle, here, ACC)
        store(pointer + at, x * cos + y * sin, here)
        store(pointer + at + HALF, y * cos - x * sin, here)
    else:
        store(pointer + at, x, _columns(inside, column, D, WIDTH))


@jit
def _products(a, b, c, d, ROTARY: tl.constexpr, ACC: tl.constexpr):
    # a c^T, or over both halves a c^T + b d^T
    s = dot(a, tl.trans(c), ACC)
    if ROTARY:
        s += dot(b, tl.trans(d), ACC)
    return s


@jit
def _place(cu_ptr, blocks, H: tl.constexpr):
    # block, head, first token and length of this program's sequence
    program = tl.program_id(0)
    rest = program // blocks
    sequence = rest // H
    start = tl.load(cu_ptr + sequence)
    return program % blocks, rest % H, start, tl.load(cu_ptr + sequence + 1) - start


@jit
def _forward_blocks(
    acc, total, top, qa, qb, k_ptr, v_ptr, cos_ptr, sin_ptr, low, high, length, m, start, head, window, factor, seed,
    site, threshold, MASKED: tl.constexpr, WINDOW: tl.constexpr, DROP: tl.constexpr, ROTARY: tl.constexpr,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    for n0 in range(low, high, N):
        n = n0 + tl.arange(0, N)
        if MASKED:
            inside = n < length
        else:
            inside = tl.full([N], 1, tl.int1)
        ka, kb = _load_rotated(k_ptr, cos_ptr, sin_ptr, n, inside, STRIDE, D, PART, ROTARY, ACC)
        s = _products(qa, qb, ka, kb, ROTARY, ACC) * factor
        if MASKED:
            s = tl.where(inside[None, :], s, LOW)
        if WINDOW:
            s = tl.where((m[:, None] - n[None, :] <= window) & (n[None, :] - m[:, None] <= window), s, LOW)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        if DROP:
            group = n0 // 8 + tl.arange(0, N // 8)
            p = tl.where(keep_tile(seed, group[None, :], (start + m)[:, None], head, site, threshold, M, N), p, 0.0)
        v = _load(v_ptr, n, inside, STRIDE, D, WIDTH)
        acc = acc * shrink[:, None] + dot(round_to(p, v_ptr.dtype.element_ty), v, ACC)
        top = new
    return acc, total, top


@jit
def forward_kernel(
    qkv_ptr, cu_ptr, cos_ptr, sin_ptr, seed_ptr, out_ptr, lse_ptr, blocks, tokens, window, factor, drop_scale,
    threshold, site, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, WINDOW: tl.constexpr, DROP: tl.constexpr, ROTARY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block, head, start, length = _place(cu_ptr, blocks, H)
    m0 = block * M
    if m0 >= length:
        return
    STRIDE: tl.constexpr = 3 * H * D
    first = start.to(tl.int64)
    q_ptr = qkv_ptr + first * STRIDE + head * D
    k_ptr = q_ptr + H * D
    v_ptr = k_ptr + H * D
    if ROTARY:
        cos_ptr += first * (D // 2)
        sin_ptr += first * (D // 2)
    seed = 0
    if DROP:
        seed = tl.load(seed_ptr)
    m = m0 + tl.arange(0, M)
    qa, qb = _load_rotated(q_ptr, cos_ptr, sin_ptr, m, m < length, STRIDE, D, PART, ROTARY, ACC)
    acc = tl.zeros([M, WIDTH], dtype=ACC)
    total = tl.zeros([M], dtype=ACC)
    top = tl.full([M], -float("inf"), dtype=ACC)
    low = 0
    high = length
    full = length // N * N
    if WINDOW:
        low = tl.maximum(m0 - window, 0) // N * N
        high = tl.minimum(length, m0 + M + window)
        full = low  # within a window every block is tested
    acc, total, top = _forward_blocks(
        acc, total, top, qa, qb, k_ptr, v_ptr, cos_ptr, sin_ptr, low, full, length, m, start, head, window, factor,
        seed, site, threshold, False, WINDOW, DROP, ROTARY, STRIDE, D, WIDTH, PART, M, N, ACC,
    )  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, qa, qb, k_ptr, v_ptr, cos_ptr, sin_ptr, full, high, length, m, start, head, window, factor,
        seed, site, threshold, True, WINDOW, DROP, ROTARY, STRIDE, D, WIDTH, PART, M, N, ACC,
    )  # fmt: skip
    out = acc * (drop_scale / total)[:, None]
    column = tl.arange(0, WIDTH)
    here = _columns(m < length, column, D, WIDTH)
    store(out_ptr + first * (H * D) + head * D + m[:, None] * (H * D) + column[None, :], out, here)
    lse_at = head.to(tl.int64) * tokens + first + m
    tl.store(lse_ptr + lse_at, top + tl.log2(total), mask=m < length)


@jit
def backward_queries_kernel(
    dout_ptr, out_ptr, qkv_ptr, cu_ptr, cos_ptr, sin_ptr, seed_ptr, lse_ptr, delta_ptr, dqkv_ptr, blocks, tokens,
    window, factor, scale, drop_scale, threshold, site, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, DROP: tl.constexpr,
    ROTARY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block, head, start, length = _place(cu_ptr, blocks, H)
    m0 = block * M
    if m0 >= length:
        return
    STRIDE: tl.constexpr = 3 * H * D
    KIND: tl.constexpr = qkv_ptr.dtype.element_ty
    first = start.to(tl.int64)
    own = first * STRIDE + head * D
    k_ptr = qkv_ptr + own + H * D
    v_ptr = k_ptr + H * D
    if ROTARY:
        cos_ptr += first * (D // 2)
        sin_ptr += first * (D // 2)
    seed = 0
    if DROP:
        seed = tl.load(seed_ptr)
    m = m0 + tl.arange(0, M)
    inside_m = m < length
    qa, qb = _load_rotated(qkv_ptr + own, cos_ptr, sin_ptr, m, inside_m, STRIDE, D, PART, ROTARY, ACC)
    dout = _load(dout_ptr + first * (H * D) + head * D, m, inside_m, H * D, D, WIDTH)
    out = _load(out_ptr + first * (H * D) + head * D, m, inside_m, H * D, D, WIDTH)
    at = head.to(tl.int64) * tokens + first + m
    delta = tl.sum(dout.to(ACC) * out.to(ACC), 1)
    tl.store(delta_ptr + at, delta, mask=inside_m)
    lse = tl.load(lse_ptr + at, mask=inside_m, other=0.0)
    dqa = tl.zeros([M, PART], dtype=ACC)
    dqb = dqa
    low = 0
    high = length
    if WINDOW:
        low = tl.maximum(m0 - window, 0) // N * N
        high = tl.minimum(length, m0 + M + window)
    for n0 in range(low, high, N):
        n = n0 + tl.arange(0, N)
        inside = n < length
        ka, kb = _load_rotated(k_ptr, cos_ptr, sin_ptr, n, inside, STRIDE, D, PART, ROTARY, ACC)
        v = _load(v_ptr, n, inside, STRIDE, D, WIDTH)
        # A column beyond the sequence has a score of 0: far above a row's own where these are all very negative.
        s = tl.where(inside[None, :], _products(qa, qb, ka, kb, ROTARY, ACC) * factor, LOW)
        p = tl.exp2(s - lse[:, None])
        if WINDOW:
            p = tl.where((m[:, None] - n[None, :] <= window) & (n[None, :] - m[:, None] <= window), p, 0.0)
        dp = dot(dout, tl.trans(v), ACC)
        if DROP:
            group = n0 // 8 + tl.arange(0, N // 8)
            keep = keep_tile(seed, group[None, :], (start + m)[:, None], head, site, threshold, M, N)
            dp = tl.where(keep, dp * drop_scale, 0.0)
        ds = round_to(p * (dp - delta[:, None]), KIND)
        dqa += dot(ds, ka, ACC)
        if ROTARY:
            dqb += dot(ds, kb, ACC)
    _store_unrotated(
        dqkv_ptr + own, cos_ptr, sin_ptr, m, inside_m, dqa * scale, dqb * scale, STRIDE, D, PART, ROTARY, ACC
    )


@jit
def backward_keys_kernel(
    dout_ptr, qkv_ptr, cu_ptr, cos_ptr, sin_ptr, seed_ptr, lse_ptr, delta_ptr, dqkv_ptr, blocks, tokens, window, factor,
    scale, drop_scale, threshold, site, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, DROP: tl.constexpr, ROTARY: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    block, head, start, length = _place(cu_ptr, blocks, H)
    n0 = block * N
    if n0 >= length:
        return
    STRIDE: tl.constexpr = 3 * H * D
    KIND: tl.constexpr = qkv_ptr.dtype.element_ty
    first = start.to(tl.int64)
    own = first * STRIDE + head * D
    dout_ptr += first * (H * D) + head * D
    if ROTARY:
        cos_ptr += first * (D // 2)
        sin_ptr += first * (D // 2)
    seed = 0
    if DROP:
        seed = tl.load(seed_ptr)
    n = n0 + tl.arange(0, N)
    inside_n = n < length
    ka, kb = _load_rotated(qkv_ptr + own + H * D, cos_ptr, sin_ptr, n, inside_n, STRIDE, D, PART, ROTARY, ACC)
    v = _load(qkv_ptr + own + 2 * H * D, n, inside_n, STRIDE, D, WIDTH)
    dka = tl.zeros([N, PART], dtype=ACC)
    dkb = dka
    dv = tl.zeros([N, WIDTH], dtype=ACC)
    low = 0
    high = length
    if WINDOW:
        low = tl.maximum(n0 - window, 0) // M * M
        high = tl.minimum(length, n0 + N + window)
    for m0 in range(low, high, M):
        m = m0 + tl.arange(0, M)
        inside = m < length
        at = head.to(tl.int64) * tokens + first + m
        lse = tl.load(lse_ptr + at, mask=inside, other=1.0e30)  # a row beyond the sequence attends to nothing
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        qa, qb = _load_rotated(qkv_ptr + own, cos_ptr, sin_ptr, m, inside, STRIDE, D, PART, ROTARY, ACC)
        dout = _load(dout_ptr, m, inside, H * D, D, WIDTH)
        # a column beyond the sequence may overflow: its own row of dk and dv alone, which is not stored
        p = tl.exp2(_products(ka, kb, qa, qb, ROTARY, ACC) * factor - lse[None, :])
        if WINDOW:
            p = tl.where((m[None, :] - n[:, None] <= window) & (n[:, None] - m[None, :] <= window), p, 0.0)
        dp = dot(v, tl.trans(dout), ACC)
        if DROP:
            group = n0 // 8 + tl.arange(0, N // 8)
            keep = keep_tile_transposed(seed, group[:, None], (start + m)[None, :], head, site, threshold, N, M)
            dv += dot(round_to(tl.where(keep, p * drop_scale, 0.0), KIND), dout, ACC)
            dp = tl.where(keep, dp * drop_scale, 0.0)
        else:
            dv += dot(round_to(p, KIND), dout, ACC)
        ds = round_to(p * (dp - delta[None, :]), KIND)
        dka += dot(ds, qa, ACC)
        if ROTARY:
            dkb += dot(ds, qb, ACC)
    into = dqkv_ptr + own + H * D
    _store_unrotated(into, cos_ptr, sin_ptr, n, inside_n, dka * scale, dkb * scale, STRIDE, D, PART, ROTARY, ACC)
    column = tl.arange(0, WIDTH)
    store(into + H * D + n[:, None] * STRIDE + column[None, :], dv, _columns(inside_n, column, D, WIDTH))


KERNELS = {"forward": forward_kernel, "queries": backward_queries_kernel, "keys": backward_keys_kernel}


def widths(head_size: int, rotary: bool) -> tuple[int, int]:
    """Columns that a block of values takes, and a block (rotary: half a block) of queries or keys; a product takes 16."""
    half = head_size // 2 if rotary else head_size
    return max(16, next_power_of_2(head_size)), max(16, next_power_of_2(half))


def shipped() -> list[Shipped]:
    """Head sizes 32, 64, 96, 128 in bf16 for long and short sequences, with dropout; at 64 without, and rotary, with and
    without a window, as layers of ModernBERT alternate. In fp32, in which what is bound on a model is proven: head sizes 64
    and 128, and 26, which is no power of 2."""
    # name, values, head size, longest, dropout, rotary, window
    cases: list[tuple] = [("64 short", "bf16", 64, 60, True, False, False)]
    cases += [(f"{size} long", "bf16", size, 512, True, False, False) for size in (32, 64, 96, 128)]
    cases += [("64 long no dropout", "bf16", 64, 512, False, False, False)]
    for name, drop, window in (
        ("rotary", False, False),
        ("rotary dropout", True, False),
        ("window rotary", False, True),
        ("window rotary dropout", True, True),
    ):
        cases += [(f"64 {name}", "bf16", 64, 1024, drop, True, window)]
    cases += [(f"{size} fp32", "fp32", size, 512, size == 64, False, False) for size in (26, 64, 128)]
    cases += [("64 window rotary fp32", "fp32", 64, 512, False, True, True)]
    numbers = {"blocks": "i32", "tokens": "i32", "window": "i32", "factor": "fp32", "scale": "fp32"}
    numbers |= {"drop_scale": "fp32", "threshold": "i32", "site": "i32"}
    found = []
    for name, kind, size, longest, drop, rotary, window in cases:
        pointers = dict.fromkeys(("dout_ptr", "out_ptr", "qkv_ptr", "dqkv_ptr"), f"*{kind}")
        pointers |= {"cu_ptr": "*i32", "seed_ptr": "*i64"}
        pointers |= dict.fromkeys(("lse_ptr", "delta_ptr", "cos_ptr", "sin_ptr"), "*fp32")
        width, part = widths(size, rotary)
        flags: dict[str, Any] = {
            "H": 12,
            "D": size,
            "WIDTH": width,
            "PART": part,
            "WINDOW": window,
            "DROP": drop,
            "ROTARY": rotary,
        }
        flags |= {"ACC": tl.float32, **({} if rotary else {"cos_ptr": None, "sin_ptr": None})}
        flags |= {} if drop else {"seed_ptr": None}
        for word, kernel in KERNELS.items():
            for target in TARGETS:
                b = blocks_for(size, longest, 4 if kind == "fp32" else 2, word, target, drop, rotary)
                options = {"num_warps": b.warps, "num_stages": b.stages, "targets": (target,)}
                blocks = {**flags, "M": b.m, "N": b.n}
                full = size == width  # other rows do not begin at multiples of 16 bytes
                made = Shipped.of(
                    f"varlen {word} {name}", kernel, pointers | numbers, blocks, wide_loads=full, **options
                )
                found.append(made)
    return found
