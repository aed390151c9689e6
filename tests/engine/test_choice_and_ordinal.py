"""Choices scored against each other, classes that have an order: learned, judged, answered, served."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from conftest import regraft
from regraft.engine.config import DataConfig, TaskConfig, load_config
from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.export import export_bundle
from regraft.engine.predict import predict
from regraft.engine.tasks.choice import Choice
from regraft.engine.tasks.ordinal import Ordinal
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from regraft.serve.session import Session

FAST = ["training.learning_rate=3e-3", "training.epochs=8", "training.threads=1"]


def choices(path, count: int, seed: int):
    """The right choice repeats the text's word; rows have two or three choices."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        words = [str(w) for w in rng.choice(["good", "bad", "film", "plot", "music"], 3, replace=False)]
        given = words[: 2 + int(rng.integers(2))]
        label = int(rng.integers(len(given)))
        lines.append(json.dumps({"text": given[label], "choices": [f"very {w}" for w in given], "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_loss_is_a_softmax_over_each_rows_choices():
    logits = torch.tensor([[1.0], [2.0], [0.5], [-1.0], [3.0]], requires_grad=True)
    targets = torch.tensor([[0, 4], [1, 4], [0, 9], [0, 9], [1, 9]])
    loss = Choice().loss(logits, targets, targets[:, 0].float())
    parts = [(logits[:2, 0], 1), (logits[2:, 0], 2)]
    expected = sum(torch.nn.functional.cross_entropy(x[None], torch.tensor([t])) for x, t in parts)
    assert torch.allclose(loss, expected)
    (mine,), (theirs,) = torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    assert torch.allclose(mine, theirs)


def test_choices_are_learned_however_the_step_is_cut_and_served_the_same(make_config, tmp_path):
    data = {"train": choices(tmp_path / "train.jsonl", 200, 1), "dev": choices(tmp_path / "dev.jsonl", 30, 2)}
    path = make_config(data=data, task={"type": "choice"})
    result = train(load_config(path, FAST), quiet=True)
    assert result.metrics["dev"]["accuracy"] > 0.5
    trained = load_trained(result.folder)
    asked = [("good", ("very film", "very good")), ("plot", ("very plot", "very bad", "very music"))]
    answers = [a.prediction for a in predict(trained, asked)]
    assert all(a.label in beside for a, (_, beside) in zip(answers, asked, strict=True))
    export_bundle(result.folder, tmp_path / "bundle")
    session = Session(tmp_path / "bundle", threads=1)
    prepared = session.prepare([t for t, _ in asked], [c for _, c in asked])
    for mine, theirs in zip(answers, session.answers(prepared, session.run(prepared.items)), strict=True):
        pairs = zip(mine.extra["choices"], theirs.extra["choices"], strict=True)
        assert all(a["text"] == b["text"] and a["score"] == pytest.approx(b["score"], abs=1e-4) for a, b in pairs)
    # One bad choice harms no other row, and what does not fit is counted.
    prepared = session.prepare(["good", "good"], [("very \ud800", "b"), ("very bad", "film " * 200)])
    assert list(prepared.problems) == [0] and "half of a surrogate pair" in prepared.problems[0]
    assert prepared.owners == [1, 1] and [item.truncated for item in prepared.items] == [0, 1 + 200 + 3 - 64]
    (answer,) = predict(trained, [("good", ("very bad", "film " * 200))])
    assert answer.cut_tokens == 1 + 200 + 3 - 64
    # Losses, not weights: a softmax over choices does not depend on the bias they share, whose gradient is rounding,
    # and AdamW makes a whole step of that.
    losses: dict[str, list[float]] = {"whole": [], "cut": []}
    for name, budget in (("whole", 100000), ("cut", 16)):
        more = [f"run={tmp_path / name}", "training.max_steps=5", f"training.token_budget={budget}", "model.dropout=0"]
        train(load_config(path, more), quiet=True, on_step=lambda info, mine=losses[name]: mine.append(info.loss))
    assert len(losses["whole"]) == 5
    assert losses["cut"] == pytest.approx(losses["whole"], rel=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "choices": ["b"], "label": 0}, r":1: choices: expected a list of at least two texts"),
        (
            {"text": "a", "choices": ["b", "c"], "label": 2},
            r":1: the label 2 is neither a choice nor its number, 0 to 1",
        ),
        (
            {"text": "a", "choices": ["2", "c"], "label": "²"},
            r":1: the label '²' is neither a choice nor its number, 0 to 1",
        ),
        ({"text": "a", "choices": ["b\ud800", "c"], "label": 0}, r"a\.jsonl:1: \\ud800 is half of a character"),
        ({"text": "a", "choice": ["b", "c"], "label": 0}, r"no key 'choices' \(did you mean 'choice'\?\)"),
    ],
)
def test_bad_choices_are_told_by_line(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        Choice.read(str(tmp_path / "a.jsonl"), DataConfig(train="a.jsonl"), split="train")


def test_ordinal_figures_and_probabilities():
    task = Ordinal(("1", "2", "3", "4"))
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(60, 3)), rng.integers(0, 4, 60)
    chances = task.chances(logits)
    assert np.allclose(chances.sum(axis=1), 1) and (chances >= 0).all()
    metrics = task.metrics()
    metrics.update(logits[:20], targets[:20])
    metrics.update(logits[20:], targets[20:])
    expected = cohen_kappa_score(targets, task.classes(logits), weights="quadratic")
    assert metrics.compute()["quadratic_kappa"] == pytest.approx(expected)
    loss = task.loss(torch.tensor([[20.0, 20.0, -20.0]]), torch.tensor([2]), torch.ones(1))
    assert float(loss) < 1e-6


