"""`regraft init`: guesses columns and task from the rows, and writes a configuration that is accepted as it is."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from regraft.engine.cli import main
from regraft.engine.config import load_config
from regraft.engine.data.read import read_rows
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.init_command import init_config

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("REGRAFT_DATA", ROOT / "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")

WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "actor",
    "was",
    "is",
    "very",
    "quite",
    "not",
    "good",
    "bad",
    "slow",
    "great",
    "boring",
    "funny",
    "dull",
    "sharp",
    "end",
    "start",
]


def sentences(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(4, 14))) + f" {i}" for i in range(count)]


def config_of(path, **given):
    """What `init` writes, as `train` would load it; and the text itself."""
    text = init_config(str(path), **given)
    written = Path(path).parent / "written.yaml"
    written.write_text(text)
    return load_config(written), text


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_names_tell_the_columns(tmp_path):
    path = write(
        tmp_path / "a.csv",
        ["id,review,stars_text,category", *(f"{i},{t},x,{'ab'[i % 2]}" for i, t in enumerate(sentences(50)))],
    )
    config, text = config_of(path)
    assert config.data.columns.model_dump() == {"text": "review", "text_pair": None, "label": "category"}
    assert config.task.type == "classification"
    assert "50 usable rows" in text and "2 classes" in text


def test_content_tells_the_columns_where_names_do_not(tmp_path):
    rows = [f"K{i:05}\t{['yes', 'no', 'maybe'][i % 3]}\t{t}" for i, t in enumerate(sentences(200))]
    config, _ = config_of(write(tmp_path / "a.tsv", ["key\tverdict\twords", *rows]))
    assert config.data.columns.model_dump() == {"text": "words", "text_pair": None, "label": "verdict"}


def test_a_missing_header_is_seen(tmp_path):
    rows = [f"{t}\t{['pos', 'neg'][i % 2]}" for i, t in enumerate(sentences(100))]
    config, _ = config_of(write(tmp_path / "a.tsv", rows))
    assert not config.data.header
    assert config.data.columns.model_dump() == {"text": 0, "text_pair": None, "label": 1}


@pytest.mark.parametrize("names", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2")])
def test_pairs_are_known_by_their_names(tmp_path, names):
    lines = [
        json.dumps({names[0]: a, names[1]: b, "label": i % 2})
        for i, (a, b) in enumerate(zip(sentences(30), sentences(30, 1), strict=True))
    ]
    config, _ = config_of(write(tmp_path / "a.jsonl", lines))
    assert (config.data.columns.text, config.data.columns.text_pair) == names


@pytest.mark.parametrize(
    ("labels", "task_type", "separator"),
    [
        ([0, 1, 2], "classification", ","),
        (["yes", "no", "yes"], "classification", ","),
        ([0.5, 1.25, 4.0], "regression", ","),
        ([["a", "b"], [], ["b"]], "multilabel", ","),
        (["a|b", "b", "a|c"], "multilabel", "|"),
        (["3, 7", "7", "3"], "multilabel", ","),
        (["Smith, J.", "Jones, K.", "Smith, J."], "classification", ","),
    ],
    ids=str,
)
def test_labels_tell_the_task(tmp_path, labels, task_type, separator):
    lines = [json.dumps({"text": t, "label": labels[i % 3]}) for i, t in enumerate(sentences(90))]
    config, _ = config_of(write(tmp_path / "a.jsonl", lines))
    assert (config.task.type, config.data.label_separator) == (task_type, separator)


def test_many_different_whole_numbers_are_a_regression(tmp_path):
    lines = [json.dumps({"text": t, "score": i * 7 % 1000}) for i, t in enumerate(sentences(900))]
    assert config_of(write(tmp_path / "a.jsonl", lines))[0].task.type == "regression"


def test_parquet_and_gzip_are_looked_into(tmp_path):
    table = pa.table({"text": sentences(40), "label": ["a", "b"] * 20})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert config_of(tmp_path / "a.parquet")[0].data.columns.label == "label"
    zipped = tmp_path / "a.tsv.gz"
    zipped.write_bytes(
        gzip.compress("\n".join(["text\tlabel", *(f"{t}\t{i % 2}" for i, t in enumerate(sentences(40)))]).encode())
    )
    assert config_of(zipped)[0].data.columns.text == "text"


def test_format_encoding_and_quoting_are_set_where_they_differ(tmp_path):
    rows = [f'"{t},\n\tcafé"\t{i % 2}' for i, t in enumerate(sentences(300))]
    path = tmp_path / "reviews.dat"
    path.write_bytes("\n".join(["text\tlabel", *rows, ""]).encode("latin-1"))
    config, text = config_of(path)
    assert (config.data.format, config.data.encoding, config.data.quoting) == ("tsv", "latin-1", "standard")
    assert len(read_rows(config.data, "train", task_type="classification")) == 300
    assert "300 usable rows" in text


def test_gaps_are_counted_and_the_rule_that_leaves_them_out_is_written(tmp_path):
    rows = [f"{t}\t{i % 2}" for i, t in enumerate(sentences(50))]
    config, text = config_of(write(tmp_path / "a.tsv", ["text\tlabel", *rows, " \t1", "word one\t", "word two\t"]))
    assert (config.data.missing, config.data.empty) == ("drop", "drop")
    assert "2 rows have no text or no label" in text and "1 rows have a blank text" in text
    clean, _ = config_of(write(tmp_path / "b.tsv", ["text\tlabel", *rows]))
    assert (clean.data.missing, clean.data.empty) == ("error", "error")


def test_imbalance_and_long_texts_are_told(tmp_path):
    rows = [f"{t}\t{'rare' if i % 20 == 0 else 'common'}" for i, t in enumerate(sentences(200))]
    _, text = config_of(write(tmp_path / "a.tsv", ["text\tlabel", *rows, "word " * 900 + "\tcommon"]))
    assert "# class_weights: balanced" in text and "19 times the rows of the smallest" in text
    assert "of the rows have more than 512" in text


def test_files_beside_the_training_file_are_found_if_they_are_labelled(tmp_path):
    rows = ["text\tlabel", *(f"{t}\t{i % 2}" for i, t in enumerate(sentences(40)))]
    train = write(tmp_path / "train.tsv", rows)
    write(tmp_path / "dev.tsv", rows[:11])
    write(tmp_path / "test.tsv", ["id\ttext", "1\tno label here"])
    config, _ = config_of(train)
    assert (config.data.dev, config.data.test) == (str(tmp_path / "dev.tsv"), None)


def test_what_is_given_is_not_guessed(tmp_path):
    lines = [
        json.dumps({"title": t, "text": t + " more", "kind": i % 2, "label": i % 3})
        for i, t in enumerate(sentences(40))
    ]
    path = write(tmp_path / "a.jsonl", lines)
    config, _ = config_of(path, text="title", label="kind", model="some/encoder", task="multilabel", test=str(path))
    assert config.data.columns.model_dump() == {"text": "title", "text_pair": None, "label": "kind"}
    assert (config.model.name, config.task.type, config.data.test) == ("some/encoder", "multilabel", str(path))


def test_a_column_given_wrongly_is_told_with_the_nearest(tmp_path):
    path = write(tmp_path / "a.csv", ["review,label", *(f"{t},{i % 2}" for i, t in enumerate(sentences(20)))])
    with pytest.raises(ConfigError, match=r"--text reviews: no such column \(did you mean 'review'\?\)"):
        init_config(str(path), text="reviews")
    with pytest.raises(ConfigError, match="named twice"):
        init_config(str(path), text="review", label="review")


def test_names_that_yaml_would_misread_stay_names(tmp_path):
    names = ("yes: it's", "# 1")
    lines = [json.dumps({names[0]: t, names[1]: i % 2}) for i, t in enumerate(sentences(40))]
    config, _ = config_of(write(tmp_path / "a.jsonl", lines))
    assert (config.data.columns.text, config.data.columns.label) == names


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.tsv", "", "is empty"),
        ("a.csv", "text\nonly texts here\nand here\n", "one column only"),
        ("a.jsonl", '{"text": "a"\n', "expected one JSON object a line"),
        ("a.jsonl", '{"text": "every one", "id": 1}\n{"text": "is different", "id": 2}\n', "--label COLUMN"),
    ],
)
def test_data_that_cannot_be_used_is_told(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told):
        init_config(str(tmp_path / name))


def test_the_command_writes_a_file_once_and_says_what_it_saw(tmp_path, capsys):
    path = write(tmp_path / "a.csv", ["text,label", *(f"{t},{i % 2}" for i, t in enumerate(sentences(20)))])
    out = tmp_path / "run.yaml"
    assert main(["init", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "20 usable rows" in printed and f"regraft train {out}" in printed
    assert load_config(out).data.train == str(path)
    out.write_text("mine")
    assert main(["init", str(path), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err and out.read_text() == "mine"
    assert main(["init", str(path), "--out", str(out), "--force"]) == 0
    assert yaml.safe_load(out.read_text())["data"]["train"] == str(path)


def test_a_missing_file_ends_with_one_line_and_no_configuration(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "regraft.engine", "init", "nowhere.tsv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("regraft: nowhere.tsv: no such file")
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


REAL = [
    ("glue-sst2/train.tsv.gz", "classification", {"text": "sentence", "text_pair": None, "label": "label"}),
    ("glue-cola/train.tsv", "classification", {"text": 3, "text_pair": None, "label": 1}),
    ("agnews-part/train-part10k.tsv.gz", "classification", {"text": 0, "text_pair": None, "label": 1}),
    ("goemotions/train.tsv.gz", "multilabel", {"text": 0, "text_pair": None, "label": 1}),
    ("banking77/train.csv", "classification", {"text": "text", "text_pair": None, "label": "category"}),
    ("glue-rte/train.tsv", "classification", {"text": "sentence1", "text_pair": "sentence2", "label": "label"}),
    ("glue-stsb/train.tsv", "regression", {"text": "sentence1", "text_pair": "sentence2", "label": "score"}),
    ("zh-afqmc/train.txt.gz", "classification", {"text": 0, "text_pair": 1, "label": 2}),
    ("zh-tnews/train.tsv.gz", "classification", {"text": 0, "text_pair": None, "label": 1}),
    ("amazon-blitzer/books/train.tsv.gz", "classification", {"text": "sentence", "text_pair": None, "label": "label"}),
    (
        "amazon-blitzer/airline/train.tsv.gz",
        "classification",
        {"text": "sentence", "text_pair": None, "label": "label"},
    ),
]


@needs_data
@pytest.mark.parametrize(("name", "task_type", "columns"), REAL, ids=[r[0] for r in REAL])
def test_real_data_sets_are_understood(tmp_path, name, task_type, columns):
    written = tmp_path / "run.yaml"
    written.write_text(init_config(str(DATA / name)))
    config = load_config(written)
    assert config.task.type == task_type and config.data.columns.model_dump() == columns
    if config.data.dev:
        assert len(read_rows(config.data, "dev", task_type=task_type)) > 0


def test_an_order_of_words_is_asked_for_and_numbers_have_one(tmp_path):
    rows = "".join(f"a text number {i} that is here,{('low', 'high', 'middle')[i % 3]}\n" for i in range(30))
    (tmp_path / "t.csv").write_text("text,label\n" + rows)
    written = init_config(str(tmp_path / "t.csv"), task="ordinal", model="m")
    assert "type: ordinal" in written and "# labels: [high, low, middle]" in written and "lowest first" in written
    (tmp_path / "n.csv").write_text(
        "text,label\n" + rows.replace("low", "0.5").replace("high", "1.0").replace("middle", "1.5")
    )
    written = init_config(str(tmp_path / "n.csv"), task="ordinal", model="m")
    assert "numbers have one" in written and "quadratic_kappa" in written
    assert main(["init", str(tmp_path / "n.csv"), "--task", "ordinal", "--out", str(tmp_path / "run.yaml")]) == 0


def test_the_order_that_is_offered_is_accepted_when_it_is_uncommented(tmp_path):
    numbers = ("0.5", "10", "2", "007")
    rows = [f"a text number {i} that is here,{numbers[i % 4]}" for i in range(40)]
    path = write(tmp_path / "n.csv", ["text,label", *rows])
    written = init_config(str(path), task="ordinal", model="m")
    assert "  # labels: [0.5, 2, '007', 10]" in written
    (tmp_path / "run.yaml").write_text(written.replace("# labels: [0.5", "labels: [0.5"))
    assert load_config(tmp_path / "run.yaml").task.labels == ["0.5", "2", "007", "10"]


def test_a_faulty_file_beside_the_training_file_is_told_and_left_out(tmp_path):
    rows = ["text,label", *(f"{t},{i % 2}" for i, t in enumerate(sentences(40)))]
    train = write(tmp_path / "train.csv", rows)
    write(tmp_path / "dev.csv", [*rows[:5], "fine,1,extra"])
    write(tmp_path / "test.csv", ["text", "no label here"])
    config, text = config_of(train)
    assert (config.data.dev, config.data.test) == (None, None)
    assert f"# {tmp_path / 'dev.csv'} left out: {tmp_path / 'dev.csv'}:6: expected 2 fields" in text
    assert text.count("dev.csv left out") == 1 and "test.csv" not in text


@pytest.mark.parametrize("given", ["dev", "test"])
def test_files_that_are_given_are_read(tmp_path, given):
    train = write(tmp_path / "a.csv", ["text,label", *(f"{t},{i % 2}" for i, t in enumerate(sentences(40)))])
    words = write(tmp_path / "a.conll", ["good B-A", "film O", "", "good B-A", "plot O"])
    for rows in (train, words):
        with pytest.raises(DataError, match=r"nope\.csv: no such file"):
            init_config(str(rows), **{given: str(tmp_path / f"nope{rows.suffix}")[: -len(rows.suffix)] + ".csv"})
        empty = tmp_path / f"empty{rows.suffix}"
        empty.write_text("")
        with pytest.raises(DataError, match=r"empty\.c"):
            init_config(str(rows), **{given: str(empty)})


@pytest.mark.parametrize(
    ("labels", "task", "told"),
    [
        (["good", "bad"], "regression", r"a\.csv:2, column 'label': 'good' is not a number"),
        (["0.5", "nan"], None, r"a\.csv:3, column 'label': 'nan' is not a finite number"),
        (["0.5", "inf"], None, r"a\.csv:3, column 'label': 'inf' is not a finite number"),
        (["good"], None, "all 40 rows have the label 'good'"),
        (["3"], "ordinal", "all 40 rows have the label '3'"),
        (["3"], "regression", "all 40 rows have the value 3"),
    ],
)
def test_labels_that_no_training_could_begin_with_are_refused(tmp_path, labels, task, told):
    rows = [f"{t},{labels[i % len(labels)]}" for i, t in enumerate(sentences(40))]
    path = write(tmp_path / "a.csv", ["text,label", *rows])
    with pytest.raises(DataError, match=told):
        init_config(str(path), label="label", task=task)
