"""Evaluation hoarded logits until memory ran out (transformers 8476, 10722)."""

from __future__ import annotations

import tracemalloc

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import TokenStore
from regraft.engine.evaluation import evaluate
from regraft.engine.examples import Examples
from regraft.engine.models import RunningModel
from regraft.engine.tasks import Classification

CLASSES = 200


def peak(rows: int) -> int:
    """Bytes numpy held at the most while `rows` rows of 200 classes were evaluated."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, num_labels=CLASSES,
    )  # fmt: skip
    running = RunningModel(AutoModelForSequenceClassification.from_config(config), pad_token_id=0)
    running.run_packed()
    store = TokenStore(np.random.default_rng(0).integers(5, 50, rows * 4).astype(np.int32), np.arange(rows + 1) * 4)
    task = Classification(tuple(f"c{i}" for i in range(CLASSES)))
    texts = Rows("dev", "dev.csv", ["" for _ in range(rows)], None, np.arange(rows))
    examples = Examples(texts, store, np.zeros(rows, dtype=np.int64), np.ones(rows, dtype=np.float32))
    tracemalloc.start()
    evaluate(running, examples, task, token_budget=1024, keep_worst=20)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held


def test_memory_does_not_grow_with_rows_times_classes():
    few, many = peak(1_000), peak(8_000)
    logits = 7_000 * CLASSES * 4
    assert many - few < logits / 8
