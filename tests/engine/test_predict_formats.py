"""Answers of every task as jsonl, csv and table; what a file or standard input may ask, and what is told of faults."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from regraft.engine.cli import main
from regraft.engine.config import load_config
from regraft.engine.errors import DataError
from regraft.engine.predict import predict
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train

WORD = {"text": ["good", "film"], "label": ["B-A", "O"]}
ROWS = {
    "classification": {"text": "good film", "label": "x"},
    "multilabel": {"text": "good film", "label": ["x"]},
    "regression": {"text": "good film", "label": 1.5},
    "ordinal": {"text": "good film", "label": 1},
    "tagging": WORD,
    "answering": {"question": "good", "context": "very good film", "answers": [{"text": "film", "answer_start": 10}]},
    "choice": {"text": "good", "choices": ["film", "plot"], "label": 0},
    "mlm": {"text": "good film very slow plot"},
}
OTHERS = {
    "classification": {"text": "bad film", "label": "y"},
    "multilabel": {"text": "bad film", "label": ["x", "y"]},
    "regression": {"text": "bad film", "label": 0.5},
    "ordinal": {"text": "bad film", "label": 2},
}
ASKED = {
    "answering": {"question": "good", "context": "very good film"},
    "choice": {"text": "good", "choices": ["film", "plot"]},
    "tagging": {"words": ["good", "film"]},
    "mlm": {"text": "good [MASK]"},
}
HEADER = "text,text_pair,label"
SCORED = {"classification": ",x,y", "multilabel": ",x,y", "ordinal": ",1,2"}


@pytest.fixture
def run_of(make_config, tmp_path):
    def make(kind: str) -> Path:
        file = tmp_path / "rows.jsonl"
        lines = [json.dumps(row) for row in (ROWS[kind], OTHERS.get(kind, ROWS[kind]))] * 8
        file.write_text("\n".join(lines) + "\n")
        config = make_config(
            data={"train": str(file), "dev": str(file)},
            task={"type": kind},
            training={"max_steps": 1, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "threads": 1},
        )
        return train(load_config(config), quiet=True).folder

    return make


@pytest.fixture
def ask(monkeypatch, capsys):
    """The command with these lines on standard input: its exit code, output and complaint."""

    def run(folder: Path, content: str | bytes, *options: str) -> tuple[int, str, str]:
        content = content.encode() if isinstance(content, str) else content
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        code = main(["predict", str(folder), *map(str, options)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize("kind", ROWS)
def test_every_task_answers_in_every_format(run_of, ask, kind):
    folder, line = run_of(kind), json.dumps(ASKED.get(kind, {"text": "good film"})) + "\n"
    code, out, err = ask(folder, line * 2, "--format", "jsonl")
    assert code == 0 and len(out.splitlines()) == 2, err
    record = json.loads(out.splitlines()[0])
    if kind == "tagging":
        assert record["words"] == ["good", "film"] and "text_pair" not in record
    if kind == "choice":
        assert [c["text"] for c in record["choices"]] == ["film", "plot"] and "text_pair" not in record
    code, out, err = ask(folder, line * 2, "--format", "csv")
    assert code == 0, err
    header, *found = list(csv.reader(io.StringIO(out)))
    assert ",".join(header) == f"{HEADER}{SCORED.get(kind, '')},cut_tokens"
    assert len(found) == 2 and all(len(row) == len(header) for row in found)
    code, out, err = ask(folder, line * 2, "--format", "csv", "--top-k", "1")
    assert code == 0 and ("label_1" in out) == (kind in SCORED), err
    code, out, err = ask(folder, line * 2, "--format", "table")
    assert code == 0 and len(out.splitlines()) == 2 and "good" in out, err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "<stdin>:2: choices: expected a list of at least two texts"),
        ('{"text": "x"}', "<stdin>:2: choices: expected a list of at least two texts"),
        ('{"choices": ["a", "b"]}', "<stdin>:2: text: field required"),
        ("{broken", "<stdin>:2: not valid JSON"),
        ('{"text": "x", "choices": ["a\\ud800", "b"]}', "<stdin>:2: \\ud800 is half of a character"),
    ],
)
def test_what_is_no_choice_is_told_by_its_line(make_config, run_of, ask, line, message):
    good = json.dumps(ASKED["choice"])
    code, out, err = ask(run_of("choice"), f"{good}\n{line}\n")
    assert (code, out.count("\n")) == (2, 0) and message in err


def test_tags_are_asked_of_texts_of_words_and_of_files(run_of, ask, tmp_path):
    folder = run_of("tagging")
    code, out, err = ask(folder, 'good film\n\n{"text": "good", "id": 7}\n{"words": ["good", "film"]}\n')
    assert code == 0, err
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["good film", "", "good", "good film"]
    for line, message in (
        (b'{"words": "good"}', "<stdin>:1: words: expected a list of words"),
        (b'{"words": ["good", ""]}', "<stdin>:1: words: expected words that are not empty"),
        (b'{"words": ["\\ud800"]}', "<stdin>:1: \\ud800 is half of a character"),
        (b"caf\xe9", "<stdin>:1: byte 0xe9 at position 4"),
    ):
        code, _, err = ask(folder, line)
        assert code == 2 and message in err
    (tmp_path / "x.TXT.gz").write_bytes(gzip.compress(b"good film\nvery good\n"))
    code, out, err = ask(folder, "", "--file", tmp_path / "x.TXT.gz")
    assert code == 0 and len(out.splitlines()) == 2, err


def test_questions_of_a_file_that_are_left_out_are_counted(run_of, ask, tmp_path):
    folder = run_of("answering")
    rows = [ASKED["answering"], {"question": " ", "context": "film"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = ask(folder, "", "--file", tmp_path / "q.jsonl", "--set", "data.empty=drop")
    assert code == 0 and len(out.splitlines()) == 1 and "1 rows left out: empty" in err
    code, out, err = ask(folder, json.dumps({"question": "good " * 80, "context": "very good film"}))
    most = (64 - 3) // 2  # tokens that a question may take of a model's 64
    assert code == 0 and json.loads(out)["cut_tokens"] == 80 - most, err
    assert np.isfinite(json.loads(out)["score"])


@pytest.fixture
def run_on(make_config, tmp_path):
    def make(kind: str, rows: list[dict[str, object]], **data: object) -> Path:
        file = tmp_path / "own.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
        config = make_config(
            data={"train": str(file), "dev": str(file), **data},
            task={"type": kind},
            training={"max_steps": 1, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "threads": 1},
        )
        return train(load_config(config), quiet=True).folder

    return make


def test_small_numbers_keep_their_digits_in_csv_tables_and_lines(run_on, ask, tmp_path, capsys):
    folder = run_on("regression", [{"text": "good film", "label": 4e-5}, {"text": "bad film", "label": 1e-5}])
    told = json.loads(ask(folder, "good film\n", "--format", "jsonl")[1])["label"]
    assert 0 < abs(told) < 1e-3
    header, row = csv.reader(io.StringIO(ask(folder, "good film\n", "--format", "csv")[1]))
    assert float(row[header.index("label")]) == told
    assert f"{told:.4g}" in ask(folder, "good film\n", "--format", "table")[1]
    assert main(["evaluate", str(folder), str(tmp_path / "own.jsonl")]) == 0
    figures = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert 0 < float(figures["mse"]) < 1e-8 and 0 < float(figures["mae"]) < 1e-3
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert f"mse {figures['mse']}" in capsys.readouterr().out


def test_labels_in_csv_can_be_taken_apart_again(run_on, ask):
    rows = [{"text": "good film", "label": "fear, deep|joy"}, {"text": "bad film", "label": "joy"}]
    folder = run_on("multilabel", rows, label_separator="|")
    spec = json.loads((folder / "best" / "regraft.json").read_text())

    def answered(threshold: float, *options: str) -> tuple[int, list[list[str]], str]:
        spec["task"]["thresholds"] = [threshold] * 2
        (folder / "best" / "regraft.json").write_text(json.dumps(spec))
        code, out, err = ask(folder, "good film\n", "--format", "csv", *options)
        return code, list(csv.reader(io.StringIO(out))), err

    assert answered(1e-6)[1][1][2].split("|") == ["fear, deep", "joy"]
    assert answered(1e-6, "--set", "data.label_separator=;")[1][1][2].split(";") == ["fear, deep", "joy"]
    assert answered(1 - 1e-6)[1][1][2] == ""
    code, written, err = answered(1e-6, "--set", "data.label_separator=','")
    assert (code, written) == (2, []) and "the label 'fear, deep' contains ','" in err


def test_nothing_found_is_an_empty_cell(run_of, ask):
    folder = run_of("tagging")
    header, *rows = csv.reader(io.StringIO(ask(folder, "good film\n\n", "--format", "csv")[1]))
    assert rows[1][header.index("label")] == ""


def test_python_takes_texts_and_pairs_and_names_what_is_neither(run_of):
    model = load_trained(run_of("classification"))
    alone, paired = (list(predict(model, texts)) for texts in (["good film", "x"], [("good film", None), ["x", None]]))
    assert alone == paired and [a.text for a in alone] == ["good film", "x"]
    for texts, told in (
        ("good", "texts: expected several texts, found one: 'good'; put it in a list"),
        (["a", None], "texts[1]: expected a text, or a pair of a text and a text or None, found None"),
        ([(None, None)], "texts[0]: expected a text, or a pair of a text and a text or None, found (None, None)"),
        ([{"text": "a"}], "texts[0]: expected a text, or a pair of a text and a text or None, found {'text': 'a'}"),
        ([("a", "b", "c")], "texts[0]: expected a text, or a pair"),
        ([("a", 3)], "texts[0]: expected a text or None as the second of the pair, found 3"),
        (["fine", "caf\ud800"], "texts[1]: expected a text, found half of a character: \\ud800 at character 3"),
        ([("fine", "\ud800")], "texts[0]: expected a text, found half of a character: \\ud800 at character 0"),
    ):
        with pytest.raises(DataError, match=re.escape(told)):
            list(predict(model, texts))


class Feeder:
    """A pipe as standard input whose second line comes when the first has been answered, and the output that shows it."""

    def __init__(self, first: str, second: str) -> None:
        self.lines, self.written, self.seen = (first, second), "", 0
        self.answered = threading.Event()
        read, self.end = os.pipe()
        self.buffer = os.fdopen(read, "rb")
        self.thread = threading.Thread(target=self.feed)
        self.thread.start()

    def feed(self) -> None:
        with os.fdopen(self.end, "w") as pipe:
            pipe.write(self.lines[0])
            pipe.flush()
            self.in_time = self.answered.wait(20)
            pipe.write(self.lines[1])

    def write(self, text: str) -> None:
        self.written += text

    def flush(self) -> None:
        if self.written.count("\n") > self.written.startswith("text,"):
            self.answered.set()

    def isatty(self) -> bool:
        return False


def predict_from(fed: Feeder, folder: Path, style: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `regraft predict` between both ends of a pipe."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", fed)
        patched.setattr(sys, "stdout", fed)
        code = main(["predict", str(folder), "--format", style])
    fed.thread.join()
    return code


@pytest.mark.parametrize("style", ["jsonl", "csv", "table"])
def test_a_pipe_is_answered_as_it_comes(run_of, monkeypatch, style):
    fed = Feeder("good film\n", "bad film\n\n")
    code = predict_from(fed, run_of("classification"), style, monkeypatch)
    assert code == 0 and fed.in_time
    answers = fed.written.splitlines()[style == "csv" :]
    assert len(answers) == 3 and "good film" in answers[0] and "bad film" in answers[1]


def test_what_came_before_a_fault_in_a_pipe_is_answered(run_of, monkeypatch, capsys):
    fed = Feeder("good film\n", "{broken\n")
    code = predict_from(fed, run_of("classification"), "jsonl", monkeypatch)
    assert code == 2 and len(fed.written.splitlines()) == 1 and fed.in_time
    assert "<stdin>:2: not valid JSON" in capsys.readouterr().err


def test_a_blank_line_is_an_empty_text_unless_it_stands_among_objects(run_of, ask, tmp_path):
    folder, object_line = run_of("classification"), '{"text": "good"}\n'
    for lines, texts in (
        ("good film\n\n \nbad\n", ["good film", "", " ", "bad"]),
        (object_line + "\n" + object_line + "\n", ["good", "good"]),
    ):
        code, out, err = ask(folder, lines)
        assert code == 0 and [json.loads(line)["text"] for line in out.splitlines()] == texts, err
    (tmp_path / "x.txt").write_text("good film\n\nbad\n")
    assert len(ask(folder, "", "--file", tmp_path / "x.txt")[1].splitlines()) == 3
    for options in ([], ["--file", tmp_path / "x.txt"]):
        code, out, err = ask(folder, "good film\n\nbad\n", *options, "--set", "data.empty=drop")
        assert code == 0 and len(out.splitlines()) == 2 and "1 rows left out: empty" in err


@pytest.mark.parametrize("kind", ["choice", "answering"])
def test_a_blank_line_is_passed_over_where_a_line_is_more_than_a_text(run_of, ask, kind):
    line = json.dumps(ASKED[kind])
    code, out, err = ask(run_of(kind), f"\n{line}\n \n{line}\n\n")
    assert code == 0 and len(out.splitlines()) == 2, err
