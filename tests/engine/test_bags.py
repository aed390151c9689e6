"""TF-IDF and one-hot as runs like any other: scikit-learn's numbers, from ids that the saved tokenizer gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from conftest import sentences
from regraft.engine.config import load_config
from regraft.engine.errors import ConfigError, ExportError, ModelError
from regraft.engine.export import export_bundle
from regraft.engine.predict import predict
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from regraft.engine.words.bags import counts, frequent_runs, runs_of_ids


@pytest.fixture
def bag(make_config, write_rows, tmp_path):
    data = {"train": str(write_rows("many.csv", 300, 7)), "dev": str(write_rows("other.csv", 100, 8))}
    path = make_config(data=data)

    def run(*overrides: str, folder: str = "r"):
        return train(load_config(path, [f"run={tmp_path / folder}", "training.threads=1", *overrides]), quiet=True)

    run.path = path
    return run


def weighted(folder, texts: list[str]) -> np.ndarray:
    """What the saved model's linear layer sees of texts."""
    trained = load_trained(folder)
    made = trained.tokenizer.backend.encode_batch(texts)
    ids = np.array([i for e in made for i in e.ids])
    return trained.running.model.weighted(ids, np.array([len(e) for e in made])).toarray()


def test_its_numbers_are_those_of_scikit_learns_tfidf(bag):
    texts, held = [t for t, _ in sentences(300, 7)], [t for t, _ in sentences(100, 8)]
    theirs = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+").fit(texts)
    ours = weighted(bag("method=tfidf").folder, held)
    expected = theirs.transform(held).toarray()
    assert ours.shape == expected.shape
    # The order of features differs, their values do not.
    assert np.allclose(np.sort(ours, axis=1), np.sort(expected, axis=1), atol=1e-5)
    assert np.allclose(ours @ ours.T, expected @ expected.T, atol=1e-5)


def test_one_hot_says_what_is_there_and_no_more(bag):
    texts, held = [t for t, _ in sentences(300, 7)], [t for t, _ in sentences(100, 8)]
    expected = CountVectorizer(binary=True, token_pattern=r"\S+").fit(texts).transform(held).toarray()
    ours = weighted(bag("method=onehot", "words.ngrams=1").folder, held)
    assert np.array_equal(ours @ ours.T, expected @ expected.T)


@pytest.mark.parametrize(("method", "head"), [("tfidf", "logistic"), ("tfidf", "svm"), ("onehot", "logistic")])
def test_a_bag_learns_and_answers_as_it_was_measured(bag, method, head):
    result = bag(f"method={method}", f"head.type={head}")
    assert result.metrics["dev"]["accuracy"] > 0.75
    trained = load_trained(result.folder)
    rows = sentences(100, 8)
    answers = predict(trained, [(t, None) for t, _ in rows])
    right = np.mean([a.prediction.label == label for a, (_, label) in zip(answers, rows, strict=True)])
    assert right == pytest.approx(result.metrics["dev"]["accuracy"], abs=1e-9)
    assert (result.folder / "report.html").is_file()


def test_texts_of_unknown_words_are_answered_alike_and_there_is_no_graph(bag, tmp_path):
    result = bag("method=tfidf")
    answers = predict(load_trained(result.folder), [(t, None) for t in ("good fine warm", "", "unheardof")])
    first, empty, unknown = (a.prediction for a in answers)
    assert first.label == "pos"
    assert empty.scores == unknown.scores, "nothing is known of either"
    with pytest.raises(ExportError, match="a bag of words is no graph"):
        export_bundle(result.folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_same_settings_give_the_same_weights(bag, tmp_path):
    from safetensors.torch import load_file

    one, two = (load_file(bag("method=tfidf", folder=n).folder / "best" / "bag.safetensors") for n in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_several_labels_a_text_and_pairs_are_counted_too(make_config, tmp_path):
    rows = [
        {"text": t, "text_pair": "film", "label": [w for w in ("good", "bad") if w in t.split()]}
        for t, _ in sentences(200, 3)
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = {"train": str(tmp_path / "m.jsonl"), "dev": None, "columns": {"text_pair": "text_pair"}}
    path = make_config(method="tfidf", task={"type": "multilabel"}, data=data)
    result = train(load_config(path), quiet=True)
    assert result.metrics["dev"]["micro_f1"] > 0.7
    (answer,) = predict(load_trained(result.folder), [("good bad", "film")])
    assert set(answer.prediction.label) == {"good", "bad"}


def test_chinese_texts_are_counted_by_characters(make_config, tmp_path):
    rows = ["text,label", *["酒店很好,pos", "房间干净很好,pos", "太差了,neg", "服务很差,neg"] * 8]
    (tmp_path / "zh.csv").write_text("\n".join(rows) + "\n")
    path = make_config(method="tfidf", data={"train": str(tmp_path / "zh.csv"), "dev": str(tmp_path / "zh.csv")})
    result = train(load_config(path), quiet=True)
    assert result.metrics["dev"]["accuracy"] == 1.0
    assert load_trained(result.folder).running.model.shape.longest == 3


def test_runs_stay_within_a_text_and_leave_out_what_is_no_word():
    # Two texts: 2 (start) 5 6 1 (unknown) 7 and 2 6 7; words are 4 and above.
    ids, lengths = np.array([2, 5, 6, 1, 7, 2, 6, 7]), np.array([5, 3])
    numbers, owner = runs_of_ids(ids, lengths, 10, 3)
    assert sorted(zip(owner.tolist(), numbers.tolist(), strict=True)) == [
        (0, 5),
        (0, 6),
        (0, 7),
        (0, 56),
        (1, 6),
        (1, 7),
        (1, 67),
    ]
    known = frequent_runs(numbers, owner, 2, 2)
    assert known.tolist() == [6, 7]
    assert counts(numbers, owner, known, 2).toarray().tolist() == [[1, 1], [1, 1]]
    assert counts(np.array([6, 6, 9]), np.array([0, 0, 1]), known, 3).toarray().tolist() == [[2, 0], [0, 0], [0, 0]]


def test_what_a_bag_cannot_do_is_refused_by_name(bag, make_config):
    result = bag("method=tfidf")
    for wanted, told in (
        ({"head": {"type": "linear"}}, "head.type: linear; method: tfidf counts words and is solved at once"),
        ({"task": {"type": "regression"}}, "task.type: regression; method: tfidf knows classes"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_config(make_config(method="tfidf", **wanted))
    (result.folder / "best" / "bag.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(ModelError, match=r"bag.safetensors: cannot be read"):
        load_trained(result.folder)
