"""Stored features of every token: tags, answers and choices learned on them are answered, exported and served the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_answering import questions
from test_choice_and_ordinal import choices
from test_tagging import sentences
from torch import nn

from regraft.engine.config import load_config
from regraft.engine.errors import ConfigError, ExportError
from regraft.engine.evaluation import evaluate
from regraft.engine.export import export_bundle
from regraft.engine.features.extract import features_of
from regraft.engine.features.sources import keys_of, parts_of
from regraft.engine.features.spec import feature_spec
from regraft.engine.heads.bodies import BiLSTM, Convolutions
from regraft.engine.heldout import encoded, heldout_rows
from regraft.engine.predict import predict
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from regraft.serve.session import Session

TEXTS = ["sharp long, film plot", "", "warm\r\nlong  plot", "good " * 80 + "sharp long"]
FAST = ["training.learning_rate=1e-2", "training.threads=1", "training.precision=fp32", "head.hidden=16"]


def conll(path: Path, count: int, seed: int) -> str:
    rows = ["\n".join(f"{w} {t}" for w, t in zip(*row, strict=True)) for row in sentences(count, seed)]
    path.write_text("\n\n".join(rows) + "\n")
    return str(path)


@pytest.fixture
def tagged(make_config, tmp_path):
    """A frozen tagging run's configuration file, with a store of its own."""

    def make(method: str = "frozen", **task: object) -> Path:
        return make_config(
            method=method,
            data={
                "train": conll(tmp_path / "train.conll", 150, 1),
                "dev": conll(tmp_path / "dev.conll", 40, 2),
                "format": "conll",
            },
            features={"store": str(tmp_path / "store"), "layers": "all"},
            task={"type": "tagging", **task},
            training={"epochs": 8, "batch_size": 16},
        )

    return make


def serve(folder: Path, bundle: Path, texts: list, **options: object) -> list:
    export_bundle(folder, bundle, **options)
    session = Session(bundle, threads=1)
    prepared = session.prepare(texts)
    return list(session.answers(prepared, session.run(prepared.items)))


def measured(folder: Path) -> dict[str, float]:
    """The folder's figures on the run's dev rows, from texts."""
    trained = load_trained(folder)
    made = encoded(trained, heldout_rows(trained, None, split="dev"))
    return evaluate(trained.running, made, trained.task).metrics


@pytest.mark.parametrize("body", [BiLSTM(6, 4), Convolutions(6, 5, [2, 3, 4])], ids=["bilstm", "cnn"])
def test_what_stands_behind_a_texts_end_changes_no_tokens_state(body):
    generator = torch.Generator().manual_seed(0)
    cells, lengths = torch.randn(3, 9, 6, generator=generator), torch.tensor([2, 9, 5])
    alone = [body.states(cells[i : i + 1, :n], lengths[i : i + 1])[0] for i, n in enumerate(lengths)]
    cells[0, 2:], cells[2, 5:] = 1e4, -1e4
    together = body.states(cells, lengths)
    for i, n in enumerate(lengths):
        assert torch.allclose(together[i, :n], alone[i], atol=1e-5)


