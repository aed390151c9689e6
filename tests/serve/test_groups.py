from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from regraft.engine.bundle import BundleInfo
from regraft.engine.graph_inputs import graph_inputs
from regraft.serve.groups import like_lengths

INFO = BundleInfo("packed", "fp32", {}, max_length=8, pad_token_id=9, position_offset=2, token_types=True)
IDS = [np.array([5, 6, 7]), np.array([8])]
TYPES = [np.array([0, 1, 1]), np.array([0])]


def listed(inputs: dict[str, np.ndarray]) -> dict[str, list]:
    assert {array.dtype for array in inputs.values()} == {np.dtype(np.int64)}
    return {name: array.tolist() for name, array in inputs.items()}


def test_packed_inputs_hold_no_pad_token() -> None:
    assert listed(graph_inputs(INFO, IDS, TYPES)) == {
        "input_ids": [5, 6, 7, 8],
        "position_ids": [2, 3, 4, 2],
        "pad_index": [[0, 1, 2], [3, 0, 0]],
        "token_index": [0, 1, 2, 3],
        "lengths": [3, 1],
        "token_type_ids": [0, 1, 1, 0],
    }


def test_padded_inputs_are_filled_with_the_pad_token_of_the_bundle() -> None:
    assert listed(graph_inputs(replace(INFO, layout="padded"), IDS, TYPES)) == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 1, 1], [0, 0, 0]],
    }


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_types_are_left_out_for_a_graph_without_them(layout: str) -> None:
    assert "token_type_ids" not in graph_inputs(replace(INFO, layout=layout, token_types=False), IDS, TYPES)


def test_every_text_is_in_one_group_and_groups_waste_no_more_than_the_slack() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, slack = rng.integers(1, 60, size=rng.integers(1, 80)), int(rng.integers(0, 300))
        groups = like_lengths(lengths, slack)
        assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
        assert all((lengths[g].max() - lengths[g]).sum() <= slack for g in groups)


def test_texts_of_one_length_stay_together() -> None:
    assert len(like_lengths(np.full(100, 17), slack=0)) == 1


def test_one_long_text_does_not_pad_the_short_ones() -> None:
    groups = like_lengths(np.array([5, 400, 6, 5]), slack=100)
    assert sorted(sorted(group.tolist()) for group in groups) == [[0, 2, 3], [1]]
