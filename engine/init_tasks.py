"""`regraft init` for rows that are more than columns of text and label: tags, spans, answers, choices, documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.engine.errors import ConfigError, DataError

if TYPE_CHECKING:
    from regraft.engine.config import DataConfig
    from regraft.engine.data.rows import Rows

SUFFIXES = {".conll": "tagging", ".iob": "tagging", ".bio": "tagging", ".conllu": "tagging", ".txt": "mlm"}
SETTINGS = {
    "tagging": (
        ("# tags: iob2", "how spans are spelled for the model: iob2, iob1, bioes, or none for one tag a word"),
        ("# crf: true", "a linear-chain CRF on top, with the scheme's constraints"),
        ("# alignment: first", "which of a word's tokens speak for it: first or mean"),
        ("# metric: f1", "f1, strict_f1, macro_f1, precision, recall or accuracy"),
    ),
    "answering": (
        ("# stride: 128", "tokens that the windows of a long context share"),
        ("# max_answer: 30", "most tokens of an answer"),
        ("# normalise: auto", "how answers are compared: english as SQuAD does, chinese as CMRC 2018"),
    ),
    "mlm": (
        ("# masking: word", "what is hidden together: token, word or span"),
        ("# sentences: none", "nsp or order: a task over pairs of sentences besides"),
    ),
    "choice": (),
}
RULES = {"empty": "drop", "overlap": "longest"}
LENGTHS = {"answering": 384}
BATCH = {"mlm": 64, "answering": 16, "choice": 16}


def guess_task(path: str) -> str | None:
    """The task that a file's ending or first row tells, if it is one of these. Raises DataError for a damaged file."""
    if path.startswith("hub:"):
        return None
    name = Path(path.removesuffix(".gz"))
    if name.suffix in SUFFIXES and not (name.suffix == ".txt" and _has_columns(path)):
        return SUFFIXES[name.suffix]
    if name.suffix not in (".json", ".jsonl", ".ndjson") or not Path(path).is_file():
        return None
    try:
        start = _start(path, 1 << 20).decode("utf-8", errors="replace")  # the last character may be cut
        if start.lstrip()[:1] == "[" or ('"paragraphs"' in start and '"qas"' in start):
            return "answering" if '"qas"' in start else None
        row = json.loads(start.splitlines()[0])
    except (ValueError, IndexError):
        return None
    return _of_row(row) if isinstance(row, dict) else None


def _has_columns(path: str) -> bool:
    """Whether the first lines of a .txt file are rows with tabs, or objects, rather than running text."""
    lines = [line for line in _start(path, 1 << 16).splitlines()[:50] if line.strip()]
    return bool(lines) and all(b"\t" in line or line.startswith(b"{") for line in lines[: max(1, len(lines) - 1)])


def _start(path: str, count: int) -> bytes:
    """The first bytes of a file, unzipped. Raises DataError where there are none to be had."""
    from regraft.engine.config import DataConfig
    from regraft.engine.data.source import find_source, open_bytes

    # Any format does here: what the bytes are is judged by who asked.
    with open_bytes(find_source(path, DataConfig(train=path, format="jsonl"))) as stream:
        return stream.read(count)


def _of_row(row: dict[str, Any]) -> str | None:
    if {"question", "context"} <= row.keys():
        return "answering"
    if isinstance(row.get("choices"), list):
        return "choice"
    label = row.get("label")
    if isinstance(row.get("text"), list) or isinstance(label, dict):
        return "tagging"
    spans = isinstance(label, list) and label and all(isinstance(x, dict | list) for x in label)
    return "tagging" if spans else None


def write_config(path: str, task: str, model: str, dev: str | None, test: str | None) -> str:
    """The YAML of a run. The rows are read once, so that what cannot be used is told now. Raises DataError."""
    from regraft.engine.config import DataConfig
    from regraft.engine.init_command import _line, _scalar

    name = Path(path.removesuffix(".gz"))
    form = {} if name.suffix != ".txt" else {"format": "text"}
    if task == "tagging" and name.suffix in ("", ".tsv", ".annotated", ".txt"):
        form = {"format": "conll"}
    data = DataConfig(train=path, **form)
    rows, data = _read(path, task, data, "train")
    for split, given in (("dev", dev), ("test", test)):
        if given is not None:
            _, data = _read(given, task, data, split)
    counts = ", ".join(f"{n:,} {what}" for what, n in rows.dropped.items())
    gaps = [
        _line(f"  {r}: {v}", f"{counts or 'none of the training rows'}; `error` would stop at the first")
        for r, v in RULES.items()
        if getattr(data, r) == v
    ]
    words = sum(map(len, rows.texts)) / len(rows)
    dev, test = dev or _beside(path, ("dev", "devel", "validation", "valid")), test or _beside(path, ("test",))
    lines = [
        "# Written by `regraft init`; every key that is left out has a default that is right for most runs.",
        f"# {path}: {len(rows):,} rows, {words:,.0f} characters each on average",
        *([f"# labels: {_shown(rows.labels)}"] if task == "tagging" else []),
        "",
        "model:",
        _line(f"  name: {_scalar(model)}", "folder, hub name, package:NAME/PATH, or another run's folder"),
        _line(
            f"  {'' if task in LENGTHS else '# '}max_length: {LENGTHS.get(task, 128)}",
            "tokens of a sequence; longer texts are read in windows",
        ),
        "",
        "task:",
        f"  type: {task}",
        *(_line(f"  {key}", told) for key, told in SETTINGS[task]),
        "",
        "data:",
        f"  train: {_scalar(path)}",
        f"  dev: {_scalar(dev)}" if dev else _line("  dev_fraction: 0.1", "no dev rows beside the training rows"),
        f"  test: {_scalar(test)}" if test else _line("  # test: FILE", "evaluated once, at the end"),
        *(f"  {key}: {value}" for key, value in form.items()),
        *gaps,
        "",
        "training:",
        _line("  # learning_rate: 5.0e-5", "that of the method; 1e-3 for lora"),
        f"  batch_size: {BATCH.get(task, 32)}",
        "  epochs: 3",
    ]
    return "\n".join(lines) + "\n"


def _read(path: str, task: str, data: DataConfig, split: str) -> tuple[Rows, DataConfig]:
    """Rows, and `data` with the rules by which they can be read: what a message says can be left out, is."""
    from regraft.engine.tasks import task_class

    while True:
        try:
            return task_class(task).read(path, data, split=split), data
        except DataError as error:
            rule = next((r for r in RULES if f"data.{r}:" in str(error) and getattr(data, r) != RULES[r]), None)
            if rule is None:
                raise
            data = data.model_copy(update={rule: RULES[rule]})


def _shown(labels: Any) -> str:
    kinds = sorted({kind for spans in labels or () for _, _, kind in spans})
    return f"{len(kinds)} types: {', '.join(kinds[:12])}{', ...' if len(kinds) > 12 else ''}"


def _beside(path: str, words: tuple[str, ...]) -> str | None:
    file = Path(path)
    for word in words if "train" in file.name else ():
        name = file.name.replace("train", word, 1)
        for candidate in (name, name.removesuffix(".gz"), name + ".gz"):
            if file.with_name(candidate).is_file():
                return str(file.with_name(candidate))
    return None


def refuse_columns(task: str, given: dict[str, str | None]) -> None:
    """These tasks name their columns in the data section. Raises ConfigError."""
    named = [f"--{key}" for key, value in given.items() if value is not None]
    if named:
        raise ConfigError(
            f"{', '.join(named)}: a {task} file has columns of its own; set data.columns in the YAML file"
        )
