"""Questions answered from a context: read, learned in windows, judged by the official rules, exact to the character."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import regraft
from regraft.engine.config import DataConfig, TaskConfig, load_config
from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.errors import DataError
from regraft.engine.export import export_bundle
from regraft.engine.predict import predict
from regraft.engine.tasks.answering import Answering
from regraft.engine.tasks.squad_metrics import AnswerMetrics, exact_chinese, f1_chinese, f1_english, judge
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from regraft.serve.session import Session

ODD = [
    "e\u0301",
    "\u200b",
    "\U0001f600",
    "\U0001f468\u200d\U0001f469",
    "שלום",
    "我",
    "\r\n",
    "ا",
    "\u0300",
    "good",
    "plot.",
]
TEXTS = st.lists(st.one_of(st.sampled_from(ODD), st.text("abgod .,-'", max_size=6), st.characters(codec="utf-8")), min_size=1, max_size=30).map("".join)  # fmt: skip
QUESTIONS = {"good": "sharp", "bad": "dull"}  # what is asked for is the word after it


def questions(count: int, seed: int, none: float = 0.0) -> list[dict]:
    """What stands after 'good', or after 'bad'? One word, somewhere in a few."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        words = [str(w) for w in rng.choice(["film", "plot", "very", "music", "story"], rng.integers(3, 12))]
        asked = str(rng.choice(["good", "bad"]))
        answers = []
        if rng.random() >= none:
            at = int(rng.integers(0, len(words)))
            words[at:at] = [asked]
            start = len(" ".join(words[: at + 1])) + 1
            if at + 1 < len(words):
                answers = [{"text": words[at + 1], "answer_start": start}]
        found.append({"id": f"q{number}", "question": asked, "context": " ".join(words), "answers": answers})
    return found if none else [q for q in found if q["answers"]]


@pytest.fixture
def answering_config(make_config, tmp_path):
    def make(none: float = 0.0, **task: object) -> Path:
        for name, count, seed in (("train", 260, 1), ("dev", 50, 2)):
            lines = map(json.dumps, questions(count, seed, none))
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        return make_config(
            data={"train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.jsonl")},
            task={"type": "answering", **task},
            training={"epochs": 10, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32", "threads": 1},
        )

    return make


def test_answers_are_compared_by_the_official_rules():
    assert judge("english", "The Denver Broncos!", ["Denver Broncos", "Broncos"]) == (1.0, 1.0)
    assert f1_english("Denver team", "Denver Broncos team of 2016") == pytest.approx(2 * 2 / (2 + 5))
    assert judge("english", "", []) == (1.0, 1.0)
    assert judge("english", "x", []) == (0.0, 0.0)
    assert judge("english", "", ["the", "42"]) == (0.0, 0.0)  # an answer that is nothing but an article counts as none
    assert exact_chinese("《战国》", "战国") == 1.0
    # 光荣和ω-force has the segments 光 荣 和 ωforce; the longest run that both share counts
    assert f1_chinese("光荣和koei", "光荣和ω-force") == pytest.approx(2 * 3 / (4 + 4))
    assert f1_chinese("国战", "战国") == pytest.approx(2 * 1 / 4)


def test_the_tuned_threshold_is_the_best_there_is():
    rng = np.random.default_rng(0)
    for _ in range(20):
        metrics = AnswerMetrics(0.0)
        rows = [
            (float(m), float(rng.integers(2)), float(rng.random()), bool(rng.integers(2))) for m in rng.normal(size=12)
        ]
        for margin, exact, f1, none in rows:
            metrics.add(margin, exact, 0.0 if none else f1, none)

        def at(threshold, rows=metrics.rows):
            found = AnswerMetrics(threshold)
            found.rows = rows
            return found.compute()["f1"]

        best = max(at(t) for t in [-99.0, 99.0, *(m + 1e-9 for m, *_ in rows), *(m - 1e-9 for m, *_ in rows)])
        assert at(metrics.tuned_threshold()) == pytest.approx(best)


def test_the_loss_is_the_mean_cross_entropy_of_start_and_end_within_each_window():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(17, 2, generator=generator, dtype=torch.float64).requires_grad_()
    lengths, targets = (5, 1, 11), torch.tensor([[1, 4], [0, 0], [3, 10]])
    weights = torch.tensor([1.0, 0.0, 2.0])
    loss = Answering().batch_loss(logits, targets, weights, lengths)
    expected, start = 0.0, 0
    for n, (first, last), weight in zip(lengths, targets.tolist(), weights.tolist(), strict=True):
        mine = logits[start : start + n]
        both = [
            torch.nn.functional.cross_entropy(mine[None, :, i], torch.tensor([t])) for i, t in ((0, first), (1, last))
        ]
        expected, start = expected + weight * (both[0] + both[1]) / 2, start + n
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all() and gradient[5].abs().max() == 0


