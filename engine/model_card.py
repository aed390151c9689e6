"""README.md beside the weights: a Hugging Face model card with data, figures, settings, use and limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any

import yaml

from regraft.engine.files import write_text
from regraft.engine.heads.settings import LIVE_HEADS
from regraft.engine.methods.settings import ADAPTERS, VIRTUAL
from regraft.engine.report.data import ReportData
from regraft.engine.report.formats import count, duration, metric_name, metric_value, number, percent
from regraft.engine.report.provenance import dropped
from regraft.engine.report.summary import from_nothing, model_name, summary

# The hub's own names of these figures: https://huggingface.co/metrics
HUB_METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "f1",
    "micro_f1": "f1",
    "subset_accuracy": "accuracy",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "mse": "mse",
    "mae": "mae",
    "loss": "loss",
}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
WITH_A_HEAD = frozenset({"frozen", "vectors", "scratch", "contrastive", "tfidf", "onehot"})
LISTED = 100  # labels from which the card stops listing them one a row
SETTINGS = (
    ("method", "Method"),
    ("training.batch_size", "Batch size (sequences an optimizer step)"),
    ("training.learning_rate", "Learning rate"),
    ("training.head_learning_rate", "Learning rate of the head"),
    ("training.layer_decay", "Layer-wise learning-rate decay"),
    ("training.schedule", "Schedule"),
    ("training.warmup", "Warm-up"),
    ("training.epochs", "Epochs"),
    ("training.max_steps", "Most steps"),
    ("training.weight_decay", "Weight decay"),
    ("training.max_grad_norm", "Largest gradient norm"),
    ("training.ema", "Decay of averaged weights"),
    ("task.class_weights", "Class weights"),
    ("task.label_smoothing", "Label smoothing"),
    ("training.precision", "Precision"),
    ("training.seed", "Seed"),
    ("model.new_words", "New words in the vocabulary"),
    ("model.max_length", "Longest input (tokens)"),
)


def write_model_card(folder: Path, data: ReportData) -> Path:
    """Write `README.md` into a model folder, whole or not at all, and return its path."""
    front = yaml.safe_dump(front_matter(data), sort_keys=False, allow_unicode=True, width=100)
    parts = [
        f"# {plain(data.name)}",
        plain(summary(data)),
        *_figures(data),
        *_use(data),
        *_labels(data),
        *_training(data),
        *_limits(data),
    ]
    return write_text(Path(folder) / "README.md", f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n")


def front_matter(data: ReportData) -> dict[str, Any]:
    """What the hub reads. The language is left out: nothing in a run says it."""
    name = str(data.setting("model.name", ""))
    figures = _best_figures(data)
    library = "regraft" if data.task == "several" or _own_head(data) else "transformers"
    pipeline = PIPELINES.get(data.task, "text-classification")
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": pipeline}
    if HUB_NAME.fullmatch(name) and not Path(name).exists() and not from_nothing(data):
        front["base_model"] = name
    front["tags"] = ["regraft", pipeline, data.task] + (["sentence-pairs"] if _pairs(data) else [])
    front["metrics"] = list(dict.fromkeys(HUB_METRICS[n] for n in figures if n in HUB_METRICS and n != "loss"))
    if figures:
        measured = [
            {"type": HUB_METRICS.get(n, n), "name": metric_name(n), "value": float(v)} for n, v in figures.items()
        ]
        dataset = {"name": _dataset(data), "type": _dataset(data), "split": data.split}
        result = {"task": {"type": pipeline}, "dataset": dataset, "metrics": measured}
        front["model-index"] = [{"name": one_line(data.name), "results": [result]}]
    return front


def one_line(text: Any) -> str:
    """A line break in a name could end the front matter or a row of a table."""
    return " ".join(str(text).split())


def plain(text: Any) -> str:
    """Text that Markdown takes as text, on one line."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", escape(one_line(text), quote=False))


