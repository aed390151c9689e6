"""Real data sets in their original formats read with a configuration that fits, to the last row."""

import gzip
import os
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from regraft.engine.config import ColumnsConfig, DataConfig
from regraft.engine.data.read import iter_texts, read_file
from regraft.engine.data.split import split_dev
from regraft.engine.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("REGRAFT_DATA", ROOT / "../shared/data"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")

NO_HEADER = {"header": False}
QUOTED = {"quoting": "standard"}
PAIR = {"text": "sentence1", "text_pair": "sentence2"}
DOMAINS = ("books", "dvd", "electronics", "kitchen", "airline")

# file, task, columns, settings, rows, classes (None for a regression)
FILES = [
    ("glue-sst2/train.tsv.gz", "classification", {"text": "sentence"}, {}, 67_349, 2),
    ("glue-sst2/dev.tsv", "classification", {"text": "sentence"}, {}, 872, 2),
    ("glue-cola/train.tsv", "classification", {"text": 3, "label": 1}, NO_HEADER, 8_551, 2),
    ("glue-cola/dev.tsv", "classification", {"text": 3, "label": 1}, NO_HEADER, 1_043, 2),
    ("agnews-part/train-part10k.tsv.gz", "classification", {"text": 0, "label": 1}, NO_HEADER, 10_001, 4),
    ("agnews-part/test.tsv.gz", "classification", {"text": 0, "label": 1}, NO_HEADER, 7_600, 4),
    ("goemotions/train.tsv.gz", "multilabel", {"text": 0, "label": 1}, NO_HEADER, 43_410, 28),
    ("goemotions/dev.tsv", "multilabel", {"text": 0, "label": 1}, NO_HEADER, 5_426, 28),
    ("goemotions/test.tsv", "multilabel", {"text": 0, "label": 1}, NO_HEADER, 5_427, 28),
    ("banking77/train.csv", "classification", {"label": "category"}, {}, 10_003, 77),
    ("banking77/test.csv", "classification", {"label": "category"}, {}, 3_080, 77),
    ("glue-rte/train.tsv", "classification", PAIR, {}, 2_490, 2),
    ("glue-rte/dev.tsv", "classification", PAIR, {}, 277, 2),
    ("glue-stsb/train.tsv", "regression", {**PAIR, "label": "score"}, {}, 5_749, None),
    ("glue-stsb/dev.tsv", "regression", {**PAIR, "label": "score"}, {}, 1_500, None),
    (
        "zh-afqmc/train.txt.gz",
        "classification",
        {"text": 0, "text_pair": 1, "label": 2},
        {**NO_HEADER, "format": "tsv"},
        34_334,
        2,
    ),
    (
        "zh-afqmc/dev.txt",
        "classification",
        {"text": 0, "text_pair": 1, "label": 2},
        {**NO_HEADER, "format": "tsv"},
        4_316,
        2,
    ),
    ("zh-tnews/train.tsv.gz", "classification", {"text": 0, "label": 1}, NO_HEADER, 53_360, 15),
    ("zh-tnews/dev.tsv", "classification", {"text": 0, "label": 1}, NO_HEADER, 10_000, 15),
    *((f"amazon-blitzer/{d}/train.tsv", "classification", {"text": "sentence"}, QUOTED, 1_700, 2) for d in DOMAINS),
    *((f"amazon-blitzer/{d}/dev.tsv", "classification", {"text": "sentence"}, QUOTED, 300, 2) for d in DOMAINS),
    *(
        (f"amazon-blitzer/{d}/test-labeled.tsv.gz", "classification", {"text": "sentence"}, QUOTED, 2_000, 2)
        for d in DOMAINS
    ),
]


def found(name):
    path = DATA / name
    path = path if path.exists() else path.with_name(path.name + ".gz")
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def config(columns, **settings):
    return DataConfig(train="unused", columns=ColumnsConfig(**columns), **settings)


@pytest.mark.parametrize(
    ("name", "task_type", "columns", "settings", "count", "classes"), FILES, ids=[f[0] for f in FILES]
)
def test_every_row_is_read_and_labelled(name, task_type, columns, settings, count, classes):
    path = found(name)
    rows = read_file(path, config(columns, **settings), split="train", task_type=task_type)
    assert len(rows) == count and rows.dropped == {}
    assert (rows.pairs is not None) == ("text_pair" in columns)
    assert all(text.strip() for text in rows.texts)
    if classes is None:
        assert all(0 <= float(label) <= 5 for label in rows.labels)
    elif task_type == "multilabel":
        assert {name for row in rows.labels for name in row} == {str(i) for i in range(classes)}
    else:
        assert len(Counter(rows.labels)) == classes
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as stream:
        lines = stream.read().split(b"\n")
    for i in (0, count // 2, count - 1):
        line = lines[rows.lines[i] - 1]
        line = line.replace(b'""', b'"') if settings is QUOTED else line
        assert rows.texts[i].split("\n")[0].strip()[:20].encode() in line


def test_test_files_without_labels_are_read_where_none_are_needed():
    rows = read_file(
        found("glue-sst2/test.tsv"),
        config({"text": "sentence"}),
        split="test",
        task_type="classification",
        need_labels=False,
    )
    assert len(rows) == 1_821 and rows.labels is None
    with pytest.raises(DataError, match=r"no column 'label'.*columns: 'index', 'sentence'"):
        read_file(found("glue-sst2/test.tsv"), config({"text": "sentence"}), split="test", task_type="classification")


@pytest.mark.parametrize(("name", "count", "classes"), [("TREC.train", 5_452, 50), ("TREC.test", 500, 50)])
def test_questions_in_latin_1_are_read_once_the_encoding_is_given(tmp_path, name, count, classes):
    raw = found(f"trec6/raw/{name}").read_bytes()
    path = tmp_path / "trec.tsv"
    path.write_bytes(b"".join(line.replace(b" ", b"\t", 1) for line in raw.splitlines(keepends=True)))
    settings = {"header": False, "encoding": "latin-1"}
    rows = read_file(path, config({"text": 1, "label": 0}, **settings), split="train", task_type="classification")
    assert len(rows) == count and len({label.split(":")[0] for label in rows.labels}) == 6
    if name == "TREC.train":
        assert len(set(rows.labels)) == classes
        with pytest.raises(DataError, match=r"trec\.tsv:66: byte 0xf0 .* data\.encoding: latin-1"):
            read_file(path, config({"text": 1, "label": 0}, header=False), split="train", task_type="classification")


@pytest.mark.parametrize(("part", "count"), [("train", 9_600), ("dev", 1_200), ("test", 1_200)])
def test_chinese_reviews_are_read(tmp_path, part, count):
    with zipfile.ZipFile(found("zh-chnsenticorp/chnsenticorp.zip")) as archive:
        path = archive.extract(f"{part}.tsv", tmp_path)
    rows = read_file(path, config({"text": "text_a"}), split=part, task_type="classification")
    assert len(rows) == count and set(rows.labels) == {"0", "1"}


def test_records_that_differ_in_width_are_told():
    columns = {"text": 5, "text_pair": 6, "label": 4}
    with pytest.raises(DataError, match=r"sts-test\.tsv:\d+: expected 7 fields, found 9"):
        read_file(
            found("glue-stsb/original/sts-test.tsv"),
            config(columns, header=False),
            split="test",
            task_type="regression",
        )


def test_quoted_reviews_read_without_quoting_are_told_how_to_be_read():
    with pytest.raises(DataError, match=r"train\.tsv.*:2: expected 2 fields, found 1.*data\.quoting: standard"):
        read_file(
            found("amazon-blitzer/books/train.tsv"),
            config({"text": "sentence"}),
            split="train",
            task_type="classification",
        )


def test_streaming_gives_the_rows_that_reading_gives():
    data = config({"text": "sentence"})
    path = found("glue-sst2/train.tsv.gz")
    rows = read_file(path, data, split="train", task_type="classification")
    streamed = list(iter_texts(path, data))
    assert [row.text for row in streamed] == rows.texts
    assert [row.label for row in streamed] == rows.labels
    assert [row.line for row in streamed] == rows.lines.tolist()


def test_sixty_seven_thousand_rows_are_read_and_split_within_seconds():
    # Generous: what is checked is that nothing grows with the square of the rows. Alone it takes a third of a second.
    start = time.perf_counter()
    rows = read_file(
        found("glue-sst2/train.tsv.gz"), config({"text": "sentence"}), split="train", task_type="classification"
    )
    train, dev = split_dev(rows, 0.1, 0, "classification")
    assert time.perf_counter() - start < 10
    assert not set(train.texts) & set(dev.texts) and len(train) + len(dev) == 67_349


def test_every_intent_has_dev_rows():
    rows = read_file(
        found("banking77/train.csv"), config({"label": "category"}), split="train", task_type="classification"
    )
    train, dev = split_dev(rows, 0.05, 0, "classification")
    assert set(train.labels) == set(dev.labels) and len(dev) == pytest.approx(500, abs=5)
