"""The table that says whose attention runs for which shape: read where it was measured, done without where it was not."""

from __future__ import annotations

import logging

import pytest

from regraft.kernels import hand_over
from regraft.kernels.hand_over import faster, key_of, read_table, write_table


def test_what_was_not_measured_goes_to_torch(monkeypatch, tmp_path):
    assert read_table(tmp_path / "none.json") == {}
    monkeypatch.setattr(hand_over, "MEASURED", {90: {"64 x 512": "own"}})
    assert faster(90, key_of(64, 300)) == "own"
    others = [key_of(64, 300, dropout=True), key_of(64, 200), key_of(64, 300, rotary=True, window=True)]
    assert [faster(90, key) for key in others] + [faster(80, key_of(64, 300))] == ["aten"] * 4


def test_lengths_belong_to_the_next_longer_entry():
    assert key_of(64, 64) == "64 x 64"
    assert key_of(64, 65, dropout=True) == "64 x 128, dropout"
    assert key_of(128, 100_000, rotary=True, window=True) == "128 x 8192, rotary, window"


def test_each_gpu_has_entries_of_its_own(tmp_path):
    path = tmp_path / "hand_over.json"
    write_table(path, 80, {"64 x 512": "aten"}, {"machine": "A100"})
    write_table(path, 90, {"64 x 512": "own", "32 x 64, dropout": "aten"}, {"machine": "H200"})
    assert read_table(path) == {80: {"64 x 512": "aten"}, 90: {"64 x 512": "own", "32 x 64, dropout": "aten"}}
    write_table(path, 90, {"64 x 512": "aten"}, {"machine": "H200"})
    assert read_table(path)[90] == {"64 x 512": "aten"}


@pytest.mark.parametrize("content", ["{", "[]", '{"90": {}}', '{"90": {"faster": {"64 x 512": "liger"}}}'])
def test_a_table_that_cannot_be_read_is_said_and_done_without(tmp_path, caplog, content):
    path = tmp_path / "hand_over.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "regraft.kernels"):
        assert read_table(path) == {}
    assert "hand_over.json cannot be read" in caplog.text