def test_what_is_answered_stands_there(tiny_model):
    tokenizer = load_fast_tokenizer(tiny_model)
    task = Answering(no_answer=True, stride=4)

    @given(TEXTS, st.integers(0, 9))
    @settings(max_examples=150, deadline=None)
    def check(context, seed):
        rows = Rows("t", "t", ["good plot"], None, np.arange(1), pairs=[context])
        made = task.examples(rows, tokenizer, 16, labelled=False)
        rng = np.random.default_rng(seed)
        (answer,) = task.answers(made, [rng.normal(size=(n, 2)) for n in made.store.lengths])
        assert all(context[s.start : s.end] == s.text for s in answer.spans)
        chances = [s.score for s in answer.spans] + [answer.extra["no_answer_score"]]
        assert sum(chances) == pytest.approx(1.0) and answer.spans == tuple(
            sorted(answer.spans, key=lambda s: -s.score)
        )

    check()


def test_a_long_context_is_read_in_windows_and_the_right_answer_found(tiny_model):
    tokenizer = load_fast_tokenizer(tiny_model)
    context = "film plot " * 60 + "good sharp " + "very music " * 60
    start = context.index("sharp")
    from regraft.engine.data.squad import Answers

    rows = Rows("train", "t", ["good"], [Answers("1", ("sharp",), (start,))], np.arange(1), pairs=[context])
    task = Answering(stride=20)
    made = task.examples(rows, tokenizer, 48)
    assert len(made.store) > 5 and made.store.lengths.max() <= 48
    assert (made.targets > 0).any()
    logits = [np.zeros((n, 2)) for n in made.store.lengths]
    for window, target in zip(logits, made.targets, strict=True):
        window[target[0], 0] = window[target[1], 1] = 9.0
    (answer,) = task.answers(made, logits)
    assert (answer.label, answer.spans[0].start) == ("sharp", start)


