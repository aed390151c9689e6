"""Streaming rows for prediction: files, standard input, flat memory."""

import gzip
import io
import json
import tracemalloc

import pytest

from regraft.engine.config import ColumnsConfig, DataConfig
from regraft.engine.data.read import iter_texts
from regraft.engine.errors import DataError

DATA = DataConfig(train="unused")
PAIRS = DataConfig(train="unused", columns=ColumnsConfig(text="one", text_pair="two"))


def of_stream(content, data=DATA, **settings):
    return [(row.line, row.text, row.pair, row.label) for row in iter_texts(io.BytesIO(content), data, **settings)]


def test_a_stream_holds_one_text_a_line_or_json():
    content = 'plain, "as it is"\n{"text": "naïve", "label": "x"}\r\nlast'.encode()
    assert of_stream(content) == [
        (1, 'plain, "as it is"', None, None),
        (2, "naïve", None, "x"),
        (3, "last", None, None),
    ]


def test_a_text_stream_reads_like_a_byte_stream():
    assert [row.text for row in iter_texts(io.StringIO('one\n{"text": "two"}\n'), DATA)] == ["one", "two"]


def test_pairs_on_a_stream_have_a_tab_between_or_come_as_json():
    content = b'a b\tc d\n{"one": "e", "two": "f"}\n'
    assert of_stream(content, PAIRS) == [(1, "a b", "c d", None), (2, "e", "f", None)]
    with pytest.raises(DataError, match="<stdin>:1: expected a pair"):
        of_stream(b"a b\n", PAIRS)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"ok\n{broken\n", "<stdin>:2: not valid JSON"),
        (
            b'ok\n{"txt": "a"}\n',
            "<stdin>:2, column 'text': the text is missing: there is no key 'text' (did you mean 'txt'?)",
        ),
        (b"ok\ncaf\xe9\n", "<stdin>:2: byte 0xe9 at position 4"),
        (b"ok\n\nmore\n", "<stdin>:2, column 'text': the text is empty"),
    ],
)
def test_faults_on_a_stream_are_told_by_line(content, told):
    with pytest.raises(DataError) as caught:
        of_stream(content)
    assert told in str(caught.value)


def test_rows_before_a_fault_have_already_come():
    rows = iter_texts(io.BytesIO(b"one\ntwo\n{broken\n"), DATA)
    assert [next(rows).text, next(rows).text] == ["one", "two"]
    with pytest.raises(DataError):
        next(rows)


def test_rows_left_out_by_a_rule_are_counted():
    dropped = {}
    data = DataConfig(train="unused", empty="drop", missing="drop")
    content = b'one\n\n{"text": null}\n{"text": " "}\nfive\n'
    assert [row[0] for row in of_stream(content, data, dropped=dropped)] == [1, 5]
    assert dropped == {"empty": 2, "missing": 1}


def test_files_stream_with_labels_where_there_are_some(tmp_path):
    labelled, bare = tmp_path / "a.csv", tmp_path / "b.csv"
    labelled.write_text("text,label\na,1\nb,\n")
    bare.write_text("text,other\na,1\n")
    assert [(row.text, row.label) for row in iter_texts(labelled, DATA)] == [("a", "1"), ("b", "")]
    assert [row.label for row in iter_texts(labelled, DATA, task_type="classification")] == ["1", None]
    assert [(row.line, row.text, row.label) for row in iter_texts(bare, DATA)] == [(2, "a", None)]


def test_a_txt_file_is_one_text_a_line(tmp_path):
    (tmp_path / "a.txt").write_text('one, two\n"three"\n')
    assert [row.text for row in iter_texts(tmp_path / "a.txt", DATA)] == ["one, two", '"three"']


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "tsv.gz", "txt"])
def test_memory_stays_flat_whatever_the_number_of_rows(tmp_path, form):
    text = "word " * 200
    line = {"jsonl": json.dumps({"text": text}), "csv": f'"{text}",0', "txt": text}.get(form, f"{text}\t0")
    head = {"jsonl": "", "csv": "text,label\n", "txt": ""}.get(form, "text\tlabel\n")
    content = (head + (line + "\n") * 20_000).encode()
    path = tmp_path / f"a.{form}"
    path.write_bytes(gzip.compress(content, 1) if form.endswith("gz") else content)
    tracemalloc.start()
    count = sum(1 for _ in iter_texts(path, DATA))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2 << 20 < len(content) / 8
