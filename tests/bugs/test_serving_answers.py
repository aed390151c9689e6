"""Answers that mislead: silent truncation (sentence-transformers 4060), soft-max over independent labels
(text-embeddings-inference's README), an over-long entry that blocks the queue (text-embeddings-inference 723)."""

from __future__ import annotations

import numpy as np
import pytest

import serving_support  # noqa: F401
from bundles import MAX_LENGTH, TASKS, reference_logits, session
from running import post


def test_each_answer_says_how_many_tokens_were_cut() -> None:
    answers = post({"inputs": ["good film", "the " * 100]}).json()["predictions"]
    assert [(a["tokens"], a["truncated"]) for a in answers] == [(4, 0), (MAX_LENGTH, 102 - MAX_LENGTH)]


def test_a_text_of_a_million_characters_is_cut_answered_and_told() -> None:
    answer = post({"inputs": "very " * 200_000}).json()["predictions"][0]
    assert (answer["tokens"], answer["truncated"]) == (MAX_LENGTH, 200_002 - MAX_LENGTH)
    assert "label" in answer


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_the_activation_follows_the_problem_type(task: str) -> None:
    text = "not very good b c"
    [item] = session("packed", task).tokenize([text])
    logits = reference_logits(item.ids, item.types, task)
    answer = post({"inputs": text}, task=task).json()["predictions"][0]
    labels = TASKS[task]["labels"]
    if task == "classification":
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert answer["scores"] == pytest.approx(dict(zip(labels, expected, strict=True)), abs=1e-4)
        assert answer["label"] == labels[int(logits.argmax())]
        assert sum(answer["scores"].values()) == pytest.approx(1.0)
    elif task == "multilabel":
        expected = 1 / (1 + np.exp(-logits))
        assert answer["scores"] == pytest.approx(dict(zip(labels, expected, strict=True)), abs=1e-4)
        chosen = {n for n, p, t in zip(labels, expected, TASKS[task]["thresholds"], strict=True) if p >= t}
        assert set(answer["label"]) == chosen
        assert abs(sum(answer["scores"].values()) - 1.0) > 0.05
    else:
        assert answer["label"] == pytest.approx(float(logits[0]), abs=1e-4)
        assert "scores" not in answer
