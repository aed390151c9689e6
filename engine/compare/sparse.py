"""The two ways that need no network: the most frequent class, and TF-IDF with logistic regression (scikit-learn)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.tasks import Task
from regraft.engine.words.tokens import choose_unit

NEVER, ALWAYS = -20.0, 20.0


@dataclass(frozen=True)
class Fitted:
    """What was learned, how long that took, and how many bytes it would take to keep."""

    model: Any
    seconds: float
    bytes: int


def fit_majority(rows: Rows, targets: np.ndarray, task: Task) -> Fitted:
    """One answer for everything: the most frequent class, the labels that most rows have, the mean value."""
    began = time.perf_counter()
    if task.type == "regression":
        answer = np.array([float(np.mean(targets))], dtype=np.float32)
    elif task.type == "multilabel":
        answer = np.where(targets.mean(axis=0) >= 0.5, ALWAYS, NEVER).astype(np.float32)
    else:
        answer = np.full(task.outputs, NEVER, dtype=np.float32)
        answer[np.bincount(targets, minlength=task.outputs).argmax()] = 0.0
    return Fitted(lambda few: np.tile(answer, (len(few), 1)), time.perf_counter() - began, answer.nbytes)


def fit_tfidf(rows: Rows, targets: np.ndarray, task: Task) -> Fitted:
    """Words and pairs of words (Chinese: one to three characters) weighted by TF-IDF, one logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    began = time.perf_counter()
    chinese = choose_unit(list(rows.texts)) != "word"
    kind: dict[str, Any] = {"analyzer": "char", "ngram_range": (1, 3)} if chinese else {"ngram_range": (1, 2)}
    words = TfidfVectorizer(sublinear_tf=True, min_df=1 if len(rows) < 2000 else 2, **kind)
    x = words.fit_transform(_joined(rows))
    many = task.type == "multilabel"
    solver = LogisticRegression(C=10.0, max_iter=300)
    solved = (OneVsRestClassifier(solver) if many else solver).fit(x, targets)

    def logits(few: Rows) -> np.ndarray:
        found = np.asarray(solved.decision_function(words.transform(_joined(few))), dtype=np.float32)
        if many:
            return found.reshape(len(few), -1)
        whole = np.full((len(few), task.outputs), NEVER, dtype=np.float32)
        whole[:, solved.classes_] = np.stack([-found / 2, found / 2], axis=1) if found.ndim == 1 else found
        return whole

    seconds = time.perf_counter() - began
    return Fitted(logits, seconds, x.shape[1] * task.outputs * 8 + sum(len(w) for w in words.vocabulary_))


def _joined(rows: Rows) -> list[str]:
    if rows.pairs is None:
        return list(rows.texts)
    return [f"{a} {b}" for a, b in zip(rows.texts, rows.pairs, strict=True)]
