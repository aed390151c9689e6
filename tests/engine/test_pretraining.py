"""From texts to a fine-tuned encoder: a tokenizer learned, weights drawn, new words added, run after run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForMaskedLM

from conftest import WORDS, sentences
from regraft.engine.cli import main
from regraft.engine.config import load_config
from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
from regraft.engine.errors import ConfigError, ModelError
from regraft.engine.export import export_bundle
from regraft.engine.new_words import add_rows, grow
from regraft.engine.predict import predict
from regraft.engine.pretrained import load_classifier, position_limit
from regraft.engine.tasks.mlm import MaskedLanguage
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from regraft.serve.session import Session

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
NEW = ["blockbuster", "matinee"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Reviews of a few sentences each, a line each; two words that the tiny model's vocabulary has only in letters."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    rows = [text for text, _ in sentences(240, 5)]
    lines = [f"{a}. a {NEW[i % 2]} {b}. {c}." for i, (a, b, c) in enumerate(zip(*[iter(rows)] * 3, strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory, texts) -> dict[str, Path]:
    """A folder for each kind of tokenizer, as the command writes it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, size in (("wordpiece", "150"), ("bpe", "420")):
        command = ["tokenizer", str(texts), "--to", str(folder / kind), "--type", kind, "--size", size]
        assert main([*command, "--max-length", "64"]) == 0
    return {kind: folder / kind for kind in ("wordpiece", "bpe")}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_tokenizer_is_learned_and_loads_in_transformers(kind, learned, texts, tmp_path, capsys):
    theirs, ours = AutoTokenizer.from_pretrained(learned[kind]), load_fast_tokenizer(learned[kind])
    assert 100 < len(theirs) <= {"wordpiece": 150, "bpe": 420}[kind]
    assert ours.max_length == 64
    text = "A good Film, not <b>dull</b>. Überraschung 你好"
    assert ours.backend.encode(text).ids == theirs(text)["input_ids"]
    if kind == "bpe":
        assert theirs.decode(theirs(text, add_special_tokens=False)["input_ids"]) == text
    assert theirs.tokenize(" very good") in (["very", "good"], ["Ġvery", "Ġgood"])
    size = {"wordpiece": "150", "bpe": "420"}[kind]
    assert main(["tokenizer", str(texts), "--type", kind, "--size", size, "--to", str(tmp_path / "again")]) == 0
    assert "tokens a word" in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert again["model"] == json.loads((learned[kind] / "tokenizer.json").read_text())["model"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--size", "20"], "--size: 20; a wordpiece vocabulary has at least 100 tokens"),
        (["--type", "bpe", "--cased"], "--cased: byte-level BPE always keeps capitals"),
        (["--to", "."], "exists already; --force replaces it"),
        (["--max-length", "-5"], "--max-length: -5; expected at least 3"),
        (["--min-count", "0"], "--min-count: 0; expected at least 1"),
    ],
)
def test_what_no_tokenizer_can_be_made_of_is_refused(arguments, said, texts, tmp_path, capsys):
    assert main(["tokenizer", str(texts), "--to", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_without_text_makes_no_tokenizer(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    assert main(["tokenizer", str(tmp_path / "empty.txt"), "--to", str(tmp_path / "out")]) == 2
    assert "empty.txt: there is no text to learn a tokenizer from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def config_of(folder: Path, name: Path, texts: Path, **changes: object) -> list:
    values = {
        "run": str(folder / "run"),
        "model": {"name": str(name)},
        "task": {"type": "mlm"},
        "data": {"train": str(texts), "dev": str(texts), "format": "text"},
        "training": {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "threads": 1},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return [path]


def settings(tmp_path: Path, name: Path, **model: object):
    return load_config(*config_of(tmp_path, name, tmp_path / "none.txt", model=model)).model


def test_weights_are_drawn_by_the_seed_and_fit_the_tokenizer(learned, tmp_path):
    model = settings(tmp_path, learned["bpe"], config={"model_type": "roberta", "max_position_embeddings": 40, **SMALL})
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(load_classifier(model, MaskedLanguage()))
    tokenizer = load_fast_tokenizer(learned["bpe"])
    assert drawn[0].config.vocab_size == tokenizer.backend.get_vocab_size()
    assert drawn[0].config.pad_token_id == tokenizer.pad_token_id == 1
    assert position_limit(str(learned["bpe"]), model) == 38  # positions are counted from padding_idx + 1
    first, again, other = (m.get_input_embeddings().weight for m in drawn)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert drawn[0].regraft_fresh == {name for name, _ in drawn[0].named_parameters()}


def test_the_architecture_of_a_folder_is_taken_without_its_weights(tiny_model, tmp_path):
    torch.manual_seed(0)
    given = load_classifier(settings(tmp_path, tiny_model), MaskedLanguage())
    same = load_classifier(settings(tmp_path, tiny_model, config={}), MaskedLanguage())
    deeper = load_classifier(settings(tmp_path, tiny_model, config={"num_hidden_layers": 3}), MaskedLanguage())
    one, two = (m.get_input_embeddings().weight for m in (given, same))
    assert one.shape == two.shape and not torch.allclose(one, two)
    assert (len(same.bert.encoder.layer), len(deeper.bert.encoder.layer)) == (2, 3)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"model_type": "bert", "hiden_size": 32}, r"model\.config\.hiden_size: not a key of bert \(did you mean 'hidden_size'"),
        ({"model_type": "brt"}, r"model\.config\.model_type: 'brt' is not known \(did you mean 'bert'"),
        ({"hidden_size": 32}, r"model\.config\.model_type: missing"),
        ({"model_type": "bert", "vocab_size": 40}, r"model\.config\.vocab_size: 40; the tokenizer of .* has \d+ tokens"),
        ({"model_type": "bert", **SMALL, "num_attention_heads": 5}, r"model\.config: .*multiple of the number of attention"),
        ({"model_type": "bert", "hidden_size": "wide"}, r"model\.config: cannot be a bert"),
    ],
)  # fmt: skip
def test_an_architecture_that_cannot_be_is_refused_by_key(config, said, learned, tmp_path):
    with pytest.raises(ConfigError, match=said):
        load_classifier(settings(tmp_path, learned["wordpiece"], config=config), MaskedLanguage())


