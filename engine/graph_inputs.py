"""Encoded texts as the arrays that a bundle's graph takes; numpy alone, for the exporter's checks and the server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regraft.engine.bundle import BundleInfo


def graph_inputs(
    info: BundleInfo,
    ids: Sequence[np.ndarray],
    types: Sequence[np.ndarray] | None = None,
    marks: Sequence[np.ndarray] | None = None,
    adapters: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Inputs for B sequences of token ids, as `BundleInfo` documents them; all int64. `marks`: places in each sequence
    whose logits are wanted, for a head that reads marked tokens. `adapters` [B]: places in `BundleInfo.adapters`."""
    build = packed_inputs if info.layout == "packed" else padded_inputs
    if info.prompt:
        ids, types, marks = _after_prompt(info, ids, types, marks)
    inputs = build(info, ids, types)
    if info.reads == "marked" and info.layout == "packed":
        inputs["marks"] = _rows_of_marks(ids, marks or [])
    if info.adapters:
        inputs["adapter"] = np.zeros(len(ids), dtype=np.int64) if adapters is None else adapters.astype(np.int64)
    return inputs


def _after_prompt(
    info: BundleInfo,
    ids: Sequence[np.ndarray],
    types: Sequence[np.ndarray] | None,
    marks: Sequence[np.ndarray] | None,
) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray] | None, Sequence[np.ndarray] | None]:
    first, count = info.prompt
    prompt, nothing = np.arange(first, first + count), np.zeros(count, dtype=np.int64)
    return (
        [np.concatenate((prompt, x)) for x in ids],
        None if types is None else [np.concatenate((nothing, x)) for x in types],
        None if marks is None else [np.asarray(m) + count for m in marks],
    )


def _rows_of_marks(ids: Sequence[np.ndarray], marks: Sequence[np.ndarray]) -> np.ndarray:
    starts = np.cumsum([0, *map(len, ids)])[:-1]
    return np.concatenate([start + np.asarray(m, dtype=np.int64) for start, m in zip(starts, marks, strict=True)])


def graph_outputs(
    info: BundleInfo, logits: np.ndarray, ids: Sequence[np.ndarray], marks: Sequence[np.ndarray] | None = None
) -> Sequence[np.ndarray]:
    """What the graph gave for each sequence: [B, C], or for a head that reads tokens one array [L, C] a sequence."""
    before = info.prompt[1] if info.prompt else 0
    if info.reads == "first":
        return list(logits)
    if info.layout == "padded":
        each = [row[before : before + len(x)] for row, x in zip(logits, ids, strict=True)]
        return each if info.reads == "tokens" else [row[m] for row, m in zip(each, marks or [], strict=True)]
    if info.reads == "marked":
        return np.split(logits, np.cumsum([len(m) for m in marks or []])[:-1])
    return [rows[before:] for rows in np.split(logits, np.cumsum([before + len(x) for x in ids])[:-1])]


def packed_inputs(
    info: BundleInfo, ids: Sequence[np.ndarray], types: Sequence[np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """`input_ids`, `position_ids` [T], `pad_index` [B, L], `token_index` [T], `lengths` [B]."""
    lengths = np.fromiter((len(x) for x in ids), dtype=np.int64, count=len(ids))
    starts = np.cumsum(lengths) - lengths
    cells = np.arange(lengths.max(), dtype=np.int64)
    inside = cells[None, :] < lengths[:, None]
    inputs = {
        "input_ids": np.concatenate(ids).astype(np.int64),
        "position_ids": np.broadcast_to(cells + info.position_offset, inside.shape)[inside],
        "pad_index": np.where(inside, starts[:, None] + cells[None, :], 0),
        "token_index": np.flatnonzero(inside),
        "lengths": lengths,
    }
    if info.token_types:
        inputs["token_type_ids"] = _joined_types(inputs["input_ids"], types)
    return inputs


def _joined_types(flat_ids: np.ndarray, types: Sequence[np.ndarray] | None) -> np.ndarray:
    return np.zeros_like(flat_ids) if types is None else np.concatenate(types).astype(np.int64)


def padded_inputs(
    info: BundleInfo, ids: Sequence[np.ndarray], types: Sequence[np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """`input_ids`, `attention_mask` and perhaps `token_type_ids`, [B, L] each."""
    lengths = np.fromiter((len(x) for x in ids), dtype=np.int64, count=len(ids))
    inside = np.arange(lengths.max())[None, :] < lengths[:, None]
    flat = np.concatenate(ids).astype(np.int64)
    padded = np.full(inside.shape, info.pad_token_id, dtype=np.int64)
    padded[inside] = flat
    inputs = {"input_ids": padded, "attention_mask": inside.astype(np.int64)}
    if info.token_types:
        inputs["token_type_ids"] = np.zeros_like(padded)
        inputs["token_type_ids"][inside] = _joined_types(flat, types)
    return inputs
