"""`regraft evaluate` and `regraft predict`: figures on labelled rows, answers for texts, streaming in flat memory."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import IO, Any

import numpy as np

from regraft.engine.config import changed_data
from regraft.engine.data.rows import Rows
from regraft.engine.data.source import suited_to
from regraft.engine.errors import DataError
from regraft.engine.figures import figure
from regraft.engine.live_input import as_they_come, is_live, reopened
from regraft.engine.tasks.base import Prediction
from regraft.engine.trained import Trained, load_trained, takes_pairs

CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Answer:
    """A prediction with the text it is for, and what stood beside it. `cut_tokens`: tokens that did not fit the model."""

    text: str
    pair: Any
    prediction: Prediction
    cut_tokens: int


def predict(trained: Trained, texts: Iterable[str | tuple[str, Any]]) -> Iterator[Answer]:
    """Answers in the order of `texts`: texts, or pairs of a text and its second text (or what else the task takes beside
    it, or None).

    Memory does not grow with the number of texts. Raises DataError naming the place in `texts` of what is neither.
    """
    yield from answers_of(trained, in_chunks(checked(texts, takes_pairs(trained) is not None)))


def in_chunks(texts: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """The texts in lists of CHUNK_ROWS."""
    source = iter(texts)
    while chunk := list(islice(source, CHUNK_ROWS)):
        yield chunk


def checked(texts: Iterable[str | tuple[str, Any]], text_beside: bool = False) -> Iterator[tuple[str, Any]]:
    """Each as a pair: a text alone has None beside it. `text_beside`: nothing but a text may stand there.

    Raises DataError for all that is neither a text nor such a pair.
    """
    if isinstance(texts, str):
        raise DataError(f"texts: expected several texts, found one: {texts[:60]!r}; put it in a list")
    for number, item in enumerate(texts):
        pair = (item, None) if isinstance(item, str) else item
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise DataError(
                f"texts[{number}]: expected a text, or a pair of a text and a text or None, found {item!r:.60}"
            )
        text, beside = pair
        if text_beside and not isinstance(beside, str | None):
            raise DataError(f"texts[{number}]: expected a text or None as the second of the pair, found {beside!r:.60}")
        for part in (text, beside) if isinstance(beside, str) else (text,):
            if not part.isascii():
                _refuse_halves(part, number)
        yield text, beside


def _refuse_halves(text: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x} at character {error.start}"
        raise DataError(f"texts[{number}]: expected a text, found half of a character: {found}") from None


def answers_of(trained: Trained, chunks: Iterable[list[tuple[str, Any]]]) -> Iterator[Answer]:
    """Answers in order, a chunk of rows at a time. A chunk's rows run by length, so padding in attention is small."""
    from regraft.engine.evaluation import run_all

    for chunk in chunks:
        refuse_other_shape(trained, chunk)
        rows = rows_of(chunk)
        made = trained.task.examples(rows, trained.tokenizer, trained.max_length, labelled=False)
        answers = trained.task.answers(made, run_all(trained.running, made))
        cut = np.zeros(len(chunk), dtype=np.int64)
        if made.cuts is not None and made.row_of is not None:
            cut = np.bincount(made.row_of, weights=made.cuts, minlength=len(chunk)).astype(np.int64)
        elif made.store.truncated and made.row_of is None:
            cut = _cut_tokens(trained, chunk, made.store)
        for (text, pair), answer, lost in zip(chunk, answers, cut, strict=True):
            yield Answer(text, pair, answer, int(lost))


def refuse_other_shape(trained: Trained, texts: Iterable[tuple[str, Any]]) -> None:
    """Raise DataError for a single text where the model learned from pairs, and the other way round."""
    pairs = takes_pairs(trained)
    for text, pair in texts if pairs is not None else ():
        if (pair is not None) != pairs:
            learned = "pairs of texts" if pairs else "single texts"
            found = "has no second text" if pairs else "has a second text"
            raise DataError(f"{trained.folder}: learned from {learned}, and {text[:60]!r} {found}")


def rows_of(texts: Sequence[tuple[str, Any]]) -> Rows:
    """Texts, and what stands beside them, as rows without labels."""
    pairs = [pair for _, pair in texts]
    beside = None if all(pair is None for pair in pairs) else pairs
    return Rows("predict", "<texts>", [text for text, _ in texts], None, np.arange(1, len(texts) + 1), pairs=beside)


