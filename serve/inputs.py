"""Encoded texts to the graph's inputs, in numpy; and which texts go through the graph together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from regraft.engine.bundle import BundleInfo
from regraft.serve.tokens import Encoded


def graph_inputs(info: BundleInfo, items: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """Inputs of one run, as `BundleInfo` states them for its layout. B items, T tokens, L the longest; int64."""
    lengths = np.fromiter((item.tokens for item in items), dtype=np.int64, count=len(items))
    build = packed_inputs if info.layout == "packed" else padded_inputs
    return build(info, items, lengths)


def packed_inputs(info: BundleInfo, items: Sequence[Encoded], lengths: np.ndarray) -> dict[str, np.ndarray]:
    """One row of real tokens. Shape: input_ids, position_ids, token_index [T]; pad_index [B, L]; lengths [B]."""
    starts = np.cumsum(lengths) - lengths
    longest = int(lengths.max())
    within = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
    columns = np.arange(longest, dtype=np.int64)
    inputs = {
        "input_ids": np.concatenate([item.ids for item in items]),
        "position_ids": within + info.position_offset,
        "pad_index": np.where(columns < lengths[:, None], starts[:, None] + columns, 0),
        "token_index": np.repeat(np.arange(len(items), dtype=np.int64) * longest, lengths) + within,
        "lengths": lengths,
    }
    if info.token_types:
        inputs["token_type_ids"] = np.concatenate([item.types for item in items])
    return inputs


def padded_inputs(info: BundleInfo, items: Sequence[Encoded], lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Rows filled up to the longest. Shape: input_ids, attention_mask [B, L]."""
    real = np.arange(int(lengths.max())) < lengths[:, None]
    ids = np.full(real.shape, info.pad_token_id, dtype=np.int64)
    ids[real] = np.concatenate([item.ids for item in items])
    inputs = {"input_ids": ids, "attention_mask": real.astype(np.int64)}
    if info.token_types:
        types = np.zeros(real.shape, dtype=np.int64)
        types[real] = np.concatenate([item.types for item in items])
        inputs["token_type_ids"] = types
    return inputs


def like_lengths(lengths: np.ndarray, slack: int) -> list[np.ndarray]:
    """Indices of groups that run together: longest first, a new group where the empty cells exceed `slack`.

    A group of B items costs B * max(length) cells wherever the graph needs a rectangle; a run of its own costs
    about as much as `slack` empty cells. Shape: lengths [B] -> arrays that together hold each of 0..B-1 once.
    """
    order = np.argsort(-lengths, kind="stable")
    groups, start, empty = [], 0, 0
    for at, index in enumerate(order):
        empty += int(lengths[order[start]] - lengths[index])
        if empty > slack:
            groups.append(order[start:at])
            start, empty = at, 0
    groups.append(order[start:])
    return groups