def grid(head: Sequence[str], rows: Sequence[Sequence[Any]], *, words: int = 1) -> str:
    """A Markdown table whose first `words` columns stand left, the others right. Cells are escaped."""
    rule = ["---" if i < words else "---:" for i in range(len(head))]
    lines = [head, rule, *([plain(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figures(data: ReportData) -> list[str]:
    figures = _best_figures(data)
    if not figures:
        return []
    head = grid(["Figure", data.split], [[metric_name(n), metric_value(n, v)] for n, v in figures.items()])
    error = data.calibration_error
    said = [f"Expected calibration error: {percent(error)}."] if error is not None else []
    return ["## Figures", head, *said]


WITH_TRANSFORMERS = ("classification", "multilabel", "regression")
PIPELINES = {"tagging": "token-classification", "answering": "question-answering", "mlm": "fill-mask"}


def _use_by_command(data: ReportData) -> list[str]:
    """For tasks whose answers are more than a label: our own command, and the pipeline that reads the same weights."""
    inputs = {"answering": '"the question" --pair "the context"', "choice": "--file choices.jsonl"}
    asked = inputs.get(data.task, '"the text"')
    said = ["## Use", f"```sh\nregraft predict path/to/this/folder {asked}\n```"]
    if data.task in PIPELINES:
        line = f'pipeline("{PIPELINES[data.task]}", model="path/to/this/folder")'
        said += ["The weights load in plain transformers too, without windows, CRF and thresholds:"]
        said += [f"```python\nfrom transformers import pipeline\n\nask = {line}\n```"]
    return said


def _own_head(data: ReportData) -> bool:
    """Whether the model's head is none of transformers'."""
    return str(data.setting("method", "full")) in WITH_A_HEAD or data.setting("head.type") in LIVE_HEADS


def _use(data: ReportData) -> list[str]:
    if _own_head(data) or str(data.setting("method")) in ADAPTERS:
        return _use_with_head(data)
    if data.task not in WITH_TRANSFORMERS:
        return _use_by_command(data)
    pair, length = _pairs(data), data.setting("model.max_length")
    cut = f", truncation=True, max_length={length}" if length else ", truncation=True"
    one = '{"text": "the first text", "text_pair": "the second text"}' if pair else '"the text"'
    options = {"regression": ', function_to_apply="none"', "multilabel": ", top_k=None"}.get(data.task, "")
    short = f"""\
from transformers import pipeline

model = "path/to/this/folder"
classify = pipeline("text-classification", model=model{options})
print(classify({one}{cut}))"""
    texts = '"the first text", "the second text"' if pair else '"the text"'
    long = f"""\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
inputs = tokenizer({texts}, return_tensors="pt"{cut})
with torch.inference_mode():
    logits = model(**inputs).logits
{_decoding(data)}"""
    return [
        "## Use",
        "With plain transformers:",
        f"```python\n{short}\n```",
        "or, for the numbers:",
        f"```python\n{long}\n```",
    ]


def _use_with_head(data: ReportData) -> list[str]:
    """Of a model whose head is none of transformers'."""
    texts = '[("the first text", "the second text")]' if _pairs(data) else '["the text"]'
    shown = "answer.prediction.label, answer.prediction.scores"
    if data.task in ("tagging", "answering"):
        shown = "answer.prediction.spans"
    code = f"""\
from regraft.engine.predict import predict
from regraft.engine.trained import load_trained

model = load_trained("path/to/this/folder")
for answer in predict(model, {texts}):
    print({shown})"""
    said = ["## Use", f"```python\n{code}\n```"]
    method = str(data.setting("method"))
    if method in ADAPTERS:
        merged = "`regraft merge` makes a plain Hugging Face model of it and its encoder."
        kept = "it stays beside its encoder, which is loaded with it."
        said.append(f"This folder holds an adapter; {kept if method in VIRTUAL | {'adapter'} else merged}")
    if str(data.setting("method")) == "frozen":
        said.append("The encoder, unchanged, loads with `transformers.AutoModel`; the head is in `head.safetensors`.")
    elif data.setting("head.type") in LIVE_HEADS and str(data.setting("method", "full")) in ("full", "bitfit"):
        said.append("The encoder loads with `transformers.AutoModel`; the head is in `head.safetensors`.")
    return said


def _decoding(data: ReportData) -> str:
    if data.task == "regression":
        return "value = logits[0, 0].item()"
    if data.task == "classification":
        return "probabilities = logits.softmax(-1)[0]\nlabel = model.config.id2label[probabilities.argmax().item()]"
    return f"""\
probabilities = logits.sigmoid()[0]
thresholds = {_thresholds(data)}
labels = [model.config.id2label[i] for i, p in enumerate(probabilities) if p >= thresholds[i]]"""


def _labels(data: ReportData) -> list[str]:
    labels, counts = data.labels, (data.data_notes.get("labels") or {}).get("train") or {}
    measured = {str(r["label"]): r for r in data.details.get("per_class") or []}
    if not labels:
        return []
    if len(labels) > LISTED:
        return ["## Labels", f"{count(len(labels))} labels; their names are in `config.json` (`id2label`)."]
    limits = any(r.get("threshold") is not None for r in measured.values())
    head = ["Number", "Label"] + (["Rows in training"] if counts else [])
    head += ["Precision", "Recall", "F1"] if measured else []
    head += ["Threshold"] if limits else []
    rows = []
    for i, label in enumerate(labels):
        row: list[Any] = [i, label] + ([count(counts.get(label, 0))] if counts else [])
        found: Mapping[str, Any] = measured.get(label, {})
        row += [percent(found.get(key)) for key in ("precision", "recall", "f1")] if measured else []
        rows.append(row + ([number(found.get("threshold"))] if limits else []))
    return ["## Labels", grid(head, rows, words=2)]


def _training(data: ReportData) -> list[str]:
    begun = "Trained from random weights, with the tokenizer of" if from_nothing(data) else "Pretrained encoder:"
    parts = ["## Training", f"{begun} {plain(model_name(data))}."]
    splits = data.data_notes.get("splits") or {}
    if splits:
        rows = []
        for name, s in splits.items():
            rows.append(
                [name, _file(s.get("path", "")), dropped(s), count(s.get("rows")), count(s.get("truncated_rows"))]
            )
        parts.append(grid(["Split", "File", "Dropped", "Rows", "Truncated rows"], rows, words=3))
    settings = [[said, data.setting(key)] for key, said in SETTINGS if data.setting(key) not in (None, "none")]
    parts.append(grid(["Setting", "Value"], settings, words=2))
    totals = data.totals
    spent = [f"{count(totals['steps'])} optimizer steps"] if totals.get("steps") is not None else []
    spent += [f"{count(totals['tokens'])} tokens"] if totals.get("tokens") else []
    spent += [duration(totals["seconds"])] if totals.get("seconds") else []
    spent += [plain(data.machine)] if data.machine else []
    parts += [f"{', '.join(spent)}."] if spent else []
    versions = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    return [*parts, *([f"Versions: {plain(versions)}."] if versions else [])]


def _limits(data: ReportData) -> list[str]:
    points = ["It knows texts like those it was trained on; others, other languages among them, were not tried here."]
    if data.labels and data.task == "classification":
        points.append("It always answers with one of its labels, also where none of them fits.")
    length = data.setting("model.max_length")
    if length:
        points.append(f"Of a longer text or pair, only the first {count(length)} tokens are read.")
    if not data.best:
        points.append("It was not evaluated.")
    elif (data.data_notes.get("splits") or {}).get(data.split, {}).get("rows"):
        rows = data.data_notes["splits"][data.split]["rows"]
        points.append(
            f"The figures come from {count(rows)} rows of {data.split}, which also picked the checkpoint: expect "
            "a little less."
        )
    error = data.calibration_error
    if error is not None:
        points.append(f"Its probabilities are off by {percent(error)} on average (expected calibration error).")
    weak = [r for r in data.details.get("per_class") or [] if r["rows"] and r["f1"] < 0.5]
    if weak:
        names = ", ".join(f"{plain(r['label'])} ({percent(r['f1'])})" for r in sorted(weak, key=lambda r: r["f1"])[:8])
        points.append(f"Weak labels (F1 below 50%): {names}{', and others' if len(weak) > 8 else ''}.")
    unseen = [r for r in data.details.get("per_class") or [] if not r["rows"]]
    if unseen:
        points.append(f"{count(len(unseen))} labels had no row to be measured on.")
    return ["## Limits", "\n".join(f"- {point}" for point in points)]


def _best_figures(data: ReportData) -> dict[str, float]:
    """The figures of the kept checkpoint, the one that picked it first."""
    if not data.best:
        return {}
    _, metric, value = data.best
    return {metric: value, **{n: v for n, v in (data.best_record or {}).get("metrics", {}).items() if n != metric}}


def _thresholds(data: ReportData) -> str:
    found = [r.get("threshold") for r in data.details.get("per_class") or []]
    if not found or None in found:
        return f"[{data.setting('task.thresholds', 0.5)}] * model.config.num_labels"
    if len(set(found)) == 1:
        return f"[{found[0]:g}] * model.config.num_labels"
    return "[" + ", ".join(f"{t:.4g}" for t in found) + "]"


def _pairs(data: ReportData) -> bool:
    return data.setting("data.columns.text_pair") is not None


def _file(path: str) -> str:
    """A card goes out into the world; where files lie on this machine stays here."""
    return PurePath(str(path)).name


def _dataset(data: ReportData) -> str:
    """The hub's name of the data set, or its file's without endings; its folder's where the file is just `train`."""
    name = one_line(data.setting("data.train", ""))
    if HUB_NAME.fullmatch(name) and "." not in name:
        return name
    stem, folder = _file(name).split(".")[0], PurePath(name).parent.name
    return one_line(folder or data.name) if stem in ("", "train", "training", "data") else stem