def test_an_order_that_is_not_known_must_be_given():
    rows = Rows("train", "t.csv", ["a", "b"], ["low", "high"], np.arange(2))
    with pytest.raises(
        ConfigError, match=r"task\.labels: the order of high, low is not known; list them, lowest first"
    ):
        Ordinal.from_rows(TaskConfig(type="ordinal"), rows, "label")
    assert Ordinal.from_rows(TaskConfig(type="ordinal", labels=["low", "high"]), rows, "label").outputs == 1


def test_numbers_have_an_order_decimals_too():
    rows = Rows("train", "t.csv", list("abcde"), ["10.5", "0.5", "1.0", 1.5, "-2"], np.arange(5))
    task = Ordinal.from_rows(TaskConfig(type="ordinal"), rows, "label")
    assert task.labels == ("-2", "0.5", "1", "1.5", "10.5")
    assert task.encode(rows)[0].tolist() == [4, 1, 2, 3, 0]
    # A number that is no label is not taken for a place among labels that are numbers.
    other = Rows("dev", "d.csv", ["a"], [2], np.arange(1))
    with pytest.raises(DataError, match=r"d\.csv.*label '2' is not one that training knows"):
        Ordinal(("0.5", "1.5", "2.5")).encode(other)
    odd = Rows("train", "t.csv", ["a", "b"], ["²", "1"], np.arange(2))
    with pytest.raises(ConfigError, match=r"task\.labels: the order of 1, ² is not known"):
        Ordinal.from_rows(TaskConfig(type="ordinal"), odd, "label")


def test_an_ordinal_run_goes_from_rows_to_answers(make_config, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("stars", 200), ("more", 40)):
        stars = rng.integers(1, 5, count)
        lines = [f"{'good ' * int(n)}{'bad ' * int(5 - n)}film,{n}" for n in stars]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    path = make_config(
        task={"type": "ordinal"}, data={"train": str(tmp_path / "stars.csv"), "dev": str(tmp_path / "more.csv")}
    )
    result = train(load_config(path, [*FAST, "training.epochs=20"]), quiet=True)
    assert result.metrics["dev"]["quadratic_kappa"] > 0.8
    done = regraft("predict", result.folder, "good good good good bad film", "--format", "jsonl")
    record = json.loads(done.stdout)
    assert record["label"] == "4" and sum(record["scores"].values()) == pytest.approx(1, abs=1e-4)