def test_a_tokens_states_are_torchs_own_bidirectional_lstms():
    torch.manual_seed(0)
    ours, theirs = BiLSTM(6, 4), nn.LSTM(6, 4, batch_first=True, bidirectional=True)
    for name, value in ours.ahead.named_parameters():
        getattr(theirs, name).data.copy_(value)
    for name, value in ours.back.named_parameters():
        getattr(theirs, f"{name}_reverse").data.copy_(value)
    cells = torch.randn(2, 7, 6)
    assert torch.allclose(ours.states(cells, torch.tensor([7, 7])), theirs(cells)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("head", "crf", "layers", "layout"),
    [
        ("linear", False, "all", None),
        ("mlp", True, "last4", None),
        ("bilstm", True, "all", "packed"),
        ("bilstm", False, "last4", "padded"),
        ("cnn", False, "0", None),
    ],
)
def test_a_frozen_encoder_learns_tags_and_serves_them_from_one_bundle(tagged, tmp_path, head, crf, layers, layout):
    wanted = [f"head.type={head}", f"features.layers={'[0,1,2]' if layers == 'last4' else layers}", "head.mix=concat"]
    wanted = wanted if layers == "last4" else wanted[:2]
    result = train(load_config(tagged(crf=crf), [*FAST, *wanted]), quiet=True)
    assert result.metrics["dev"]["f1"] > 0.8
    trained = load_trained(result.folder)
    answers = [a.prediction for a in predict(trained, [(t, None) for t in TEXTS])]
    assert answers[-1].spans[-1].end == len(TEXTS[-1])
    found = serve(result.folder, tmp_path / "b", TEXTS, layout=layout) if layout else answers
    for mine, theirs in zip(answers, found, strict=True):
        assert [(s.start, s.end, s.label) for s in mine.spans] == [(s.start, s.end, s.label) for s in theirs.spans]
        assert np.allclose([s.score for s in mine.spans], [s.score for s in theirs.spans], atol=1e-4)
    if crf:
        scores = load_file(result.folder / "best" / "head.safetensors")["crf.transitions"]
        kept = np.array(trained.task.spec()["scores"][0])
        assert scores.abs().max() > 0.01
        assert np.allclose(kept[kept > -1e3], scores.numpy()[kept > -1e3], atol=1e-6)


def test_evaluating_the_folder_gives_what_training_on_stored_features_told(tagged, tmp_path):
    path = tagged()
    result = train(load_config(path, [*FAST, "head.type=bilstm", "training.epochs=2"]), quiet=True)
    assert measured(result.folder)["f1"] == pytest.approx(result.metrics["dev"]["f1"], abs=1e-9)
    weights = json.loads((result.folder / "evaluation.json").read_text())["layer_weights"]["layers"]
    assert [layer["layer"] for layer in weights] == [0, 1, 2]


def test_windows_of_a_long_text_are_kept_once_and_found_again(tagged, tmp_path):
    long = [(["film", "plot"] * 60, ["O", "B-PLACE"] * 60)]
    text = "\n".join(f"{w} {t}" for w, t in zip(*long[0], strict=True))
    config = load_config(tagged(), ["model.max_length=24"])
    (tmp_path / "train.conll").write_text(text + "\n")
    (tmp_path / "dev.conll").write_text(text + "\n")
    spec, tokenizer = feature_spec(config)
    assert spec.pooling == "none"
    _, parts = parts_of(config, spec, tokenizer)
    said: list[str] = []
    found = features_of(config, {name: part.source for name, part in parts.items()}, said.append, shown=False)
    windows = len(parts["train"].source)
    assert windows > 5
    distinct = len({k.tobytes() for k in keys_of(parts["train"].source)})
    assert f"{distinct} distinct texts computed" in said[-1], "dev has the same windows as train"
    made = parts["train"].learned(found["train"])
    assert found["train"].lengths.tolist() == made.store.lengths.tolist() == parts["train"].source.lengths.tolist()
    assert made.store.offsets[-1] == len(parts["train"].source.ids)
    again: list[str] = []
    features_of(config, {name: part.source for name, part in parts.items()}, again.append, shown=False)
    assert "0 distinct texts computed" in again[-1]


def test_token_types_are_part_of_what_a_sequence_is_known_by():
    from regraft.engine.data.tokens import TokenStore

    ids, offsets = np.array([1, 2, 3, 1, 2, 3], dtype=np.int32), np.array([0, 3, 6])
    plain, zeros = TokenStore(ids, offsets), TokenStore(ids, offsets, np.zeros(6, dtype=np.uint8))
    typed = TokenStore(ids, offsets, np.array([0, 0, 0, 0, 0, 1], dtype=np.uint8))
    assert np.array_equal(keys_of(plain), keys_of(zeros))
    assert np.array_equal(keys_of(plain)[0], keys_of(typed)[0])
    assert not np.array_equal(keys_of(plain)[1], keys_of(typed)[1])


