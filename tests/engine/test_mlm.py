"""Hidden words: drawn anew each time, learned on their rows alone, filled in; pretrain, adapt, fine-tune as one chain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import WORDS, regraft
from regraft.engine.config import DataConfig, load_config
from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.errors import DataError
from regraft.engine.export import export_bundle
from regraft.engine.predict import predict
from regraft.engine.tasks.documents import full_length
from regraft.engine.tasks.masking import choose, hide
from regraft.engine.tasks.mlm import MaskedLanguage
from regraft.engine.tasks.sentence_pairs import sentences_of
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from regraft.serve.session import Session

FOLLOWS = {word: WORDS[(i + 1) % len(WORDS)] for i, word in enumerate(WORDS)}  # a language that can be learned


def documents(count: int, seed: int) -> list[str]:
    """Sentences in which each word has one that follows it."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        sentences = []
        for _ in range(int(rng.integers(3, 7))):
            words = [str(rng.choice(WORDS))]
            while len(words) < rng.integers(4, 9):
                words.append(FOLLOWS[words[-1]])
            sentences.append(" ".join(words) + ".")
        found.append(" ".join(sentences))
    return found


@pytest.fixture
def mlm_config(make_config, tmp_path):
    def make(**task: object) -> Path:
        for name, count, seed in (("train", 150, 1), ("dev", 20, 2)):
            (tmp_path / f"{name}.txt").write_text("\n\n".join(documents(count, seed)))
        return make_config(
            data={"train": str(tmp_path / "train.txt"), "dev": str(tmp_path / "dev.txt"), "format": "text"},
            task={"type": "mlm", **task},
            training={"epochs": 6, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32", "threads": 1},
        )

    return make


@given(st.lists(st.integers(0, 70), min_size=1, max_size=20), st.integers(10, 40))
@settings(max_examples=200, deadline=None)
def test_documents_fill_units_to_the_brim_and_lose_nothing(lengths, room):
    parts, sizes = full_length(lengths, room, 2)
    assert sum(sizes) == len(parts)
    for row, length in enumerate(lengths):
        mine = [p for p in parts if p.row == row]
        assert [p.start for p in mine] == [0, *(p.end for p in mine[:-1])][: len(mine)]
        assert (mine[-1].end if mine else 0) == length
    at, filled = 0, []
    for size in sizes:
        filled.append(sum(p.end - p.start + 2 for p in parts[at : at + size]))
        at += size
    assert all(n <= room for n in filled) and all(n > room - 10 for n in filled[:-1])


@given(st.lists(st.lists(st.integers(1, 30), max_size=8), min_size=1, max_size=8), st.sampled_from(["nsp", "order"]))
@settings(max_examples=200, deadline=None)
def test_pairs_are_what_their_label_says(documents, how):
    sizes = [sum(sentences) for sentences in documents]
    owner = np.repeat(np.arange(len(documents)), sizes)
    begins = [np.cumsum([0, *sentences])[:-1] for sentences in documents]
    flat = sentences_of([np.arange(n) for n in sizes], [np.zeros(n, dtype=np.int64) for n in sizes], begins)
    rng, paired = np.random.default_rng(0), set()
    for first, last in flat.stretches(24).tolist():
        paired.update(range(first, last))
        a, b, label = flat.draw((first, last), 24, how, rng)
        assert a[1] > a[0] and b[1] > b[0] and a[1] - a[0] + b[1] - b[0] <= 24
        rows = [set(owner[start:end]) for start, end in (a, b)]
        assert len(rows[0]) == len(rows[1]) == 1
        if how == "nsp":
            assert (rows[0] != rows[1]) == bool(label)
            assert label or a[1] <= b[0]
        else:
            assert rows[0] == rows[1] and (b[0] < a[0]) == bool(label)
    able = [row for row, sentences in enumerate(documents) if len(sentences) > 1]
    assert paired == {s for s in range(len(flat.starts) - 1) if flat.document_of(s) in able}


@pytest.mark.parametrize("how", ["token", "word", "span"])
def test_what_is_hidden_is_about_the_share_whole_words_and_never_a_template_token(how):
    rng = np.random.default_rng(0)
    words = np.concatenate(
        [np.concatenate([[-1], np.repeat(np.arange(30), rng.integers(1, 4, 30)), [-1]]) for _ in range(200)]
    )
    sequence = _owners(words)
    chosen = choose(words, sequence, 0.15, how, np.random.default_rng(1))
    assert not chosen[words < 0].any()
    assert 0.12 < chosen.sum() / (words >= 0).sum() < 0.18
    assert set(sequence[chosen]) == set(range(200))
    if how != "token":
        for key in {(s, w) for s, w in zip(sequence[chosen], words[chosen], strict=True)}:
            assert chosen[(sequence == key[0]) & (words == key[1])].all()
    ids = rng.integers(5, 1000, len(words))
    shown = hide(ids, chosen, 4, 1000, np.random.default_rng(2))
    assert (shown[~chosen] == ids[~chosen]).all()
    assert (shown[chosen] == 4).mean() == pytest.approx(0.8, abs=0.05)
    assert (shown[chosen] == ids[chosen]).mean() == pytest.approx(0.1, abs=0.04)


def _owners(words: np.ndarray) -> np.ndarray:
    """Each sequence begins and ends with a token of the template."""
    edges = np.cumsum(words == -1)
    return (edges - (words == -1) * ((edges % 2) == 0) - 1) // 2


def examples_of(tiny_model: Path, task: MaskedLanguage, count: int = 20):
    rows = Rows("train", "t", documents(count, 3), None, np.arange(count))
    return task.examples(rows, load_fast_tokenizer(tiny_model), 48)


def test_masks_are_fresh_each_time_and_the_same_for_the_same_step(tiny_model):
    task = MaskedLanguage()
    made = examples_of(tiny_model, task)
    units = np.arange(len(made))
    (one, _), (again, _), (later, _) = (task.draw(made, units, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert np.array_equal(one.store.ids, again.store.ids) and np.array_equal(one.marks, again.marks)
    assert not np.array_equal(one.marks, later.marks)
    assert np.array_equal(np.where(one.marks, one.targets, one.store.ids), made.store.ids)
    assert made.lengths.max() <= 48 and np.array_equal(one.lengths, made.lengths)
    assert one.unit_weights.sum() == one.marks.sum()


def labels_of(task: MaskedLanguage, drawn) -> np.ndarray:
    return task.targets_of(drawn, np.arange(len(drawn)))[-len(drawn) :]


@pytest.mark.parametrize("how", ["nsp", "order"])
def test_pairs_are_drawn_anew_each_time_and_the_same_for_the_same_step(tiny_model, how):
    task = MaskedLanguage(sentences=how)
    made = examples_of(tiny_model, task)
    units = np.arange(len(made))[::2]
    drawn = [task.draw(made, units, (0, step))[0] for step in range(12)]
    again = task.draw(made, units, (0, 3))[0]
    assert np.array_equal(again.store.ids, drawn[3].store.ids) and np.array_equal(again.targets, drawn[3].targets)
    labels = np.stack([labels_of(task, some) for some in drawn])
    assert (labels.min(axis=0) == 0).any() and (labels.max(axis=0) == 1).any()
    assert len({some.tobytes() for some in labels}) > 6
    assert all(some.lengths.max() <= 48 for some in drawn)
    assert all(np.array_equal(some.row_of, made.row_of[units]) for some in drawn)


def test_a_run_over_pairs_that_was_stopped_goes_on_bit_for_bit(mlm_config, tmp_path):
    from safetensors.torch import load_file

    path = mlm_config(sentences="nsp")
    more = ["training.max_steps=9", "training.checkpoint_every=2", "training.evaluate_every=5"]
    whole = train(load_config(path, [f"run={tmp_path / 'whole'}", *more]), quiet=True)

    class Stopped(Exception):
        pass

    def stop(info):
        if info.step == 4:
            raise Stopped

    config = load_config(path, [f"run={tmp_path / 'stopped'}", *more])
    with pytest.raises(Stopped):
        train(config, quiet=True, on_step=stop)
    resumed = train(config, quiet=True)
    assert resumed.metrics == whole.metrics
    one, two = (load_file(r.folder / "best" / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_logits_of_hidden_rows_are_those_of_the_whole(tiny_model):
    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

    from regraft.engine.batches import collate_examples
    from regraft.engine.models import RunningModel

    for auto, sentences in ((AutoModelForMaskedLM, "none"), (AutoModelForPreTraining, "nsp")):
        task = MaskedLanguage(sentences=sentences)
        drawn, units = task.draw(examples_of(tiny_model, task), np.arange(6), (0,))
        torch.manual_seed(0)
        model = auto.from_pretrained(tiny_model).eval()
        padded = RunningModel(model, pad_token_id=0, reads="marked").eval()
        batch = collate_examples(drawn, drawn.sequences(units))
        with torch.no_grad():
            expected = padded(batch)
            padded.run_packed()
            assert padded.packed, padded.reason
            found = padded(batch)
        for mine, theirs in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
            assert mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=1e-5)


def test_a_run_learns_the_language_and_fills_it_in_everywhere_the_same(mlm_config, tmp_path):
    more = ["training.epochs=25", "training.batch_size=2", "training.learning_rate=3e-3", "model.dropout=0"]
    result = train(load_config(mlm_config(), [*more, "training.evaluate_every=400"]), quiet=True)
    dev = result.metrics["dev"]
    assert (
        dev["accuracy"] > 1.5 * dev["trivial_accuracy"] and dev["perplexity"] < 17
    )  # the words alone, without their order: 20
    assert dev["perplexity"] == pytest.approx(np.exp(dev["loss"]))
    trained = load_trained(result.folder)
    texts = ["good bad [MASK] film plot.", "[MASK] sharp [MASK]"]
    answers = [a.prediction for a in predict(trained, [(t, None) for t in texts])]
    assert answers[0].label.startswith("good bad ") and answers[0].label.endswith(" film plot.")
    for text, answer in zip(texts, answers, strict=True):
        assert all(text[s.start : s.end] == "[MASK]" for s in answer.spans)
    with pytest.raises(DataError, match=r"nothing to fill in: the text has no \[MASK\]"):
        list(predict(trained, [("good plot", None)]))
    for layout in ("packed", "padded"):
        export_bundle(result.folder, tmp_path / layout, layout=layout)
        session = Session(tmp_path / layout, threads=1)
        prepared = session.prepare([*texts, "no mask"])
        assert list(prepared.problems) == [2] and "nothing to fill in" in prepared.problems[2]
        for mine, theirs in zip(answers, session.answers(prepared, session.run(prepared.items)), strict=True):
            assert mine.label == theirs.label
            assert np.allclose([s.score for s in mine.spans], [s.score for s in theirs.spans], atol=1e-4)
    done = regraft("predict", result.folder, texts[0], "--format", "jsonl", "--top-k", "2")
    assert done.returncode == 0, done.stderr
    assert [len(mask["candidates"]) for mask in json.loads(done.stdout)["masks"]] == [2]


def test_one_step_in_parts_is_the_step_as_a_whole(mlm_config, tmp_path):
    from safetensors.torch import load_file

    path = mlm_config(sentences="order")
    weights = []
    for name, budget in (("whole", 100000), ("cut", 60)):
        settings = [
            f"run={tmp_path / name}",
            f"training.token_budget={budget}",
            "training.max_steps=4",
            "training.epsilon=1e-3",  # else AdamW makes whole steps of gradients that are rounding alone
            "model.dropout=0",
        ]
        result = train(load_config(path, settings), quiet=True)
        weights.append(load_file(result.folder / "best" / "model.safetensors"))
    assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 1e-5


def test_text_files_are_documents_between_blank_lines_or_a_line_each(tmp_path):
    def read(content: str) -> Rows:
        (tmp_path / "a.txt").write_bytes(content.encode())
        return MaskedLanguage.read(str(tmp_path / "a.txt"), DataConfig(train="a.txt"), split="train")

    assert read("one\r\ntwo\r\n\r\n\r\nthree").texts == ["one\ntwo", "three"]
    assert read("one\ntwo\n").texts == ["one", "two"]
    with pytest.raises(DataError, match="no documents"):
        read("\n\n")
