"""Exact match and F1 of answers by the official rules of SQuAD and, for Chinese, of CMRC 2018."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from regraft.engine.tasks.base import Metrics

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = set(string.punctuation)
# As CMRC 2018's script lists it.
CHINESE_PUNCTUATION = set("-:_*^/\\~`+=，。：？！“”；’《》…·、「」（）－～『』")


def normal_english(text: str) -> str:
    """Lower case without punctuation, articles and extra white space."""
    text = "".join(c for c in text.lower() if c not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


def exact_english(found: str, gold: str) -> float:
    return float(normal_english(found) == normal_english(gold))


def f1_english(found: str, gold: str) -> float:
    """F1 of the bags of words; with no word on one side, whether there is none on the other."""
    mine, theirs = normal_english(found).split(), normal_english(gold).split()
    if not mine or not theirs:
        return float(mine == theirs)
    shared = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * shared / (len(mine) + len(theirs)) if shared else 0.0


def exact_chinese(found: str, gold: str) -> float:
    bare = lambda text: "".join(c for c in text.lower().strip() if c not in CHINESE_PUNCTUATION)  # noqa: E731
    return float(bare(found) == bare(gold))


def segments(text: str) -> list[str]:
    """Chinese characters alone, everything else in words; punctuation left out."""
    text = "".join(c for c in text.lower().strip() if c not in CHINESE_PUNCTUATION)
    return re.findall("[\u4e00-\u9fa5]|[^\\W\u4e00-\u9fa5]+|[^\\w\\s]", text)


def f1_chinese(found: str, gold: str) -> float:
    """F1 by the longest run of segments that both share."""
    mine, theirs = segments(found), segments(gold)
    if not mine or not theirs:
        return float(mine == theirs)
    best, before = 0, [0] * (len(theirs) + 1)
    for one in mine:
        row = [0]
        for j, other in enumerate(theirs):
            row.append(before[j] + 1 if one == other else 0)
        best, before = max(best, *row), row
    return 2 * best / (len(mine) + len(theirs)) if best else 0.0


RULES = {"english": (exact_english, f1_english), "chinese": (exact_chinese, f1_chinese)}


def judge(rule: str, found: str, golds: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 against the gold answer that suits best; no gold answer means that "" is right."""
    exact, f1 = RULES[rule]
    golds = [g for g in golds if rule == "chinese" or normal_english(g)] or [""]
    return max(exact(found, g) for g in golds), max(f1(found, g) for g in golds)


class AnswerMetrics(Metrics):
    """Keeps five numbers a question: how far no answer is above the best one, exact match and F1 of the best answer,
    whether no answer would be right, and whether the question has an answer."""

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self.rows: list[tuple[float, float, float, float, float]] = []

    def update(self, logits: Any, targets: Any) -> None:
        raise NotImplementedError("questions are added by `add`")

    def add(self, margin: float, exact: float, f1: float, none_is_right: bool) -> None:
        self.rows.append((margin, exact, f1, float(none_is_right), float(not none_is_right)))

    def state(self) -> Any:
        return self.rows

    def merge(self, state: Any) -> None:
        self.rows = self.rows + state

    def _columns(self) -> np.ndarray:
        return np.array(self.rows, dtype=np.float64).reshape(-1, 5).T

    def tuned_threshold(self) -> float:
        """The margin above which "no answer" is said, with the highest F1 on what was added."""
        margin, _, f1, none, _ = self._columns()
        order = np.argsort(margin, kind="stable")
        # Said for all, then for one fewer and one fewer: what is gained by answering those with the smallest margins.
        gains = np.concatenate([[0.0], np.cumsum(f1[order] - none[order])])
        best = int(gains.argmax())
        edges = np.concatenate([[margin[order[0]] - 1.0], margin[order]]) if len(order) else np.zeros(1)
        upper = margin[order[best]] if best < len(order) else edges[best] + 1.0
        return float((edges[best] + upper) / 2)

    def compute(self) -> dict[str, float]:
        margin, exact, f1, none, has = self._columns()
        if self.threshold is not None:
            silent = margin > self.threshold
            exact, f1 = np.where(silent, none, exact), np.where(silent, none, f1)
        figures = {"f1": float(f1.mean()), "exact_match": float(exact.mean())}
        if none.any() and has.any():
            figures |= {"answerable_f1": float(f1[has > 0].mean()), "no_answer_accuracy": float(f1[none > 0].mean())}
        return figures