def test_a_run_learns_tunes_predicts_exports_and_serves_the_same(answering_config, tmp_path):
    result = train(load_config(answering_config(none=0.3)), quiet=True)
    dev = result.metrics["dev"]
    assert dev["f1"] > 0.6 and {"exact_match", "answerable_f1", "no_answer_accuracy"} <= dev.keys()
    trained = load_trained(result.folder)
    assert trained.task.no_answer and trained.task.threshold != 0.0
    asked = [("good", "film very good music plot"), ("bad", "\U0001f600 e\u0301 bad story " * 30), ("bad", "\u200b")]
    answers = [a.prediction for a in predict(trained, asked)]
    for (_, context), answer in zip(asked, answers, strict=True):
        assert all(context[s.start : s.end] == s.text for s in answer.spans)
    for layout in ("packed", "padded"):
        export_bundle(result.folder, tmp_path / layout, layout=layout)
        session = Session(tmp_path / layout, threads=1)
        prepared = session.prepare([q for q, _ in asked], [c for _, c in asked])
        for mine, theirs in zip(answers, session.answers(prepared, session.run(prepared.items)), strict=True):
            assert [(s.start, s.end) for s in mine.spans][:1] == [(s.start, s.end) for s in theirs.spans][:1]
            assert mine.label == theirs.label
            assert np.allclose([s.score for s in mine.spans], [s.score for s in theirs.spans], atol=1e-4)
    done = regraft("predict", result.folder, "good", "--pair", "film good music", "--format", "jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() >= {"answer", "start", "end", "score", "candidates", "no_answer_score"}


def read(path: Path, content: str, **data: object) -> Rows:
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    return Answering.read(str(path), DataConfig(train=str(path), **data), split="train")


def test_squad_json_and_lines_give_the_same_rows(tmp_path):
    qa = {"id": "7", "question": "Who?", "answers": [{"text": "Jo", "answer_start": 0}]}
    none = {"id": "8", "question": "Why?", "answers": [{"text": "x", "answer_start": 1}], "is_impossible": True}
    squad = {"version": "2.0", "data": [{"paragraphs": [{"context": "Jo did it.", "qas": [qa, none]}]}]}
    whole = read(tmp_path / "a.json", json.dumps(squad))
    lines = [{"context": "Jo did it.", **qa}, {"context": "Jo did it.", **none}]
    listed = read(tmp_path / "b.jsonl", "\n".join(map(json.dumps, lines)))
    columns = [
        {**lines[0], "answers": {"text": ["Jo"], "answer_start": [0]}},
        {**lines[1], "answers": {"text": [], "answer_start": []}},
    ]
    arrays = read(tmp_path / "c.jsonl", "\n".join(map(json.dumps, columns)))
    for rows in (whole, listed, arrays):
        assert rows.texts == ["Who?", "Why?"] and rows.pairs == ["Jo did it."] * 2
        assert [(a.id, a.texts, a.starts) for a in rows.labels] == [("7", ("Jo",), (0,)), ("8", (), ())]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "contxt": "b", "answers": []}', r":1: there is no key 'context' \(did you mean 'contxt'\?\)"),
        ('{"question": "a", "context": " ", "answers": []}', r":1: the context is empty; set data.empty: drop"),
        ('{"question": "a", "context": "b"}', r":1: there are no answers"),
        ('{"question": "a", "context": "b", "answers": [{"text": "b"}, {"answer_start": 1}]}', "an answer needs text and answer_start"),
        ('{"question": "\\ud83d", "context": "b", "answers": []}', "the question holds half of a character"),
        ('{"data": [{"paragraphs": [{"qas": [{"id": "x", "question": "a", "answers": []}]}]}]}', "question 'x': there is no context"),
        ('{"data": []}', "no questions"),
        ('{"data": {"paragraphs": []}}', r"'data': expected a list of articles with paragraphs, found"),
        ('{"data": [{"title": "x"}]}', r"article 1: expected an object with a list 'paragraphs', found"),
        ('{"data": [{"paragraphs": [{"context": "x"}]}]}', r"paragraph 1: expected an object with a list 'qas', found"),
        ("[1, 2]", r"article 1: expected an object with a list 'paragraphs', found 1"),
        ('{"question": "a", "context": "b", "answers": ["b"]}', r":1: answers: expected a list of objects .*found \[\"b\"\]"),
        ('{"question": "a", "context": "b", "answers": "b"}', r":1: answers: expected a list of objects .*found \"b\""),
        ('{"question": "a", "context": "b c", "answers": {"text": ["b", "c"], "answer_start": [0]}}', r":1: answers: expected lists text and answer_start of one length"),
        ('{\n "data": [\n  {"paragraphs": []},\n ]\n}', r"a\.json:(3|4): not valid JSON: .*at character"),
        ('{"question": "a", "context": "b", "answers": [}\n{}', r"a\.json:1: not valid JSON: Expecting value at character 47"),
        ('{"question": "a", "context": "b", "answers": []}\n{"question"}', r"a\.json:2: not valid JSON"),
    ],
)  # fmt: skip
def test_bad_questions_are_told_by_file_and_place(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json", content)


def test_tokens_of_a_question_that_is_cut_are_counted_once(tiny_model, tmp_path):
    long = " ".join(["good"] * 70)
    rows = Rows("t", "t", [long, "good"], None, np.arange(2), pairs=["film plot " * 60, "film"])
    made = Answering(stride=20).examples(rows, load_fast_tokenizer(tiny_model), 48, labelled=False)
    lost = 70 - (48 - 3) // 2
    assert len(made.store) > 3 and made.store.cut_tokens == lost and made.store.truncated == 1
    assert np.bincount(made.row_of, weights=made.cuts).tolist() == [lost, 0]


def test_answers_that_do_not_stand_where_they_should_are_moved_or_left_out_and_counted(tmp_path, tiny_model):
    rows = [("good plot good", "good", 9), ("good plot", "dull", 0), ("bad film", "film", 4)]
    content = "\n".join(
        json.dumps({"question": "x", "context": c, "answers": [{"text": t, "answer_start": s}]}) for c, t, s in rows
    )
    found = read(tmp_path / "a.jsonl", content)
    task = Answering.from_rows(TaskConfig(type="answering"), found, "label")
    made = task.examples(found, load_fast_tokenizer(tiny_model), 32)
    assert made.rows.dropped == {"answer_not_in_context": 1}
    assert made.counts == {
        "answerable": 2,
        "no answer": 0,
        "answers not at their offset": 1,
        "answers nowhere in the context": 0,
    }
    assert task.encode(found)[0].tolist() == [[10, 14], [4, 8]]


def test_real_chinese_questions_with_wrong_offsets_are_read(real_data):
    path = real_data / "cmrc2018" / "cmrc2018_trial.json"
    rows = Answering.read(str(path), DataConfig(train=str(path), empty="drop"), split="train")
    assert len(rows) == 1000 and rows.dropped == {"empty": 2}
    task = Answering.from_rows(TaskConfig(type="answering"), rows, "label")
    assert task.rule == "chinese"
