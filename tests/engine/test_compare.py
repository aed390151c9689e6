"""The comparison: the same rows for every way, a budget that is kept, advice that follows from the figures."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from conftest import regraft
from regraft.engine.compare.results import Result, advice
from regraft.engine.compare.rows import fold_of, part_of
from regraft.engine.compare.run import compare
from regraft.engine.config import load_config


def result(name: str, values: list[float], seconds: float, held: int = 500, quarter: float | None = None) -> Result:
    def point(value: float, seed: int, share: float) -> dict:
        figures = {"metrics": {"accuracy": value}, "train_seconds": seconds, "latency_ms": 1.0, "mb": 1.0}
        return {
            "share": share,
            "seed": seed,
            "rows": int(1000 * share),
            "held": held,
            "wall_seconds": seconds,
            **figures,
        }

    points = [point(v, s, 1.0) for s, v in enumerate(values)]
    return Result(name, name, points + ([point(quarter, 0, 0.25)] if quarter is not None else []))


def test_advice_names_the_cheapest_of_those_that_cannot_be_told_apart():
    close = [
        result("cheap", [0.90, 0.905], 1.0),
        result("dear", [0.912, 0.908], 100.0),
        result("poor", [0.5, 0.5], 0.1),
    ]
    said = advice(close, "accuracy", True)
    assert said.startswith("Use cheap: accuracy 90.3")
    assert "noise" in said
    assert "100 times the training time" in said
    clear = [result("cheap", [0.80, 0.805], 1.0), result("dear", [0.912, 0.908], 100.0)]
    assert advice(clear, "accuracy", True).startswith("Use dear: accuracy 91.0")
    assert "10.8 points ahead of cheap" in advice(clear, "accuracy", True)


def test_a_difference_that_few_rows_cannot_show_is_called_noise():
    few = [result("cheap", [0.80], 1.0, held=50), result("dear", [0.86], 100.0, held=50)]
    many = [result("cheap", [0.80], 1.0, held=50_000), result("dear", [0.86], 100.0, held=50_000)]
    assert advice(few, "accuracy", True).startswith("Use cheap")
    assert advice(many, "accuracy", True).startswith("Use dear")


def test_advice_says_whether_more_rows_would_help_and_knows_that_errors_should_be_small():
    assert "more labelled rows would help (4 times the rows brought +8.0" in advice(
        [result("a", [0.9], 1.0, quarter=0.82)], "accuracy", True
    )
    assert "more rows would bring little" in advice([result("a", [0.9], 1.0, quarter=0.898)], "accuracy", True)
    worse, better = result("a", [0.9], 1.0), result("b", [0.2], 1.0)
    for r in (worse, better):
        for p in r.points:
            p["metrics"] = {"mse": p["metrics"]["accuracy"]}
    assert advice([worse, better], "mse", False).startswith("Use b")
    assert "longer one with --budget" in advice([Result("a", "a")], "accuracy", True)


def test_smaller_shares_lie_within_larger_ones_and_keep_every_class():
    targets = np.array([0] * 90 + [1] * 9 + [2])
    parts = [set(part_of(targets, share, 5).tolist()) for share in (0.01, 0.05, 0.25, 1.0)]
    assert all(a <= b for a, b in zip(parts, parts[1:], strict=False))
    assert all({0, 1, 2} == set(targets[sorted(p)].tolist()) for p in parts)
    assert part_of(targets, 0.25, 5).tolist() == part_of(targets, 0.25, 5).tolist()
    folds = fold_of(targets, 3)
    assert np.bincount(folds).max() - np.bincount(folds).min() <= 1
    assert np.bincount(folds[targets == 1]).tolist() == [3, 3, 3]


def test_the_command_prints_a_table_and_leaves_a_page(make_config, write_rows, tmp_path):
    path = make_config(
        data={"train": str(write_rows("many.csv", 200, 7)), "test": str(write_rows("t.csv", 80, 9))},
        features={"store": str(tmp_path / "store")},
        training={"epochs": 1, "threads": 1, "precision": "fp32", "learning_rate": 1e-3, "batch_size": 16},
    )
    ways = "majority,tfidf,logistic,vectors,full"
    done = regraft("compare", path, "--budget", "5m", "--seeds", "1", "--shares", "0.25", "--ways", ways, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run-compare" / "compare.json").read_text())
    by_name = {w["name"]: w for w in found["ways"]}
    assert by_name["vectors"]["why"] == "words.vectors names no file"
    for name in ("majority", "tfidf", "logistic", "full"):
        way = by_name[name]
        assert [p["share"] for p in way["points"]][-1] == 1.0, (name, way, done.stderr)
        assert way["memory_mb"] > 10
        for key in ("train_seconds", "latency_ms", "mb"):
            assert way["points"][-1][key] >= 0
    assert (
        by_name["tfidf"]["points"][-1]["metrics"]["accuracy"] > by_name["majority"]["points"][-1]["metrics"]["accuracy"]
    )
    assert found["advice"] in done.stdout
    page = (tmp_path / "run-compare" / "compare.html").read_text()
    assert "Learning curves" in page
    assert found["advice"].split(":")[0] in page


def test_the_budget_is_kept(make_config, tmp_path):
    config = load_config(make_config(training={"epochs": 5000, "threads": 1}))
    began = time.monotonic()
    (slow,) = compare(config, ("full",), budget=5.0, seeds=1, shares=[1.0])
    assert time.monotonic() - began < 25
    assert "stopped" in slow.why
    assert not slow.complete


def test_an_unknown_way_is_refused_by_name(make_config):
    done = regraft("compare", make_config(), "--ways", "logistics")
    assert done.returncode == 2
    assert "did you mean 'logistic'?" in done.stderr


def test_groups_of_unlabelled_texts_show_the_rows_nearest_their_centre(make_config, tmp_path):
    rows = ["text", *("good fine warm" for _ in range(6)), *("slow cold dull joke actor" for _ in range(4))]
    (tmp_path / "u.csv").write_text("\n".join(rows) + "\n")
    path = make_config(method="frozen", data={"train": str(tmp_path / "u.csv"), "dev": None})
    store = f"features.store={tmp_path / 'store'}"
    done = regraft("features", path, "--clusters", "2", "--set", store)
    assert done.returncode == 0, done.stderr
    assert "group 1: 6 rows" in done.stdout
    assert "u.csv:2: good fine warm" in done.stdout
    assert "group 2: 4 rows" in done.stdout


@pytest.mark.parametrize("text", ["0", "10x", "-3m", ""])
def test_budgets_that_are_none_are_refused(make_config, text):
    done = regraft("compare", make_config(), f"--budget={text}")
    assert done.returncode == 2
    assert "--budget" in done.stderr


def test_tagging_is_compared_on_the_same_words(make_config, tmp_path):
    from test_token_heads import conll

    data = {"train": conll(tmp_path / "t.conll", 120, 1), "dev": conll(tmp_path / "d.conll", 30, 2), "format": "conll"}
    path = make_config(
        data=data,
        task={"type": "tagging"},
        features={"store": str(tmp_path / "store")},
        training={"epochs": 1, "threads": 1, "batch_size": 16, "learning_rate": 3e-3},
    )
    ways = "majority,linear,full"
    done = regraft("compare", path, "--budget", "4m", "--seeds", "1", "--shares", "1", "--ways", ways, timeout=200)
    assert done.returncode == 0, done.stderr
    by_name = {w["name"]: w for w in json.loads((tmp_path / "run-compare" / "compare.json").read_text())["ways"]}
    assert by_name["majority"]["why"] == "for one answer a text only"
    for name in ("linear", "full"):
        (point,) = by_name[name]["points"]
        assert point["rows"] == 120 and point["held"] == 30
        assert point["metrics"]["f1"] > 0.1


@pytest.mark.parametrize("words_given", [True, False])
def test_rows_with_tags_are_written_as_they_were_read(tmp_path, words_given):
    from regraft.engine.compare.rows import write_rows
    from regraft.engine.config import DataConfig
    from regraft.engine.data.rows import Rows
    from regraft.engine.tasks import Tagging

    text, spans = "Jo Smith, Rome!", ((0, 8, "PER"), (10, 14, "LOC"))
    words = ((0, 2), (3, 8), (8, 9), (10, 14), (14, 15))
    rows = Rows("train", "t", [text], [spans], np.arange(1), pairs=[words] if words_given else None)
    task = Tagging(("LOC", "PER"), tags="bioes")
    write_rows(tmp_path / "r.jsonl", rows, {"text": "text", "label": "label"}, task)
    data = DataConfig(train=str(tmp_path / "r.jsonl"), tag_scheme=task.tags)
    again = Tagging.read(data.train, data, split="train")
    assert [again.texts[0][s:e] for s, e, _ in again.labels[0]] == ["Jo Smith", "Rome"]
    assert [kind for _, _, kind in again.labels[0]] == ["PER", "LOC"]
    if words_given:
        assert [again.texts[0][s:e] for s, e in again.pairs[0]] == ["Jo", "Smith", ",", "Rome", "!"]
    else:
        assert again.texts == [text] and again.pairs is None


def test_the_page_draws_every_ways_spread():
    from regraft.engine.compare.spread import spread_chart

    ways = [result("one <b>", [0.8, 0.9], 1.0), result("two", [0.5], 1.0), Result("three", "three")]
    drawn = spread_chart(ways, "accuracy")
    assert drawn.count('class="dot c1"') == 2
    assert drawn.count('class="line c1"') == 1  # one seed has no spread
    assert "one &lt;b&gt;: 0.8500 ± 0.0707" in drawn
    assert "three" not in drawn
    assert spread_chart([Result("a", "a")], "accuracy") is None


def test_ways_that_take_all_their_time_leave_some_for_those_behind_them():
    from regraft.engine.compare.run import part_of_time

    left, parts = 600.0, []
    for ways in range(14, 0, -1):
        parts.append(part_of_time(left, ways))
        left -= parts[-1]
    assert left == 0
    assert min(parts) > 600 / 14 / 8
    assert max(parts) < 600 / 5
    assert part_of_time(100.0, 2) == 50.0
