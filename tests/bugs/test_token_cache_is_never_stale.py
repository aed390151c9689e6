"""Caches went stale across tokenizers, or missed although nothing had changed (datasets 3847, 7982)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import tokenize

SCRIPT = """
import sys, numpy as np
from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import tokenize
texts = sys.argv[2:]
rows = Rows("train", "x.csv", texts, None, np.arange(len(texts)))
tokenize(rows, load_fast_tokenizer(sys.argv[1]), 16)
"""


def files(folder: Path) -> set[str]:
    return {p.name for p in (folder / "tokens").glob("*.tokens")}


def test_the_same_content_hits_in_another_process_and_any_change_misses(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))
    texts = ["good film", "bad plot"]
    for _ in range(2):
        subprocess.run([sys.executable, "-c", SCRIPT, str(tiny_model), *texts], check=True, env=dict(os.environ))
        assert len(files(tmp_path)) == 1
    rows = Rows("train", "elsewhere.csv", texts, None, np.arange(2))
    tokenizer = load_fast_tokenizer(tiny_model)
    tokenize(rows, tokenizer, 16)
    assert len(files(tmp_path)) == 1
    tokenize(rows, tokenizer, 8)
    tokenize(Rows("train", "x.csv", ["good film", "bad plots"], None, np.arange(2)), tokenizer, 16)
    assert len(files(tmp_path)) == 3


def test_another_tokenizer_of_the_same_name_misses(tiny_model, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    other = tmp_path / tiny_model.name
    shutil.copytree(tiny_model, other)
    settings = json.loads((other / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    rows = Rows("train", "x.csv", ["good film"], None, np.arange(1))
    one = tokenize(rows, load_fast_tokenizer(tiny_model), 16)
    two = tokenize(rows, load_fast_tokenizer(other), 16)
    assert len(files(tmp_path / "cache")) == 2
    assert not np.array_equal(one.ids, two.ids)
