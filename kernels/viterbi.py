"""The best path of a linear-chain CRF, by numpy alone: servers decode with it, without torch.

    v_0 = start + e_0,   v_t[j] = max_i (v_{t-1}[i] + A[i, j]) + e_t[j],   score = max_j (v_last + end)[j]   (Viterbi 1967)

Shape: e [T, C] packed rows, A [C, C] from i to j. All sequences of a batch take each step together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.kernels.time_major import time_major


def viterbi(
    emissions: NDArray[Any],
    cu_seqlens: NDArray[Any],
    transitions: NDArray[Any],
    start: NDArray[Any],
    end: NDArray[Any],
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Best tags [T] and their scores [B]; of equally good paths, at each step the lower tag. -inf forbids.

    Shape: emissions [T, C], cu_seqlens [B + 1], transitions [C, C] (from, to), start [C], end [C]. An empty sequence
    scores 0. Raises ValueError, naming the argument, where shapes do not fit.
    """
    emissions = np.asarray(emissions)
    if emissions.ndim != 2 or emissions.shape[1] < 1:
        raise ValueError(f"emissions: shape is {list(emissions.shape)}, expected [rows, tags]")
    rows, tags = emissions.shape
    dtype = np.float64 if emissions.dtype == np.float64 else np.float32
    named = {"transitions": (transitions, (tags, tags)), "start": (start, (tags,)), "end": (end, (tags,))}
    for name, (value, shape) in named.items():
        if np.shape(value) != shape:
            raise ValueError(f"{name}: shape is {list(np.shape(value))}, expected {list(shape)}")
    order = time_major(cu_seqlens, rows)
    scores = np.zeros(len(cu_seqlens) - 1, dtype=dtype)
    path = np.empty(rows, dtype=np.int64)
    if not rows:
        return path, scores
    e = emissions.astype(dtype, copy=False)[order.rows]
    into = np.ascontiguousarray(np.asarray(transitions, dtype=dtype).T)  # [to, from]: the maximum runs along memory
    best = np.empty_like(e)
    came_from = np.zeros(e.shape, dtype=np.int64)
    n = order.sizes[0]
    best[:n] = e[:n] + np.asarray(start, dtype=dtype)
    for t in range(1, len(order.sizes)):
        size, here, before = order.sizes[t], order.offsets[t], order.offsets[t - 1]
        candidates = best[before : before + size, None, :] + into
        back = candidates.argmax(axis=2)
        came_from[here : here + size] = back
        top = np.take_along_axis(candidates, back[:, :, None], axis=2)[:, :, 0]
        np.add(top, e[here : here + size], out=best[here : here + size])

    final = best[order.last] + np.asarray(end, dtype=dtype)
    scores[order.sequences] = final.max(axis=1)
    tag = np.zeros(rows, dtype=np.int64)
    tag[order.last] = final.argmax(axis=1)
    for t in range(len(order.sizes) - 1, 0, -1):
        size, here, before = order.sizes[t], order.offsets[t], order.offsets[t - 1]
        of_here = slice(here, here + size)
        tag[before : before + size] = came_from[of_here][np.arange(size), tag[of_here]]
    path[order.rows] = tag
    return path, scores
