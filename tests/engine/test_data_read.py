"""Reading files: every format gives the same rows, and every fault is told by file, line and column."""

import gzip
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from regraft.engine.config import ColumnsConfig, DataConfig
from regraft.engine.data.read import read_file, read_rows
from regraft.engine.errors import DataError
from regraft.engine.init_command import init_config

ROWS = [("good film", "pos"), ('he said "no", twice', "neg"), ("naïve 🙂 中文", "pos")]


def rows_of(path, *, columns=None, task_type="classification", need_labels=True, limit=None, **settings):
    data = DataConfig(train=str(path), columns=ColumnsConfig(**(columns or {})), **settings)
    return read_file(path, data, split="train", task_type=task_type, need_labels=need_labels, limit=limit)


def fault_of(path, **settings):
    with pytest.raises(DataError) as caught:
        rows_of(path, **settings)
    return str(caught.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_as(form, path):
    if form == "jsonl":
        return write(path, "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in ROWS))
    if form == "tsv":
        return write(path, "text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in ROWS))
    if form == "csv":
        quoted = [('"' + t.replace('"', '""') + '"', y) for t, y in ROWS]
        return write(path, "text,label\n" + "".join(f"{t},{y}\n" for t, y in quoted))
    parquet.write_table(pa.table({"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}), path)
    return path


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, form, zipped):
    path = write_as(form, tmp_path / f"rows.{form}")
    if zipped:
        path = write(tmp_path / f"rows.{form}.gz", gzip.compress(path.read_bytes()))
    rows = rows_of(path)
    assert list(zip(rows.texts, rows.labels, strict=True)) == ROWS
    first = 1 if form in ("jsonl", "parquet") else 2
    assert rows.lines.tolist() == [first, first + 1, first + 2]
    assert rows.dropped == {} and rows.pairs is None


def test_pairs_are_read_beside_texts(tmp_path):
    path = write(tmp_path / "a.csv", "id,one,two,y\n7,a b,c d,0\n8,e,f,1\n")
    rows = rows_of(path, columns={"text": "one", "text_pair": "two", "label": "y"})
    assert (rows.texts, rows.pairs, rows.labels) == (["a b", "e"], ["c d", "f"], ["0", "1"])


def test_without_a_header_columns_are_numbers(tmp_path):
    path = write(tmp_path / "a.tsv", "src\t1\t\tBill left.\nsrc\t0\t*\tLeft Bill.\n")
    rows = rows_of(path, columns={"text": 3, "label": 1}, header=False)
    assert (rows.texts, rows.labels, rows.lines.tolist()) == (["Bill left.", "Left Bill."], ["1", "0"], [1, 2])


def test_a_quote_in_a_tsv_is_a_character_like_any_other(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"so-called\t0\nart" film\t1\n')
    assert rows_of(path).texts == ['"so-called', 'art" film']


def test_records_over_several_lines_keep_the_line_they_start_in(tmp_path):
    path = write(
        tmp_path / "a.tsv", 'text\tlabel\r\n"one\r\ntwo\tstill ""two"""\t0\r\nthree\t1\r\n"four\n\nsix"\t0\r\nx\t1\r\n'
    )
    rows = rows_of(path, quoting="standard")
    assert rows.texts == ['one\r\ntwo\tstill "two"', "three", "four\n\nsix", "x"]
    assert rows.lines.tolist() == [2, 4, 5, 8]


@pytest.mark.parametrize(
    "separator", ["\r", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"], ids=lambda c: hex(ord(c))
)
def test_only_newlines_end_a_line(tmp_path, separator):
    text = f"one{separator}row"
    tsv = write(tmp_path / "a.tsv", f"text\tlabel\n{text}\t0\nnext\t1\n")
    jsonl = write(tmp_path / "a.jsonl", json.dumps({"text": text, "label": 0}, ensure_ascii=False) + "\n")
    assert rows_of(tsv).texts == [text, "next"]
    assert rows_of(jsonl).texts == [text]


def test_windows_line_ends_and_a_byte_order_mark_are_not_part_of_a_cell(tmp_path):
    for name, content in (("a.tsv", "text\tlabel\r\nx\tpos\r\n"), ("a.csv", "text,label\r\nx,pos\r\n")):
        rows = rows_of(write(tmp_path / name, b"\xef\xbb\xbf" + content.encode()))
        assert (rows.texts, rows.labels) == (["x"], ["pos"])
    assert rows_of(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x", "label": 1}\r\n')).texts == ["x"]


def test_utf_16_files_can_be_read(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\nГлава\t1\n".encode("utf-16"))
    assert rows_of(path, encoding="utf-16").texts == ["Глава"]
    assert "utf-16" in fault_of(path)


def test_cells_longer_than_the_csv_module_allows_by_itself_are_read(tmp_path):
    text = "word " * 60_000
    assert rows_of(write(tmp_path / "a.csv", f'text,label\n"{text}",0\n')).texts == [text]


def test_the_limit_holds_for_the_training_file_only(tmp_path):
    path = str(write(tmp_path / "a.tsv", "text\tlabel\n" + "x\t0\n" * 10))
    data = DataConfig(train=path, dev=path, limit=3)
    assert len(read_rows(data, "train", task_type="classification")) == 3
    assert len(read_rows(data, "dev", task_type="classification")) == 10


def test_a_split_that_is_not_configured_is_named():
    with pytest.raises(DataError, match=r"data\.dev: not set"):
        read_rows(DataConfig(train="x.tsv"), "dev", task_type="classification")


# Labels and values


def test_numbers_as_text_become_strings_and_labels_keep_their_type(tmp_path):
    lines = '{"text": 42, "label": 1}\n{"text": 1.5, "label": "b"}\n{"text": true, "label": false}\n'
    rows = rows_of(write(tmp_path / "a.jsonl", lines))
    assert rows.texts == ["42", "1.5", "true"]
    assert rows.labels == [1, "b", False]


def test_several_labels_come_from_lists_or_from_one_cell(tmp_path):
    jsonl = write(
        tmp_path / "a.jsonl",
        '{"text": "a", "label": ["x", 2]}\n{"text": "b", "label": []}\n{"text": "c", "label": "x"}\n',
    )
    assert rows_of(jsonl, task_type="multilabel").labels == [["x", 2], [], ["x"]]
    tsv = write(tmp_path / "a.tsv", "text\tlabel\na\tx|y z\nb\t\nc\t y |\n")
    assert rows_of(tsv, task_type="multilabel", label_separator="|").labels == [["x", "y z"], [], ["y"]]


def test_a_list_where_one_label_is_expected_is_an_error(tmp_path):
    told = fault_of(write(tmp_path / "a.jsonl", '{"text": "a", "label": ["x"]}\n'))
    assert "a.jsonl:1, column 'label'" in told and "multilabel" in told


# Gaps


def test_a_missing_key_is_named_with_the_nearest(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n{"txt": "b", "label": 1}\n')
    told = fault_of(path)
    assert "a.jsonl:2, column 'text'" in told and "did you mean 'txt'?" in told and "data.missing" in told


@pytest.mark.parametrize(
    ("line", "column"),
    [('{"text": null, "label": 1}', "text"), ('{"text": "b", "label": null}', "label"), ('{"text": "b"}', "label")],
)
def test_missing_cells_are_an_error_or_dropped_and_counted(tmp_path, line, column):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n' + line + "\n")
    assert f"a.jsonl:2, column '{column}'" in fault_of(path)
    rows = rows_of(path, missing="drop")
    assert rows.texts == ["a"] and rows.dropped == {"missing": 1}


def test_an_empty_label_cell_is_missing(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\na,1\nb,\nc,  \n")
    assert "a.csv:3, column 'label': the label is empty" in fault_of(path)
    assert rows_of(path, missing="drop").dropped == {"missing": 2}


def test_nulls_and_not_a_number_in_parquet_are_missing(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", None, "c"], "label": [1.0, 2.0, float("nan")]}), path)
    assert "a.parquet:2, column 'text'" in fault_of(path)
    rows = rows_of(path, missing="drop", task_type="regression")
    assert rows.texts == ["a"] and rows.dropped == {"missing": 2} and rows.lines.tolist() == [1]


def test_a_text_column_of_numbers_counts_not_a_number_as_missing(tmp_path):
    parquet.write_table(pa.table({"text": [1.5, float("nan")], "label": ["x", "y"]}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", missing="drop")
    assert rows.texts == ["1.5"] and rows.dropped == {"missing": 1}


def test_blank_texts_are_an_error_dropped_or_kept(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\na\t1\n \u3000\t0\n\t1\n")
    assert "a.tsv:3, column 'text': the text is blank" in fault_of(path)
    assert rows_of(path, empty="drop").dropped == {"empty": 2}
    assert rows_of(path, empty="keep").texts == ["a", " \u3000", ""]


def test_a_blank_second_text_is_told_by_its_own_column(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tother\tlabel\na\t\t1\n")
    assert "a.tsv:2, column 'other': the text is empty" in fault_of(path, columns={"text_pair": "other"})


def test_when_every_row_was_dropped_the_counts_are_told(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\n\t1\nb\t\n")
    told = fault_of(path, empty="drop", missing="drop")
    assert "no rows are left" in told and "1 empty" in told and "1 missing" in told


def test_without_need_of_labels_their_absence_is_no_fault(tmp_path):
    for name, content in (
        ("a.tsv", "text\tid\na\t1\n"),
        ("a.jsonl", '{"text": "a"}\n'),
        ("b.tsv", "text\tlabel\na\t\n"),
    ):
        rows = rows_of(write(tmp_path / name, content), need_labels=False)
        assert rows.texts == ["a"] and rows.labels is None
    rows = rows_of(write(tmp_path / "c.tsv", "text\tlabel\na\t1\n"), need_labels=False)
    assert rows.labels == ["1"]


# Faults of the file


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path):
    write(tmp_path / "train.tsv", "x")
    assert f"did you mean '{tmp_path / 'train.tsv'}'?" in fault_of(tmp_path / "trian.tsv")
    assert "has train.tsv" in fault_of(tmp_path / "zzz.csv")
    assert "does not exist either" in fault_of(tmp_path / "nowhere" / "train.tsv")
    assert "is a folder" in fault_of(tmp_path)


def test_an_ending_that_tells_no_format_is_an_error_unless_the_format_is_set(tmp_path):
    path = write(tmp_path / "rows.data", "text\tlabel\na\t1\n")
    assert "set data.format" in fault_of(path)
    assert rows_of(path, format="tsv").texts == ["a"]


def test_a_missing_column_is_told_with_the_nearest_and_all_there_are(tmp_path):
    told = fault_of(write(tmp_path / "a.csv", "texts,label\na,1\n"))
    assert "a.csv:1: no column 'text' (data.columns.text) (did you mean 'texts'?); columns: 'texts', 'label'" in told
    told = fault_of(write(tmp_path / "b.tsv", "a\t1\n"), columns={"text": 0, "label": 2}, header=False)
    assert "no column 2 (data.columns.label); there are 2, numbered from 0" in told
    parquet.write_table(pa.table({"text": ["a"], "lable": [1]}), tmp_path / "c.parquet")
    assert "did you mean 'lable'?" in fault_of(tmp_path / "c.parquet")


def test_a_column_that_the_header_names_twice_is_an_error(tmp_path):
    assert "names 'text' 2 times" in fault_of(write(tmp_path / "a.csv", "text,text,label\na,b,1\n"))


def test_a_record_of_another_width_is_told_by_line_and_numbers(tmp_path):
    told = fault_of(write(tmp_path / "a.tsv", "text\tlabel\na\t1\nb\tc\t0\n"))
    assert "a.tsv:3: expected 2 fields, found 3: b | c | 0" in told
    told = fault_of(write(tmp_path / "b.csv", 'text,label\n"a\nb",1\nc\n'))
    assert "b.csv:4: expected 2 fields, found 1" in told


def test_an_unclosed_quote_is_told_by_the_line_where_it_opens(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\na,1\n"b,0\nc,1\nd,0\n')
    told = fault_of(path)
    assert "a.csv:3: " in told and "never closed" in told and "data.quoting: none" in told
    assert rows_of(path, quoting="none").texts == ["a", '"b', "c", "d"]


def test_a_tsv_with_quoted_records_suggests_standard_quoting(tmp_path):
    told = fault_of(write(tmp_path / "a.tsv", 'text\tlabel\n"a\nb"\t1\n'))
    assert "a.tsv:2" in told and "data.quoting: standard" in told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "b", "label": 1', "not valid JSON"),
        ('{"text": "b" "label": 1}', "not valid JSON"),
        ("plain text", "not valid JSON"),
        ("[1, 2]", "expected an object"),
        ('"text"', "expected an object"),
        ('{"text": ["a"], "label": 1}', "expected a text, found a list"),
        ('{"text": "half \\ud83d of it", "label": 1}', "half of a character"),
    ],
)
def test_lines_that_are_no_rows_are_told_by_number(tmp_path, line, told):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n\n' + line + "\n")
    assert f"{path}:3" in fault_of(path) and told in fault_of(path)


def test_a_whole_pair_of_json_escapes_is_one_character(tmp_path):
    assert rows_of(write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude42", "label": 1}\n')).texts == ["🙂"]


def test_bytes_of_another_encoding_are_told_by_line_with_the_one_that_fits(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\nplain\t0\ncafé crème\t1\n".encode("latin-1"))
    told = fault_of(path)
    assert "a.tsv:3: byte 0xe9 at position 4 of the line is not utf-8" in told and "data.encoding: latin-1" in told
    assert rows_of(path, encoding="latin-1").texts[1] == "café crème"


def test_chinese_and_windows_encodings_are_recognised(tmp_path):
    chinese = write(tmp_path / "a.tsv", "text\tlabel\n这间酒店环境和服务态度不错\t1\n".encode("gb18030"))
    assert "data.encoding: gb18030" in fault_of(chinese)
    windows = write(tmp_path / "b.tsv", "text\tlabel\n“quoted” – dash\t1\n".encode("cp1252"))
    assert "data.encoding: cp1252" in fault_of(windows)


def test_an_unknown_encoding_is_named(tmp_path):
    assert "data.encoding: 'utf-99' is not an encoding" in fault_of(
        write(tmp_path / "a.tsv", "text\tlabel\n"), encoding="utf-99"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_an_empty_file_is_an_error(tmp_path, name):
    assert str(tmp_path / name) in fault_of(write(tmp_path / name, b""))


def test_a_header_alone_is_an_empty_data_set(tmp_path):
    assert "no rows" in fault_of(write(tmp_path / "a.csv", "text,label\n"))


def test_damaged_files_are_told(tmp_path):
    content = gzip.compress(b"text\tlabel\n" + b"some words\t1\n" * 5000)
    assert "damaged gzip" in fault_of(write(tmp_path / "a.tsv.gz", content[: len(content) // 2]))
    assert "not a readable parquet" in fault_of(write(tmp_path / "a.parquet", b"PAR1 and nothing else"))


def damaged(content):
    """A gzip file cut off in the middle, and one with bytes that no compressor writes."""
    whole = gzip.compress(content)
    return {"cut": whole[: len(whole) // 2], "changed": whole[:10] + b"\xff" * 40 + whole[50:]}


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz", "a.txt.gz", "a.parquet.gz"])
def test_a_damaged_gzip_file_of_any_format_is_told_by_readers_and_by_init(tmp_path, name, damage):
    lines = [random.Random(i).randbytes(12).hex() for i in range(2000)]
    if name == "a.parquet.gz":
        parquet.write_table(pa.table({"text": lines, "label": ["a", "b"] * 1000}), tmp_path / "whole")
        content = (tmp_path / "whole").read_bytes()
    elif name == "a.jsonl.gz":
        content = "".join(json.dumps({"text": x, "label": x[0]}) + "\n" for x in lines).encode()
    else:
        content = ("text,label\n" + "".join(f"{x},{x[0]}\n" for x in lines)).encode()
    path = write(tmp_path / name, damaged(content)[damage])
    if name != "a.txt.gz":
        assert f"{path}: damaged gzip file" in fault_of(path)
    with pytest.raises(DataError, match="damaged gzip file"):
        init_config(str(path))


def test_a_parquet_file_with_a_damaged_column_is_told(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [str(i) for i in range(5000)], "label": ["a", "b"] * 2500}), path)
    content = path.read_bytes()
    write(path, content[:1000] + bytes(4000) + content[5000:])
    assert f"{path}: not a readable parquet file" in fault_of(path)
    with pytest.raises(DataError, match="not a readable parquet file"):
        init_config(str(path))


def test_a_json_list_of_rows_is_told_apart_from_jsonl(tmp_path):
    assert "one object a line" in fault_of(write(tmp_path / "a.json", '[{"text": "a", "label": 1}]\n'))
