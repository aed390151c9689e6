"""What a finished (or broken off) run has to say, in plain Python: the page and the model card read only this."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

Record = Mapping[str, Any]


class Best(NamedTuple):
    """The evaluation that was kept: optimizer step, figure that picked it, its value."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class ReportData:
    """Everything a report or a model card states. All but the first four may be missing.

    history   records of metrics.jsonl, in order: `{"kind": "train", "step", "epoch", "loss", "learning_rate",
              "grad_norm", "tokens_per_second", "seconds"}`, `{"kind": "eval", "split", "step", "epoch",
              "metrics": {name: value}, "seconds"}`, and, for a step that was not taken because loss or gradient was
              not finite, `{"kind": "skipped", "step"}`
    best      a `Best`, or the same three values as a tuple; None when nothing was evaluated
    details   as `Metrics.details()` of the task: per_class, confusion, calibration, scatter, each optional; and `layer_weights`,
              `{"gamma": float, "layers": [{"layer", "weight"}]}`, of a learned combination of layers; of several tasks `tasks`,
              `{name: {"type", "metric", "metrics", "details"}}`, and `mixing`, `{name: {"steps", "weight", "log_variance"}}`
    worst     `{"where", "text", "pair", "expected", "predicted", "loss"}`, highest loss first
    data_notes
              `{"splits": {split: {"path", "rows", "dropped": {rule: rows}, "tokens", "truncated_rows",
              "truncated_tokens"}}, "labels": {split: {label: rows}}}`, each optional
    totals    `{"seconds", "tokens", "steps", "skipped"}`, each optional
    """

    name: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: str
    history: Sequence[Record] = ()
    best: Best | tuple[int, str, float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    worst: Sequence[Record] = ()
    data_notes: Mapping[str, Any] = field(default_factory=dict)
    totals: Mapping[str, Any] = field(default_factory=dict)

    def of_kind(self, kind: str) -> list[Record]:
        """Records of one kind, in the order they were written."""
        return [r for r in self.history if r.get("kind") == kind]

    def setting(self, key: str, default: Any = None) -> Any:
        """`setting("training.batch_size")` of the resolved config; `default` where it is absent or null."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def task(self) -> str:
        return "several" if self.setting("tasks") else str(self.setting("task.type", "classification"))

    @property
    def split(self) -> str:
        """The split that picked the best checkpoint: dev, or whichever was evaluated."""
        splits = [str(r.get("split", "dev")) for r in self.of_kind("eval")]
        return splits[0] if splits and "dev" not in splits else "dev"

    @property
    def evaluations(self) -> list[Record]:
        """Evaluations of `split`, one a step."""
        return [r for r in self.of_kind("eval") if str(r.get("split", "dev")) == self.split]

    @property
    def best_record(self) -> Record | None:
        """The evaluation of `split` at the best step."""
        step = self.best[0] if self.best else None
        return next((r for r in self.evaluations if r.get("step") == step), None)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the model's order as far as they are known; empty for a regression."""
        if self.task == "regression":
            return ()
        confusion, per_class = self.details.get("confusion"), self.details.get("per_class")
        counts = self.data_notes.get("labels") or {}
        if confusion:
            return tuple(confusion["labels"])
        if per_class:
            return tuple(row["label"] for row in per_class)
        return tuple(self.setting("task.labels", ())) or tuple(next(iter(counts.values()), ()))

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error (Naeini et al. 2015): mean |accuracy - confidence| over bins, weighted by rows."""
        bins = self.details.get("calibration") or []
        rows = sum(b["rows"] for b in bins)
        return sum(b["rows"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / rows if rows else None


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, in order of their first appearance; empty when there is no such file.

    A kill may tear a line, and the resumed run writes again the steps since its checkpoint: a line that is no JSON
    object is left out (and logged, with its number), and of a step written twice the later record counts.
    """
    path = Path(path)
    if not path.exists():
        return []
    records: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            key = (record.get("kind"), record.get("split"), record["step"]) if "step" in record else number
            records[key] = record
        elif line.strip():
            log.warning("%s:%d: not a whole JSON record, left out", path, number)
    return list(records.values())
