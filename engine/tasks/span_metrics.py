"""Precision, recall and F1 of spans, as seqeval counts them: the default (conlleval) way and strict, overall and by type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from regraft.engine.tasks.base import Metrics


class SpanMetrics(Metrics):
    """Counts by type: gold spans, predicted and right ones, by the default and the strict reading; and words right."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def update(self, logits: Any, targets: Any) -> None:
        raise NotImplementedError("spans are added by `add`")

    def add(
        self, gold: Iterable[tuple], predicted: Iterable[tuple], strict: Iterable[tuple], words: int, right: int
    ) -> None:
        """One text. Spans end in their type. `words`: with a gold tag; `right`: of those, tagged so."""
        gold, predicted, strict = set(gold), set(predicted), set(strict)
        for name, spans in (
            ("gold", gold),
            ("default", predicted),
            ("default right", gold & predicted),
            ("strict", strict),
            ("strict right", gold & strict),
        ):
            self.counts.update((name, span[-1]) for span in spans)
        self.counts["words", ""] += words
        self.counts["words right", ""] += right

    def state(self) -> Any:
        return self.counts

    def merge(self, state: Any) -> None:
        self.counts.update(state)

    def _of(self, way: str, kinds: Iterable[str]) -> tuple[float, float, float]:
        names = ("gold", way, f"{way} right")
        gold, predicted, right = (sum(self.counts[name, kind] for kind in kinds) for name in names)
        precision, recall = right / max(predicted, 1), right / max(gold, 1)
        return precision, recall, 2 * right / max(gold + predicted, 1)

    @property
    def kinds(self) -> list[str]:
        """Types with a gold or a predicted span."""
        return sorted({kind for (name, kind), n in self.counts.items() if n and name in ("gold", "default")})

    def compute(self) -> dict[str, float]:
        kinds = self.kinds
        precision, recall, f1 = self._of("default", kinds)
        return {
            "f1": f1,
            "precision": precision,
            "recall": recall,
            "strict_f1": self._of("strict", kinds)[2],
            "macro_f1": sum(self._of("default", [kind])[2] for kind in kinds) / max(len(kinds), 1),
            "accuracy": self.counts["words right", ""] / max(self.counts["words", ""], 1),
        }

    def details(self) -> dict[str, Any]:
        rows = []
        for kind in self.kinds:
            precision, recall, f1 = self._of("default", [kind])
            rows.append(
                {"label": kind, "precision": precision, "recall": recall, "f1": f1, "rows": self.counts["gold", kind]}
            )
        return {"per_class": rows}
