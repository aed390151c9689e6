"""Token ids to the graph's inputs, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from regraft.engine.bundle import BundleInfo

Arrays = Sequence[np.ndarray]


def graph_inputs(info: BundleInfo, ids: Arrays, types: Arrays) -> dict[str, np.ndarray]:
    """Inputs of one run, as `BundleInfo` states them for its layout. B texts, T tokens, L the longest; all int64."""
    build = packed_inputs if info.layout == "packed" else padded_inputs
    return build(info, ids, types)


def packed_inputs(info: BundleInfo, ids: Arrays, types: Arrays) -> dict[str, np.ndarray]:
    """One row of real tokens. Shape: input_ids, position_ids, token_index [T]; pad_index [B, L]; lengths [B]."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    starts = np.cumsum(lengths) - lengths
    longest = int(lengths.max())
    within = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
    columns = np.arange(longest, dtype=np.int64)
    inputs = {
        "input_ids": np.concatenate(ids),
        "position_ids": within + info.position_offset,
        "pad_index": np.where(columns < lengths[:, None], starts[:, None] + columns, 0),
        "token_index": np.repeat(np.arange(len(ids), dtype=np.int64) * longest, lengths) + within,
        "lengths": lengths,
    }
    if info.token_types:
        inputs["token_type_ids"] = np.concatenate(types)
    return inputs


def padded_inputs(info: BundleInfo, ids: Arrays, types: Arrays) -> dict[str, np.ndarray]:
    """Rows filled up to the longest. Shape: input_ids, attention_mask [B, L]."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    real = np.arange(int(lengths.max())) < lengths[:, None]
    inputs = {
        "input_ids": np.full(real.shape, info.pad_token_id, dtype=np.int64),
        "attention_mask": real.astype(np.int64),
    }
    inputs["input_ids"][real] = np.concatenate(ids)
    if info.token_types:
        inputs["token_type_ids"] = np.zeros(real.shape, dtype=np.int64)
        inputs["token_type_ids"][real] = np.concatenate(types)
    return inputs