def test_weights_that_are_missing_are_never_drawn_unasked(learned, tiny_model, tmp_path):
    with pytest.raises(
        ModelError, match=r"config\.json is missing; to train an encoder from nothing set model\.config"
    ):
        load_classifier(settings(tmp_path, learned["wordpiece"]), MaskedLanguage())
    bare = tmp_path / "bare"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(bare)
    (bare / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no weights: to draw them at random set model\.config: \{\}"):
        load_classifier(settings(tmp_path, bare), MaskedLanguage())
    assert load_classifier(settings(tmp_path, bare, config={}), MaskedLanguage())
    with pytest.raises(ConfigError, match=r"model\.config: weights drawn at random are of no use to method: lora"):
        load_config(*config_of(tmp_path, bare, bare, model={"config": {}}, method="lora"))


def test_pairs_of_sentences_need_a_model_with_a_head_for_them(learned, texts, tmp_path):
    model = {"config": {"model_type": "roberta", "max_position_embeddings": 40, **SMALL}}
    config = load_config(*config_of(tmp_path, learned["bpe"], texts, model=model, task={"sentences": "nsp"}))
    with pytest.raises(ConfigError, match=r"task\.sentences: nsp: RobertaForMaskedLM has no head for pairs"):
        train(config, quiet=True)


@pytest.mark.parametrize("wanted", [2, NEW], ids=["the commonest", "by name"])
def test_new_words_become_one_token_each_and_start_as_their_pieces_mean(wanted, tiny_model, texts):
    old = load_fast_tokenizer(tiny_model)
    grown, new = grow(old, wanted, texts.read_text().splitlines())
    assert sorted(new.words) == sorted(NEW)
    text = "a Blockbuster, not blockbusters or matinee-goers"
    assert [t for t in grown.backend.encode(text).tokens if t in NEW] == ["blockbuster", "blockbuster", "matinee"]
    plain = " ".join(WORDS)
    assert grown.backend.encode(plain).ids == old.backend.encode(plain).ids
    assert grown.fingerprint != old.fingerprint
    model = BertForMaskedLM.from_pretrained(tiny_model)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    before, bias = model.get_input_embeddings().weight.clone(), model.get_output_embeddings().bias.clone()
    add_rows(model, new)
    for word in new.words:
        row = grown.backend.token_to_id(word)
        pieces = [old.backend.token_to_id(p) for p in old.backend.encode(word, add_special_tokens=False).tokens]
        assert torch.allclose(model.get_input_embeddings().weight[row], before[pieces].mean(0))
        assert torch.allclose(model.get_output_embeddings().bias[row], bias[pieces].mean(0))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(before)], before)


