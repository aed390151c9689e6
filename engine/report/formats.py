"""Numbers, figures and names as a person reads them."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

METRIC_NAMES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "matthews": "Matthews",
    "subset_accuracy": "Subset accuracy",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "mse": "Mean squared error",
    "mae": "Mean absolute error",
    "loss": "Loss",
    "f1": "F1",
    "strict_f1": "Strict F1",
    "answerable_f1": "F1 where there is an answer",
    "exact_match": "Exact match",
    "quadratic_kappa": "Quadratic kappa",
    "mean": "Mean of the tasks' figures",
}
SHARES = {"accuracy", "macro_f1", "micro_f1", "subset_accuracy", "precision", "recall", "f1"} | {
    "strict_f1",
    "exact_match",
    "answerable_f1",
    "no_answer_accuracy",
    "trivial_accuracy",
    "sentence_accuracy",
    "trivial_sentence_accuracy",
}
ERRORS = {"loss", "mse", "mae", "perplexity"}


def figure_of(name: str) -> str:
    """The figure itself: `accuracy` of `sentiment/accuracy`, which is that of one of several tasks."""
    return name.rpartition("/")[2]


def metric_name(name: str) -> str:
    task, _, figure = name.rpartition("/")
    said = METRIC_NAMES.get(figure, figure.replace("_", " ").capitalize())
    return f"{task}: {said}" if task else said


def metric_value(name: str, value: Any) -> str:
    """A share as per cent, anything else as a plain number."""
    return percent(value) if figure_of(name) in SHARES else number(value)


def percent(value: Any, *, unit: str = "%") -> str:
    """0.9127 -> '91.3%'."""
    return f"{100 * float(value):.1f}{unit}" if _finite(value) else "–"


def number(value: Any) -> str:
    """Three decimals near one, three digits for the very small, none for the large."""
    if not _finite(value):
        return "–"
    value = float(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return short_exponent(f"{value:.2e}")
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def count(value: Any) -> str:
    """12345 -> '12,345'."""
    return f"{int(value):,}" if _finite(value) else "–"


def compact(value: float) -> str:
    """For axes: 12000 -> '12k', 0.00005 -> '5e-5'."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return short_exponent(f"{value:.3g}" if "e" in f"{value:.3g}" else f"{value:.1e}")
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def short_exponent(written: str) -> str:
    """'5.00e-05' -> '5e-5'."""
    mantissa, _, exponent = written.partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: Any) -> str:
    """'4.2 s', '2 min 05 s', '3 h 12 min'."""
    if not _finite(seconds):
        return "–"
    seconds = float(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def width(text: str) -> int:
    """Columns a text takes in print: wide East Asian characters count two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def clip(text: str, columns: int) -> str:
    """At most `columns` wide, with an ellipsis where something was cut."""
    if width(text) <= columns:
        return text
    kept = ""
    for c in text:
        if width(kept + c) > columns - 1:
            break
        kept += c
    return kept.rstrip() + "…"


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
