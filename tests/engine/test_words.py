"""Word vectors from every format people have, words and characters as serving splits them, networks over them."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import DATA, WORDS, sentences
from regraft.engine.config import load_config
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.export import export_bundle
from regraft.engine.predict import predict
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from regraft.engine.words.tokens import choose_unit, word_tokenizer
from regraft.engine.words.vectors import read_vectors

TABLE = np.random.default_rng(0).normal(size=(len(WORDS), 5)).astype(np.float32)


def glove(path: Path) -> None:
    path.write_text("".join(f"{w} {' '.join(map(repr, row.tolist()))}\n" for w, row in zip(WORDS, TABLE, strict=True)))


def word2vec_text(path: Path) -> None:
    glove(path)
    path.write_text(f"{len(WORDS)} 5\n" + path.read_text())


def word2vec_binary(path: Path) -> None:
    rows = [w.encode() + b" " + struct.pack("<5f", *row) + b"\n" for w, row in zip(WORDS, TABLE, strict=True)]
    path.write_bytes(f"{len(WORDS)} 5\n".encode() + b"".join(rows))


def as_json(path: Path) -> None:
    path.write_text(json.dumps({w: row.tolist() for w, row in zip(WORDS, TABLE, strict=True)}))


def as_javascript(path: Path) -> None:
    as_json(path)
    path.write_text("var wordVecs = " + path.read_text()[:-1] + ",\n};\n")


def as_npz(path: Path) -> None:
    np.savez(path, embeddings=TABLE.astype(np.float64))
    path.with_name("vocab.json").write_text(json.dumps({w: i for i, w in enumerate(WORDS)}))


def as_npz_with_words(path: Path) -> None:
    np.savez(path, vectors=TABLE, words=np.array(WORDS))


FILES = {
    "glove.txt": glove,
    "w2v.txt": word2vec_text,
    "wiki.vec": word2vec_text,
    "w2v.bin": word2vec_binary,
    "v.json": as_json,
    "v.js": as_javascript,
    "v.npz": as_npz,
    "own.npz": as_npz_with_words,
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_vectors(tmp_path, name):
    FILES[name](tmp_path / name)
    found = read_vectors(tmp_path / name)
    assert found.words == WORDS
    assert np.allclose(found.table, TABLE, atol=1e-6)
    few = read_vectors(tmp_path / name, most=2, wanted={"music"})
    assert few.words == [*WORDS[:2], "music"]


def test_a_gzipped_file_is_read_as_it_is(tmp_path):
    glove(tmp_path / "g.txt")
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress((tmp_path / "g.txt").read_bytes()))
    assert np.allclose(read_vectors(tmp_path / "g.txt.gz").table, TABLE, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "good 1 2 3\nbad 1 2\n", r"a.txt:2: expected a word and 3 numbers, found 2"),
        ("a.txt", "good 1 2 3\nbad 1 x 3\n", r"a.txt:2: 'x' is not a number \(word 'bad'\)"),
        ("a.vec", "2 3\ngood 1 2\n", r"a.vec:2: expected a word and 3 numbers"),
        ("a.txt", "good 1 nan 3\n", r"the vector of 'good' holds a value that is not finite"),
        ("a.bin", "good 1 2 3\n", r"not a word2vec .bin file"),
        ("a.bin", "9 4\ngood abc", r"ends in word 1 of 9"),
        ("a.json", '{"good": [1, 2], "bad": [1]}', r"word 'bad': expected 2 numbers, found 1"),
        ("a.json", "[1, 2]", r"not a JSON object"),
        ("a.txt", "", r"no word vectors in it"),
        (
            "a.vec",
            "3 2\ngood 0.1 0.2 0.3 0.4\nbad 0.1 0.2 0.3 0.4\n",
            r"a.vec:2: expected a word and 2 numbers, found more",
        ),
        ("a.txt", "good .1 .2 .3\nbad .1 .2 .3 .9\n", r"a.txt:2: expected a word and 3 numbers, found more: 'bad .1"),
        ("a.txt", "good 1 2\nbad 1 2 3\n", r"a.txt:2: expected a word and 2 numbers, found more"),
        ("a.vec", "5 2\ngood 0.1 0.2\nbad 0.1 0.2\n", r"first line says 5 words, but 2 follow"),
        ("a.bin", "1 0\ngood ", r"not a word2vec .bin file"),
        ("a.npz", "", r"a.npz: cut off or damaged"),
        ("a.npz", "PK\x03\x04 cut", r"a.npz: cannot be read as .npz"),
        ("a.json", '{"good": [1, "2"]}', r"word 'good': '2' in its vector is not a number"),
        ("a.json", '{"good": [1, true]}', r"word 'good': True in its vector is not a number"),
    ],
)
def test_a_broken_file_is_refused_by_line_or_word(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told):
        read_vectors(tmp_path / name)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"good": "0"}, r"word 'good': '0' is no row"),
        ({"good": True}, r"word 'good': True is no row"),
        ({"good": -1}, r"word 'good': -1 is no row"),
        ({"good": 0.5}, r"word 'good': 0.5 is no row"),
        ([1, 2], r"1 is no word"),
        ("good", r"str; expected JSON, a list of words or an object"),
    ],
)
def test_a_broken_vocabulary_is_refused_by_word(tmp_path, rows, told):
    np.savez(tmp_path / "v.npz", vectors=TABLE)
    (tmp_path / "vocab.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=f"vocab.json: {told}"):
        read_vectors(tmp_path / "v.npz")


def test_files_that_were_cut_off_are_refused_by_name(tmp_path):
    glove(tmp_path / "g.txt")
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress((tmp_path / "g.txt").read_bytes())[:-20])
    np.savez(tmp_path / "v.npz", vectors=TABLE, words=np.array(WORDS))
    (tmp_path / "v.npz").write_bytes((tmp_path / "v.npz").read_bytes()[:-100])
    (tmp_path / "j.json").write_bytes(b'{\n"good": [1, 2], "b\xe4d": [1, 2]}')
    for name, told in (("g.txt.gz", "cut off"), ("v.npz", "cannot be read"), ("j.json", ":2: byte 0xe4 is not utf-8")):
        with pytest.raises(DataError, match=rf"{name}.*{told}"):
            read_vectors(tmp_path / name)


def test_words_that_are_numbers_or_hold_them_are_words(tmp_path):
    odd = ["1", "0.5", ". . .", "to name@domain.com", "windows 95", "1 / 2", "to nan"]
    (tmp_path / "a.txt").write_text("good 0.1 0.2\n" + "".join(f"{word} 0.3 0.4\n" for word in odd))
    assert read_vectors(tmp_path / "a.txt").words == ["good", *odd]
    (tmp_path / "a.vec").write_text("1 2\n95 0.3 0.4\n")
    assert read_vectors(tmp_path / "a.vec").words == ["95"]


def test_words_with_spaces_keep_them(tmp_path):
    (tmp_path / "a.txt").write_text("good 1 2\n. . . 3 4\n")
    assert read_vectors(tmp_path / "a.txt").words == ["good", ". . ."]


def tokens(texts: list[str], words: list[str], unit: str) -> list[list[str]]:
    tokenizer = word_tokenizer(words, unit, True)
    return [e.tokens for e in tokenizer.backend.encode_batch(texts)]


def test_texts_are_split_into_words_characters_and_longest_known_words():
    assert tokens(["Good, BAD film"], ["good", "bad", ","], "word") == [["[START]", "good", ",", "bad", "[UNK]"]]
    assert tokens(["很好 a"], ["很", "好"], "character") == [["[START]", "很", "好", "[UNK]"]]
    known = ["北京", "北京大学", "大", "学", "生", "的", "京", "北"]
    assert tokens(["北京大学生的碑北京"], known, "longest") == [["[START]", "北京大学", "生", "的", "[UNK]", "北京"]]
    assert tokens([""], known, "longest") == [["[START]"]]
    words_only = ["房间", "干净", "大学"]
    assert tokens(["房间很干净"], words_only, "longest") == [["[START]", "房间", "[UNK]", "干净"]]
    # A character that is known inside words alone takes nothing beside it along.
    assert tokens(["时间房间学干净"], words_only, "longest") == [["[START]", "[UNK]", "间", "房间", "学", "干净"]]
    assert tokens(["good 房间很好 film"], ["good", "很", "好"], "mixed") == [
        ["[START]", "good", "[UNK]", "[UNK]", "很", "好", "[UNK]"]
    ]
    assert tokens(["房间 很 干净"], words_only, "word") == [["[START]", "房间", "[UNK]", "干净"]]
    assert choose_unit(["a good film", "so 好"]) == "mixed"
    assert choose_unit(["酒店很好", "不错 ok"], ["很", "好"]) == "character"
    assert choose_unit(["酒店很好"], ["酒店", "很"]) == "longest"
    assert choose_unit(["a good film"], ["酒店"]) == "word"


@pytest.fixture
def words_run(make_config, write_rows, tmp_path, capsys):
    data = {"train": str(write_rows("many.csv", 300, 7)), "dev": str(write_rows("other.csv", 100, 8))}
    path = make_config(data=data, training={"precision": "fp32", "threads": 1, "batch_size": 16, "epochs": 6})

    def run(*overrides: str, quiet: bool = True):
        return train(
            load_config(path, [f"run={tmp_path / 'r'}", "training.learning_rate=1e-2", *overrides]), quiet=quiet
        )

    return run


@pytest.mark.parametrize("head", ["bilstm", "linear"])
def test_a_network_from_scratch_learns(words_run, head):
    result = words_run("method=scratch", f"head.type={head}", "head.hidden=16", "words.dimension=12")
    assert result.metrics["dev"]["accuracy"] > 0.75


def test_a_word_model_exports_and_serves(words_run, tmp_path):
    from regraft.serve.session import Session

    result = words_run("method=scratch", "head.type=cnn", "head.hidden=16", "words.dimension=12")
    export_bundle(result.folder, tmp_path / "bundle")
    session = Session(tmp_path / "bundle", threads=1, warm_tokens=64)
    texts = ["good film", "Bad, slow unheardof plot", "", *(t for t, _ in sentences(20, 3))]
    served = session.decode(session.run(session.tokenize(texts)))
    for a, b in zip(predict(load_trained(result.folder), [(t, None) for t in texts]), served, strict=True):
        assert a.prediction.scores == pytest.approx(dict(b.scores), abs=1e-4)


@pytest.mark.parametrize("learned", [False, True])
def test_vectors_stay_as_they_are_unless_they_are_trained(words_run, tmp_path, capsys, learned):
    from safetensors.torch import load_file

    glove(tmp_path / "g.txt")
    lines = (tmp_path / "g.txt").read_text().splitlines()
    (tmp_path / "g.txt").write_text("\n".join(line for line in lines if not line.startswith("music ")) + "\n")
    settings = ("method=vectors", f"words.vectors={tmp_path / 'g.txt'}", "head.type=cnn", "head.hidden=16")
    result = words_run(*settings, f"words.trained={str(learned).lower()}", "training.epochs=1", quiet=False)
    told = capsys.readouterr().err
    assert "1 of 20 distinct training words are not among them" in told
    assert "music" in told
    table = load_file(result.folder / "best" / "words.safetensors")["backbone.embedding.weight"]
    kept = [i for i, w in enumerate(WORDS) if w != "music"]
    assert torch.equal(table[4:], torch.from_numpy(TABLE[kept])) != learned


def chinese_run(make_config, tmp_path, *overrides: str):
    rows = [("房间很干净，服务好", "1"), ("太差了，不会再来", "0"), ("房间干净 ok", "1"), ("时间太差", "0")] * 4
    for name in ("zh.tsv", "zh-dev.tsv"):
        (tmp_path / name).write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in rows))
    path = make_config(
        method="vectors",
        data={"train": str(tmp_path / "zh.tsv"), "dev": str(tmp_path / "zh-dev.tsv")},
        head={"type": "cnn", "hidden": 8},
        training={"epochs": 1, "batch_size": 8, "threads": 1},
    )
    return train(load_config(path, [f"run={tmp_path / 'zh'}", *overrides]))


def test_chinese_words_are_found_without_their_characters_and_beyond_the_largest_vocabulary(
    make_config, tmp_path, capsys
):
    from safetensors.torch import load_file

    rare = [chr(0x5000 + i) for i in range(20)]
    words = ["北京", *rare, "房间", "干净", "服务", "太差", "太差了", "不会", "再来"]
    table = np.random.default_rng(1).normal(size=(len(words), 4)).astype(np.float32)
    (tmp_path / "zh.vec").write_text(
        f"{len(words)} 4\n"
        + "".join(f"{w} {' '.join(map(repr, r.tolist()))}\n" for w, r in zip(words, table, strict=True))
    )
    result = chinese_run(make_config, tmp_path, f"words.vectors={tmp_path / 'zh.vec'}", "words.max_words=10")
    told = capsys.readouterr().err
    assert "17 words of 4 numbers" in told  # ten, and what the training rows have: of 太差 and 太差了 both
    unknown = next(line for line in told.splitlines() if "distinct training words" in line).split(": ")[-1]
    # 间 is a character of a word, 时 is of none: both are unknown, and neither takes a word along.
    assert set(unknown.split(", ")) == {"，", "很", "好", "o", "k", "时", "间"}
    trained = load_trained(result.folder)
    kept = load_file(result.folder / "best" / "words.safetensors")["backbone.embedding.weight"]
    ids = trained.tokenizer.backend.encode("房间时间太差").ids
    assert torch.allclose(kept[ids[1]], torch.from_numpy(table[words.index("房间")]))
    assert torch.equal(kept[ids[2]], kept[ids[3]])
    assert torch.allclose(kept[ids[4]], torch.from_numpy(table[words.index("太差")]))


def test_only_the_vectors_that_a_run_needs_are_read(words_run, tmp_path, capsys):
    glove(tmp_path / "g.txt")
    lines = (tmp_path / "g.txt").read_text()
    other = "".join(f"other{i} 1 2 3 4 5\n" for i in range(30))
    # What nobody asked for is not even made numbers of.
    (tmp_path / "g.txt").write_text(other + lines + "never 1 2 3 4 x\n")
    settings = ("method=vectors", f"words.vectors={tmp_path / 'g.txt'}", "head.type=linear", "words.max_words=12")
    words_run(*settings, "training.epochs=1", quiet=False)
    assert "32 words of 5 numbers; 0 of 20 distinct" in capsys.readouterr().err


def test_missing_vectors_are_asked_for(make_config):
    with pytest.raises(ConfigError, match=r"words.vectors: missing"):
        load_config(make_config(method="vectors"))
    assert load_config(make_config(method="scratch", model={"max_length": 9})).model.max_length == 9
    with pytest.raises(ConfigError, match=r"head.type: logistic is solved on stored features"):
        load_config(make_config(method="scratch", head={"type": "logistic"}))


def test_the_real_files_are_read():
    models = DATA.parent / "models"
    if not models.is_dir():
        pytest.skip(f"real word vectors are not here: {models}")
    english = read_vectors(models / "glove-6B-50d-5k" / "glove-50d-5k.json")
    assert english.table.shape[1] == 50
    assert english.table[english.words.index("the")][:2] == pytest.approx([0.418, 0.24968])
    chinese = read_vectors(models / "tencent-zh-char-200d" / "embedding_Tencent.npz")
    assert chinese.dimension == 200
    assert "好" in chinese.words
    assert read_vectors(models / "word2vec-en-1000x300" / "wordvecs1000.js").table.shape == (1000, 300)