def test_bpe_gets_the_merges_that_lead_to_a_word_and_cuts_no_other_text_apart(learned):
    old = load_fast_tokenizer(learned["bpe"])
    words = ["plotline", "plotlines", "slowly", "goodness", "sharpest"]  # two share their beginning
    grown, new = grow(old, words, [])
    assert [w.removeprefix("Ġ") for w in new.words] == words
    for word in words:
        assert grown.backend.encode(f" {word}", add_special_tokens=False).tokens == [f"Ġ{word}"]
    for text in (" ".join(WORDS), "A good\tFilm 你好 <mask> plots"):
        assert grown.backend.decode(grown.backend.encode(text).ids) == old.backend.decode(old.backend.encode(text).ids)
    assert len(set(new.tokens)) == len(new.tokens) == len(new.ids)
    for token, pieces in zip(new.tokens, new.pieces, strict=True):
        assert "".join(old.backend.id_to_token(i) for i in pieces) == token
    old_ids = old.backend.get_vocab()
    assert all(grown.backend.token_to_id(token) == i for token, i in old_ids.items())


@pytest.mark.parametrize(
    "wanted, said",
    [
        (["two words"], "model.new_words: 'two words' is not one word"),
        (0, "model.new_words: must be at least 1"),
    ],
)
def test_what_is_no_word_is_refused(wanted, said, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, tiny_model, new_words=wanted)
    with pytest.raises(ConfigError, match=r"'co-op': to this tokenizer it is 3 words: co, -, op"):
        grow(load_fast_tokenizer(tiny_model), ["co-op"], [])


@pytest.mark.parametrize("kind, model_type, how", [("wordpiece", "bert", "nsp"), ("bpe", "roberta", "none")])
def test_pretrain_adapt_and_fine_tune_is_one_chain_from_texts_to_a_served_bundle(
    kind, model_type, how, learned, texts, tmp_path, make_config
):
    architecture = {"model_type": model_type, "max_position_embeddings": 66, **SMALL}
    first = tmp_path / "first"
    first.mkdir()
    changes = {"model": {"config": architecture}, "task": {"sentences": how}}
    pretrained = train(load_config(*config_of(first, learned[kind], texts, **changes)), quiet=True)
    assert "perplexity" in pretrained.metrics["dev"]

    second = tmp_path / "second"
    second.mkdir()
    words = ["plotline", "slowest"]
    adapted = train(load_config(*config_of(second, pretrained.folder, texts, model={"new_words": words})), quiet=True)
    third = make_config(training={"max_steps": 6, "batch_size": 8})
    tuned = train(load_config(third, [f"model.name={adapted.folder}", f"run={tmp_path / 'third'}"]), quiet=True)

    before = load_fast_tokenizer(learned[kind])
    after = AutoTokenizer.from_pretrained(tuned.folder / "best")
    text = "a plotline, the slowest of all"
    mine = load_fast_tokenizer(tuned.folder / "best").backend.encode(text)
    assert after(text)["input_ids"] == mine.ids
    for word in words:
        assert any(token.removeprefix("Ġ") == word for token in mine.tokens)
    assert len(before.backend.encode(text).ids) > len(mine.ids)

    # What one run learned is where the next began; rows of new words came to the others.
    tables = [load_file(r.folder / "best" / "model.safetensors") for r in (pretrained, adapted, tuned)]
    name = f"{model_type}.embeddings.word_embeddings.weight"
    sizes = [len(table[name]) for table in tables]
    assert sizes[0] == before.backend.get_vocab_size() < sizes[1] == sizes[2] == len(after)
    assert 0 < float((tables[0][name] - tables[1][name][: sizes[0]]).abs().max()) < 0.1

    # Predict, plain transformers and the bundle agree.
    texts_asked = [text, "good film"]
    answers = [a.prediction for a in predict(load_trained(tuned.folder), [(t, None) for t in texts_asked])]
    plain = AutoModelForSequenceClassification.from_pretrained(tuned.folder / "best").eval()
    export_bundle(tuned.folder, tmp_path / "bundle")
    session = Session(tmp_path / "bundle", threads=1)
    prepared = session.prepare(texts_asked)
    served = session.answers(prepared, session.run(prepared.items))
    for asked, mine_, theirs in zip(texts_asked, answers, served, strict=True):
        with torch.no_grad():
            chances = plain(**after(asked, return_tensors="pt")).logits.softmax(-1)[0].numpy()
        expected = {plain.config.id2label[i]: float(p) for i, p in enumerate(chances)}
        for found in (mine_, theirs):
            assert np.allclose([found.scores[k] for k in expected], list(expected.values()), atol=1e-4)