def _cut_tokens(trained: Trained, chunk: list[tuple[str, str | None]], store: Any) -> np.ndarray:
    # Only sequences at the limit can have been cut; count what they would have been.
    cut = np.zeros(len(chunk), dtype=np.int64)
    for i in np.flatnonzero(store.lengths == trained.max_length):
        text, pair = chunk[i]
        whole = (
            trained.tokenizer.backend.encode(text, pair) if pair is not None else trained.tokenizer.backend.encode(text)
        )
        cut[i] = len(whole) - trained.max_length
    return cut


def evaluate_file(
    model: str, file: str | None, style: str, task: str | None = None, overrides: Sequence[str] = ()
) -> int:
    """`regraft evaluate`: figures and the per-class table, or JSON. `task`: one of several, by name; `overrides`: of
    what the run's `data` says."""
    from regraft.engine.evaluation import evaluate
    from regraft.engine.heldout import heldout_examples, read_otherwise
    from regraft.engine.progress import ProgressBar
    from regraft.engine.threads import available_threads

    _set_threads(available_threads())
    trained = read_otherwise(load_task(model, task), overrides, file)
    made = heldout_examples(trained, file)
    rows, store = made.rows, made.store
    with ProgressBar("evaluating", len(rows), shown=sys.stderr.isatty()) as bar:
        found = evaluate(trained.running, made, trained.task, progress=bar.advance)
    details = found.accumulated.details()
    if style == "json":
        record = {"data": rows.told, "rows": len(rows), "dropped": rows.dropped, "truncated_rows": store.truncated}
        record |= {"seconds": found.seconds, "metrics": found.metrics, "details": details}
        print(json.dumps(record, ensure_ascii=False, default=float))
        return 0
    print(f"{rows.told}: {len(rows):,} rows in {found.seconds:.1f} s", end="")
    print("".join(f", {n:,} dropped ({rule})" for rule, n in rows.dropped.items()), end="")
    print(f", {store.truncated:,} cut to {trained.max_length} tokens" if store.truncated else "")
    widest = max(16, *map(len, found.metrics))
    for name, value in found.metrics.items():
        print(f"  {name:{widest}} {figure(value)}")
    if details.get("per_class"):
        width = max(len(r["label"]) for r in details["per_class"])
        print(f"\n  {'label':{width}}  precision  recall      f1    rows")
        for r in details["per_class"]:
            print(f"  {r['label']:{width}}  {r['precision']:9.3f}  {r['recall']:6.3f}  {r['f1']:6.3f}  {r['rows']:6,}")
    return 0


def load_task(model: str, task: str | None) -> Trained:
    """The model of a folder, as one of its tasks where one is named. Raises ConfigError and ModelError."""
    trained = load_trained(model)
    if task is None:
        return trained
    from regraft.engine.several.trained import as_task

    return as_task(trained, task)


