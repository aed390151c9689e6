"""What a run did, in one sentence: for the head of the report and of the model card."""

from __future__ import annotations

import math
from pathlib import PurePath

from regraft.engine.report.data import ReportData
from regraft.engine.report.formats import compact, count, duration, metric_name, metric_value

METHODS = {
    "full": "{model} fine-tuned",
    "frozen": "A head trained on the frozen {model}",
    "contrastive": "{model} fine-tuned on pairs of rows",
    "vectors": "A head trained on word vectors",
    "scratch": "A network trained from scratch",
    "lora": "{model} fine-tuned with LoRA",
    "qlora": "{model} fine-tuned with LoRA on 4-bit weights",
    "int8": "{model} fine-tuned with LoRA on 8-bit weights",
    "ia3": "{model} fine-tuned with (IA)^3",
    "bitfit": "The biases of {model} fine-tuned",
    "adapter": "{model} fine-tuned with adapters",
}
TASKS = {
    "multilabel": "multi-label classification",
    "tagging": "token labelling",
    "answering": "question answering",
    "mlm": "masked language modelling",
    "choice": "multiple choice",
    "ordinal": "ordinal regression",
    "several": "several tasks",
}
NAMED_AFTER = {"matthews", "pearson", "spearman"}  # people keep their capital


def model_name(data: ReportData) -> str:
    """The pretrained encoder without the folders it lies in."""
    return PurePath(str(data.setting("model.name", "a pretrained encoder"))).name or "a pretrained encoder"


def from_nothing(data: ReportData) -> bool:
    """Whether the run began with random weights, so that `model.name` is where its tokenizer is from."""
    return data.setting("model.config") is not None


def train_rows(data: ReportData) -> int | None:
    return ((data.data_notes.get("splits") or {}).get("train") or {}).get("rows")


def summary(data: ReportData) -> str:
    """Method, model, rows and time; then the best figure and when it was reached."""
    method = METHODS.get(str(data.setting("method", "full")), f"{{model}} trained with {data.setting('method')}")
    if from_nothing(data):
        method = "An encoder trained from random weights"
    said = method.replace("{model}", model_name(data)) + f" for {TASKS.get(data.task, data.task)}"
    if train_rows(data):
        said += f" on {count(train_rows(data))} rows"
    if data.totals.get("seconds"):
        said += f" in {duration(data.totals['seconds'])}"
    return f"{said}. {best_sentence(data)}"


def best_sentence(data: ReportData) -> str:
    """'Best accuracy on dev: 92.4% (step 462, epoch 2.3).'"""
    if not data.best:
        return "It was not evaluated."
    step, metric, value = data.best
    when, epoch = f"step {count(step)}", (data.best_record or {}).get("epoch")
    if isinstance(epoch, int | float) and math.isfinite(epoch):
        when += f", epoch {compact(round(epoch, 1))}"
    name = metric_name(metric)
    name = name if metric in NAMED_AFTER else name[0].lower() + name[1:]
    return f"Best {name} on {data.split}: {metric_value(metric, value)} ({when})."
