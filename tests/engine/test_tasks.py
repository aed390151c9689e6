"""A label means the same in training, metrics and answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from regraft.engine.config import TaskConfig
from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.tasks import Classification, MultiLabel, Regression, build_task, task_from_spec


def rows(labels, split="train"):
    n = len(labels)
    return Rows(split, f"{split}.csv", ["t"] * n, labels, np.arange(2, n + 2))


def test_classification_figures_are_those_of_scikit_learn_on_every_row():
    generator = np.random.default_rng()
    task = Classification(("a", "b", "c", "d"))
    logits, targets = generator.normal(size=(301, 4)).astype(np.float32), generator.integers(0, 4, 301)
    metrics = task.metrics()
    for part in np.array_split(np.arange(301), 7):
        metrics.update(logits[part], targets[part])
    found, predicted = metrics.compute(), logits.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(targets, predicted))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(targets, predicted, average="macro"))
    assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(targets, predicted))
    probabilities = torch.tensor(logits).double().softmax(-1).numpy()
    assert found["loss"] == pytest.approx(sk.log_loss(targets, probabilities), rel=1e-6)


def test_multilabel_figures_and_tuned_thresholds():
    generator = np.random.default_rng(4)
    task = MultiLabel(("a", "b", "c"))
    targets = (generator.random((400, 3)) < 0.2).astype(np.float32)
    logits = (targets * 2 - 3 + generator.normal(size=(400, 3))).astype(np.float32)
    metrics = task.metrics()
    metrics.update(logits[:150], targets[:150])
    metrics.update(logits[150:], targets[150:])
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    found = metrics.compute()
    assert found["micro_f1"] == pytest.approx(
        sk.f1_score(targets, probabilities >= 0.5, average="micro", zero_division=0)
    )
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(targets, probabilities >= 0.5, average="macro", zero_division=0)
    )
    tuned = metrics.tuned_thresholds()
    for c in range(3):
        at = lambda t, c=c: sk.f1_score(targets[:, c], probabilities[:, c] >= t, zero_division=0)  # noqa: E731
        best = max(at(t) for t in np.linspace(0.001, 0.999, 999))
        assert at(tuned[c]) >= best - 0.005
        assert at(tuned[c]) > at(0.5)


def test_metrics_merged_from_shares_are_those_of_the_whole():
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(50, 3)).astype(np.float32), generator.integers(0, 3, 50)
    for task, targets in (
        (Classification(("a", "b", "c")), labels),
        (MultiLabel(("a", "b", "c")), (generator.random((50, 3)) < 0.5).astype(np.float32)),
        (Regression(), generator.normal(size=50).astype(np.float32)),
    ):
        whole, left, right = task.metrics(), task.metrics(), task.metrics()
        z = logits if task.outputs == 3 else logits[:, :1]
        whole.update(z, targets)
        left.update(z[:20], targets[:20])
        right.update(z[20:], targets[20:])
        left.merge(right.state())
        assert left.compute() == pytest.approx(whole.compute())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_torchs_own_summed(smoothing):
    logits, targets = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 3, (9,))
    task = Classification(("a", "b", "c"), label_smoothing=smoothing)
    weights = torch.rand(9)
    expected = sum(
        w * torch.nn.functional.cross_entropy(z[None], t[None], label_smoothing=smoothing)
        for z, t, w in zip(logits, targets, weights, strict=True)
    )
    assert float(task.loss(logits, targets, weights)) == pytest.approx(float(expected), rel=1e-5)


def test_balanced_weights_make_every_class_weigh_the_same():
    task = build_task(TaskConfig(class_weights="balanced"), rows(["a"] * 9 + ["b"] * 3))
    targets, _ = task.encode(rows(["a"] * 9 + ["b"] * 3))
    weights = task.weights(targets)
    assert weights[targets == 0].sum() == pytest.approx(weights[targets == 1].sum())


def test_labels_keep_one_order_however_the_rows_come():
    assert (
        build_task(TaskConfig(), rows(["b", "a", "c"])).labels == build_task(TaskConfig(), rows(["c", "b", "a"])).labels
    )
    assert build_task(TaskConfig(), rows(["10", "9", "1"])).labels == ("1", "9", "10")
    assert build_task(TaskConfig(), rows([1.0, 0, "1"])).labels == ("0", "1")


def test_numbers_mean_places_in_a_list_of_words():
    task = build_task(TaskConfig(labels=["neg", "pos"]), rows(["0", "1", "pos"]))
    assert task.encode(rows([1, "neg", 0.0]))[0].tolist() == [1, 0, 0]


def test_an_unknown_label_names_file_line_and_neighbour():
    task = build_task(TaskConfig(), rows(["refund", "delivery"]))
    with pytest.raises(DataError, match=r"dev.csv:3, column 'label'.*'refnd'.*did you mean 'refund'"):
        task.encode(rows(["refund", "refnd"], "dev"))
    kept = task.encode(rows(["refund", "refnd"], "dev"), unknown="drop")[1]
    assert kept.tolist() == [0]


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(DataError, match="all 3 rows have the label 'a'"):
        build_task(TaskConfig(), rows(["a", "a", "a"]))
    with pytest.raises(DataError, match="all 2 rows have the value"):
        build_task(TaskConfig(type="regression"), rows([1, 1]))
    with pytest.raises(DataError, match=r"train.csv:3.*'x' is not a number"):
        build_task(TaskConfig(type="regression"), rows([1, "x"]))
    with pytest.raises(ConfigError, match="pearson"):
        build_task(TaskConfig(metric="pearson"), rows(["a", "b"]))


@pytest.mark.parametrize(
    "task",
    [Classification(("x", "y")), MultiLabel(("x", "y"), thresholds=np.array([0.3, 0.7])), Regression()],
)
def test_a_task_survives_being_written_down(task):
    again = task_from_spec(task.spec())
    logits = np.array([[0.1, 0.4], [2.0, -1.0]], dtype=np.float32)[:, : task.outputs]
    assert again.decode(logits) == task.decode(logits)


def test_answers_follow_the_problem_type():
    logits = np.array([[2.0, 1.0, -3.0]], dtype=np.float32)
    single = Classification(("a", "b", "c")).decode(logits)[0]
    assert single.label == "a"
    assert sum(single.scores.values()) == pytest.approx(1.0)
    many = MultiLabel(("a", "b", "c")).decode(logits)[0]
    assert many.label == ("a", "b")
    assert sum(many.scores.values()) > 1.2
    assert list(many.top(1)) == ["a"]


def test_a_number_is_a_place_only_in_a_list_that_the_user_gave():
    found = Classification(("contradiction", "entailment", "neutral"))
    with pytest.raises(DataError, match=r"train\.csv:3, column 'label': label '0' is not one that training knows"):
        found.encode(rows(["neutral", 0]))
    listed = Classification(("entailment", "neutral", "contradiction"), numbered=True)
    assert listed.encode(rows(["neutral", 0, "2"]))[0].tolist() == [1, 0, 2]
    assert Classification.from_spec(listed.spec()).encode(rows([2]))[0].tolist() == [2]
    with pytest.raises(DataError, match="label '0'"):
        MultiLabel(("joy", "anger")).encode(rows([["joy"], [0]]))


def test_one_number_is_one_label_however_a_file_writes_it():
    task = Classification(("1", "2", "3"))
    assert task.encode(rows(["1.0", "2", 3, 1.0, "3.00"]))[0].tolist() == [0, 1, 2, 0, 2]
    given = Classification(("1.0", "2.0"), numbered=True)
    assert given.encode(rows(["1.0", 2]))[0].tolist() == [0, 1]
    assert Classification(("v1.0", "v1.5")).encode(rows(["v1.5", "v1.0"]))[0].tolist() == [1, 0]
