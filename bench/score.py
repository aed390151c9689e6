"""Figures of a Hugging Face model folder on labelled rows, by plain transformers and scikit-learn.

Whoever trained the folder, it is scored the same way, padded and in fp32. The argument is one JSON object, the last
line printed is one. Keys: folder, rows (jsonl with text, text_pair, label), max_length, threads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    spec = json.loads(sys.argv[1])

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(spec["threads"])
    folder = Path(spec["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").eval()
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text(encoding="utf-8").split("\n") if line]
    logits = np.empty((len(rows), model.config.num_labels), dtype=np.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]) + len(rows[i].get("text_pair", "")))
    for start in range(0, len(rows), 32):
        some = order[start : start + 32]
        pairs = [rows[i]["text_pair"] for i in some] if "text_pair" in rows[0] else None
        inputs = tokenizer(
            [rows[i]["text"] for i in some],
            pairs,
            truncation=True,
            max_length=spec["max_length"],
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits[some] = model(**inputs).logits.double().numpy()
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    found = figures(logits, [row["label"] for row in rows], names, model.config.problem_type, thresholds(folder))
    print(json.dumps({"rows": len(rows), **found}))


def thresholds(folder: Path) -> float | list[float]:
    """The decision thresholds of a multi-label model that came with some; else 0.5."""
    facts = folder / "regraft.json"
    known = json.loads(facts.read_text(encoding="utf-8")).get("task", {}) if facts.is_file() else {}
    return known.get("thresholds", 0.5)


def figures(
    logits: np.ndarray, labels: list[Any], names: list[str], problem: str | None, limits: float | list[float] = 0.5
) -> dict[str, float]:
    """Figures in points of 100. Shape: logits [N, C]; `labels` as the rows have them."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if problem == "regression" or logits.shape[1] == 1:
        true = np.array(labels, dtype=np.float64)
        found = {"pearson": pearsonr(logits[:, 0], true).statistic, "spearman": spearmanr(logits[:, 0], true).statistic}
    elif problem == "multi_label_classification":
        truth = np.array([[name in row for name in names] for row in labels])
        chosen = 1 / (1 + np.exp(-logits)) >= np.asarray(limits)
        found = {f"{kind}_f1": f1_score(truth, chosen, average=kind, zero_division=0) for kind in ("macro", "micro")}
    else:
        answers = [names[i] for i in logits.argmax(axis=1)]
        found = {
            "accuracy": accuracy_score(labels, answers),
            "macro_f1": f1_score(labels, answers, average="macro", zero_division=0),
            "matthews": matthews_corrcoef(labels, answers),
        }
    return {name: round(100 * float(value), 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