def predict_command(
    model: str,
    texts: list[str],
    *,
    file: str | None,
    pair: str | None,
    top_k: int | None,
    style: str | None,
    task: str | None = None,
    adapters: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> int:
    """`regraft predict`: write one answer a text to standard output, in order, as they come.

    `adapters`: names of runs in the folder `model`, which answer each text one after the other; `overrides`: of what
    the run's `data` says.
    """
    from regraft.engine.threads import available_threads

    if texts and file:
        raise DataError(f"both --file {file} and texts on the command line were given; expected one of them")
    if pair is not None and len(texts) != 1:
        raise DataError("--pair goes with exactly one text on the command line")
    if top_k is not None and top_k < 1:
        raise DataError(f"--top-k {top_k}: expected at least 1")
    _set_threads(available_threads())
    if len(adapters) > 1 and style not in (None, "jsonl"):
        raise DataError(f"--format {style} takes one --adapter; several are written as jsonl")
    chosen = _chosen(model, adapters, task)
    trained = next(iter(chosen.values()))
    dropped: dict[str, int] = {}
    data = changed_data(suited_to(file, trained.data), list(overrides))
    live = not texts and not file and is_live(sys.stdin.buffer)
    if texts:
        source: Iterable[tuple[str, Any]] = checked([(text, pair) for text in texts])
    else:
        stream = reopened(sys.stdin.buffer) if live else sys.stdin.buffer
        source = trained.task.inputs(file or stream, data, dropped)
    chunks = as_they_come(iter(source), CHUNK_ROWS, sys.stdout.flush) if live else in_chunks(source)
    if len(chosen) > 1:
        _write_several(chosen, chunks, top_k, sys.stdout)
    else:
        spelled = trained.data.model_copy(update={"label_separator": data.label_separator})
        trained = replace(trained, data=spelled)
        style = style or ("table" if sys.stdout.isatty() else "jsonl")
        write = {"table": _write_table, "jsonl": _write_jsonl, "csv": _write_csv}[style]
        write(answers_of(trained, chunks), trained, top_k, sys.stdout)
    for rule, count in dropped.items():
        print(f"{count:,} rows left out: {rule}", file=sys.stderr)
    return 0


def _chosen(model: str, adapters: Sequence[str], task: str | None) -> dict[str, Trained]:
    if not adapters:
        return {"": load_task(model, task)}
    if task is not None:
        raise DataError(f"--task {task}: goes with a model that learned several, not with --adapter")
    from regraft.engine.methods.several import find_adapters, load_adapters

    runs = find_adapters(model, adapters)
    return load_adapters(runs) if len(runs) > 1 else {"": load_trained(runs[0])}


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _write_jsonl(answers: Iterable[Answer], trained: Trained, top_k: int | None, out: IO[str]) -> None:
    for a in answers:
        out.write(json.dumps(_record(a, trained, top_k), ensure_ascii=False) + "\n")


def _record(a: Answer, trained: Trained, top_k: int | None) -> dict[str, Any]:
    record: dict[str, Any] = {"text": a.text} | trained.task.beside(a.text, a.pair)
    record |= _rounded(trained.task.answer(a.prediction, top_k))
    if "scores" in record:
        record.pop("score", None)
    if a.cut_tokens:
        record["cut_tokens"] = a.cut_tokens
    return record


def _write_several(
    chosen: dict[str, Trained], chunks: Iterable[list[tuple[str, Any]]], top_k: int | None, out: IO[str]
) -> None:
    for chunk in chunks:
        each = [answers_of(trained, [chunk]) for trained in chosen.values()]
        for answers in zip(*each, strict=True):
            for (name, trained), a in zip(chosen.items(), answers, strict=True):
                out.write(json.dumps({"adapter": name} | _record(a, trained, top_k), ensure_ascii=False) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item if key == "label" else _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def _write_csv(answers: Iterable[Answer], trained: Trained, top_k: int | None, out: IO[str]) -> None:
    separator = trained.data.label_separator
    if trained.task.kind() == "multilabel" and (taken := [n for n in trained.task.labels if separator in n]):
        raise DataError(
            f"--format csv: the label {taken[0]!r} contains {separator!r}, which stands between labels; choose another "
            "with --set 'data.label_separator=;', or --format jsonl"
        )
    writer = csv.writer(out, lineterminator="\n")
    source = iter(answers)
    first = next(source, None)
    # A task says by its answers whether it has a score for every label.
    scored = {} if first is None else first.prediction.scores
    names = [name for name in trained.task.labels if name in scored and top_k is None]
    ranked = min(top_k or 0, len(scored))
    ranks = [f"{part}_{n + 1}" for n in range(ranked) for part in ("label", "score")]
    writer.writerow(["text", "text_pair", "label", *names, *ranks, "cut_tokens"])
    for a in chain([] if first is None else [first], source):
        scores = [f"{a.prediction.scores[name]:.6f}" for name in names]
        for name, p in a.prediction.top(top_k).items() if ranks else ():
            scores += [name, f"{p:.6f}"]
        label = trained.task.cell(a.prediction, separator)
        writer.writerow([a.text, _second_text(a, trained), label, *scores, a.cut_tokens])


def _second_text(a: Answer, trained: Trained) -> str:
    return trained.task.beside(a.text, a.pair).get("text_pair") or ""


def _write_table(answers: Iterable[Answer], trained: Trained, top_k: int | None, out: IO[str]) -> None:
    for a in answers:
        shown = "  ".join(f"{name} {p:.3f}" for name, p in a.prediction.top(top_k or 3).items())
        text = " ".join(
            " | ".join(filter(None, (a.text, _second_text(a, trained)))).split()
        )  # one line, whatever breaks it
        text = text if len(text) <= 60 else text[:59] + "…"
        cut = f"  ({a.cut_tokens} tokens cut)" if a.cut_tokens else ""
        out.write(f"{text:60}  {trained.task.shown(a.prediction):24}  {shown}{cut}\n")
