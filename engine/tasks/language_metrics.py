"""Figures of hidden words and of pairs of sentences, beside what guessing reaches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from regraft.engine.tasks.base import Metrics


class LanguageMetrics(Metrics):
    """Sums over hidden tokens, and how often each was to be found: the share of the commonest is the trivial accuracy."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.seen: Counter[int] = Counter()

    def update(self, logits: np.ndarray, targets: np.ndarray) -> None:
        z = logits - logits.max(axis=-1, initial=-np.inf, keepdims=True)
        losses = np.log(np.exp(z).sum(axis=-1, dtype=np.float64)) - z[np.arange(len(targets)), targets]
        right = int((z.argmax(axis=-1) == targets).sum()) if len(targets) else 0
        self.sums.update({"tokens": len(targets), "loss": float(losses.sum()), "right": right})
        self.seen.update(targets.tolist())

    def pairs(self, found: int, label: int) -> None:
        """One pair."""
        self.sums.update({"pairs": 1, "pairs right": int(found == label), "pairs apart": label})

    def state(self) -> Any:
        return self.sums, self.seen

    def merge(self, state: Any) -> None:
        self.sums.update(state[0])
        self.seen.update(state[1])

    def compute(self) -> dict[str, float]:
        tokens = max(self.sums["tokens"], 1)
        mean = self.sums["loss"] / tokens
        common = self.seen.most_common(1)
        figures = {
            "perplexity": float(np.exp(min(mean, 700.0))),
            "loss": mean,
            "accuracy": self.sums["right"] / tokens,
            "trivial_accuracy": common[0][1] / tokens if common else 0.0,
        }
        if self.sums["pairs"]:
            apart = self.sums["pairs apart"] / self.sums["pairs"]
            figures |= {
                "sentence_accuracy": self.sums["pairs right"] / self.sums["pairs"],
                "trivial_sentence_accuracy": max(apart, 1 - apart),
            }
        return figures