def test_questions_are_answered_over_stored_features(make_config, tmp_path):
    for name, count, seed in (("train", 260, 1), ("dev", 50, 2)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions(count, seed))) + "\n")
    path = make_config(
        method="frozen",
        data={"train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.jsonl")},
        features={"store": str(tmp_path / "store"), "layers": "all"},
        task={"type": "answering"},
        training={"epochs": 12, "batch_size": 16},
    )
    result = train(load_config(path, [*FAST, "head.type=bilstm"]), quiet=True)
    assert result.metrics["dev"]["f1"] > 0.3
    asked = [(q["question"], q["context"]) for q in questions(5, 9)]
    for (_, context), answer in zip(asked, predict(load_trained(result.folder), asked), strict=True):
        best = answer.prediction.spans[0]
        assert context[best.start : best.end] == best.text
    assert measured(result.folder)["f1"] == pytest.approx(result.metrics["dev"]["f1"], abs=1e-9)


def test_choices_are_scored_over_stored_features(make_config, tmp_path):
    data = {"train": choices(tmp_path / "train.jsonl", 120, 1), "dev": choices(tmp_path / "dev.jsonl", 30, 2)}
    features = {"store": str(tmp_path / "store"), "layers": "all"}
    path = make_config(method="frozen", data=data, task={"type": "choice"}, features=features)
    result = train(load_config(path, [*FAST, "head.type=mlp", "training.epochs=3"]), quiet=True)
    asked = [("good", ("very film", "very good")), ("plot", ("very plot", "very bad", "very music"))]
    answers = [a.prediction for a in predict(load_trained(result.folder), asked)]
    assert [list(a.extra["choices"]) for a in answers]
    assert measured(result.folder)["accuracy"] == pytest.approx(result.metrics["dev"]["accuracy"])


def test_word_vectors_and_networks_from_scratch_tag_too(tagged, tmp_path):
    wanted = ["method=scratch", "head.type=bilstm", "words.dimension=12", "words.min_count=1", "features.layers=last"]
    result = train(load_config(tagged(crf=True), [*FAST, *wanted]), quiet=True)
    assert result.metrics["dev"]["f1"] > 0.9
    assert measured(result.folder)["f1"] == pytest.approx(result.metrics["dev"]["f1"], abs=1e-9)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (["head.type=attention"], "head.type: attention gives one answer a text; task.type: tagging needs one a token"),
        (["head.type=logistic"], "head.type: logistic gives one answer a text"),
        (["features.pooling=mean"], "features.pooling: mean keeps one row a text, and task.type: tagging needs every"),
        (["features.normalise=true"], "features.normalise: for pooled rows only"),
        (["method=scratch", "head.type=attention"], "head.type: attention gives one answer a text"),
    ],
)
def test_what_cannot_tag_is_refused_by_name(tagged, wanted, told):
    with pytest.raises(ConfigError, match=told):
        load_config(tagged(), wanted)


def test_a_vocabulary_head_has_no_features_to_store(make_config, tmp_path):
    (tmp_path / "t.txt").write_text("good film\n" * 20)
    path = make_config(method="frozen", task={"type": "mlm"}, data={"train": str(tmp_path / "t.txt"), "dev": None})
    with pytest.raises(ConfigError, match=r"task.type: mlm: its head is over the vocabulary"):
        train(load_config(path), quiet=True)


def test_a_tagger_is_not_put_beside_heads_that_answer_once_a_text(tagged, make_config, write_rows, tmp_path):
    tags = train(load_config(tagged(), [*FAST, "training.max_steps=2", f"run={tmp_path / 'tags'}"]), quiet=True)
    data = {"train": str(write_rows("c.csv", 60, 7)), "dev": str(write_rows("d.csv", 30, 8)), "format": "auto"}
    other = make_config("c.yaml", method="frozen", data=data, features={"store": str(tmp_path / "store")})
    mood = train(load_config(other, ["training.max_steps=2", f"run={tmp_path / 'mood'}"]), quiet=True)
    with pytest.raises(ExportError, match="tags: a tagging head answers each token"):
        export_bundle([mood.folder, tags.folder], tmp_path / "both")
