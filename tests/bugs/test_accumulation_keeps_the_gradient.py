"""Gradient accumulation multiplied the gradient of encoder heads (transformers 47688, 34191, 35438)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, BertConfig

from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import TokenStore
from regraft.engine.examples import Examples
from regraft.engine.models import RunningModel
from regraft.engine.tasks import Classification, MultiLabel, Regression
from regraft.engine.training.step import Stepper

TASKS = [
    Classification(("a", "b", "c"), class_weights=np.array([0.5, 1.0, 3.0], dtype=np.float32), label_smoothing=0.1),
    MultiLabel(("a", "b", "c")),
    Regression(),
]


def gradient(task, budget: int) -> torch.Tensor:
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, num_labels=task.outputs, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    running = RunningModel(AutoModelForSequenceClassification.from_config(config), pad_token_id=0)
    running.run_packed()
    running.train()
    store = TokenStore(generator.integers(5, 90, 160).astype(np.int32), np.arange(17) * 10)
    targets = {
        "classification": generator.integers(0, 3, 16),
        "multilabel": generator.integers(0, 2, (16, 3)).astype(np.float32),
        "regression": generator.normal(size=16).astype(np.float32),
    }[task.type]
    rows = Rows("train", "train.csv", [""] * 16, None, np.arange(16))
    examples = Examples(rows, store, targets, task.weights(targets))
    parameters = list(running.parameters())
    stepper = Stepper(
        accelerator=Accelerator(cpu=True), model=running, optimizer=torch.optim.AdamW(parameters), parameters=parameters,
        task=task, examples=examples, seed=0, token_budget=budget, max_grad_norm=None,
    )  # fmt: skip
    stepper._gradients(0, np.arange(16))
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.type)
def test_one_of_sixteen_and_four_of_four_give_the_same_gradient(task):
    whole, cut = gradient(task, 160), gradient(task, 40)
    assert whole.abs().max() > 1e-3
    assert (whole - cut).abs().max() < 1e-6


def test_the_bug_itself_would_be_caught():
    class MeanOfEachPart(Regression):
        def loss(self, logits, targets, weights):  # each micro-batch divided by its own rows, then added up
            return super().loss(logits, targets, weights) / len(targets) * 16

    whole, cut = gradient(MeanOfEachPart(), 160), gradient(MeanOfEachPart(), 40)
    assert (whole - cut).abs().max() > 1e-3
