"""The comparison: the same rows for every way, a budget that is kept, advice that follows from the figures."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import regraft
from regraft.engine.compare.results import Result, advice
from regraft.engine.compare.rows import fold_of, part_of
from regraft.engine.compare.run import compare
from regraft.engine.compare.ways import WAYS, configured
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
    alone = result("a", [0.9], 1.0)
    alone.points += [p | {"share": 0.01} for p in result("a", [0.3], 1.0).points]
    assert advice([alone], "accuracy", True).endswith(
        "the only way that was measured."
    )  # a hundred times the rows: of course
    worse, better = result("a", [0.9], 1.0), result("b", [0.2], 1.0)
    for r in (worse, better):
        for p in r.points:
            p["metrics"] = {"mse": p["metrics"]["accuracy"]}
    assert advice([worse, better], "mse", False).startswith("Use b")
    assert "longer one with --budget" in advice([Result("a", "a")], "accuracy", True)


def named(metric: str, *ways: Result) -> list[Result]:
    """The same figures as those of another metric."""
    for way in ways:
        for point in way.points:
            point["metrics"] = {metric: point["metrics"]["accuracy"]}
    return list(ways)


def in_folds(way: Result) -> Result:
    way.folds = True
    return way


def test_folds_hold_out_other_rows_each_and_count_together():
    values = [0.93, 0.934, 0.926, 0.93, 0.93]
    cheap, dear = result("cheap", [v - 0.03 for v in values], 1.0, held=200), result("dear", values, 100.0, held=200)
    assert advice([cheap, dear], "accuracy", True).startswith("Use cheap")  # five seeds on the same 200 rows
    assert advice([in_folds(cheap), in_folds(dear)], "accuracy", True).startswith("Use dear")  # 1,000 rows
    close = [in_folds(result("a", [0.9, 0.9], 1.0)), in_folds(result("b", [0.91, 0.91], 9.0))]
    assert "noise on 1,000 held-out rows and 2 folds" in advice(close, "accuracy", True)


def test_a_figure_that_is_no_share_of_rows_needs_several_seeds_to_be_told_from_noise():
    one = advice(named("pearson", result("majority", [0.0], 0.1), result("full", [-0.339], 9.0)), "pearson", True)
    assert "33.9 points ahead of full" in one
    assert "cannot be told from one seed of pearson" in one
    assert "noise:" not in one
    same = advice(named("macro_f1", result("a", [0.8] * 3, 0.1), result("b", [0.81] * 3, 9.0)), "macro_f1", True)
    assert same.startswith("Use b") and "cannot be told from seeds that all give the same macro_f1: --folds" in same
    constant = result("majority", [0.1], 0.1)
    constant.seeded = False
    spread = advice(named("macro_f1", constant, result("b", [0.8, 0.82, 0.81], 9.0)), "macro_f1", True)
    assert spread.startswith("Use b") and "(noise: 1.2 points)" in spread


def test_errors_are_said_as_they_are_and_not_as_points_of_a_hundred():
    worse, better = result("a", [20.8, 20.6], 1.0), result("b", [9.5, 9.7], 2.0, quarter=12.0)
    said = advice(named("mae", worse, better), "mae", False)
    assert said.startswith("Use b: mae 9.6 ± 0.1414, 11.1 ahead of a (noise: 0.283)")
    assert "more labelled rows would help (4 times the rows brought -2.4)" in said
    assert "points" not in said


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


def test_every_way_is_measured_on_every_fold(make_config, tmp_path):
    path = make_config(training={"threads": 1})
    done = regraft("compare", path, "--ways", "majority,tfidf", "--folds", "3", "--shares", "1", timeout=200)
    assert done.returncode == 0, done.stderr
    ways = json.loads((tmp_path / "run-compare" / "compare.json").read_text())["ways"]
    assert [sorted(p["seed"] for p in way["points"]) for way in ways] == [[0, 1, 2]] * 2
    assert [sum(p["held"] for p in way["points"]) for way in ways] == [64, 64]
    refused = regraft("compare", path, "--folds", "65")
    assert refused.returncode == 2 and "--folds 65: there are 64 training rows" in refused.stderr


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_comparison_that_is_stopped_keeps_its_points_and_leaves_no_process(make_config, tmp_path, sent):
    import psutil

    path = make_config(training={"epochs": 5000, "threads": 1})
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "regraft.engine", "compare", str(path), "--ways", "majority,full", "--shares", "1"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
        start_new_session=True,  # SIGINT is not ignored there, as it is for a job in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    kept, workers = tmp_path / "run-compare" / "compare.json", []
    try:
        until = time.monotonic() + 60
        while not (kept.exists() and any((tmp_path / "tmp").glob("*/full"))):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.send_signal(sent)
        _, told = process.communicate(timeout=30)
        assert psutil.wait_procs(workers, timeout=10)[1] == []
    finally:
        for one in (*workers, process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    majority, full = json.loads(kept.read_text())["ways"]
    assert (len(majority["points"]), full["points"]) == (1, [])
    assert (tmp_path / "run-compare" / "compare.html").is_file()
    if sent != signal.SIGKILL:
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
        assert "stopped; what was measured until then" in told
        assert list((tmp_path / "tmp").glob("regraft-*")) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.parametrize("victim", ["the way's process", "the one it was forked from"])
def test_a_way_that_is_killed_is_said_and_the_others_are_measured(make_config, write_rows, tmp_path, victim):
    import psutil

    data, store = {"train": str(write_rows("many.csv", 5000, 7))}, {"store": str(tmp_path / "store")}
    path = make_config(data=data, features=store, training={"threads": 1})
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "regraft.engine", "compare", str(path), "--ways", "majority,cnn,logistic"]
    process = subprocess.Popen(
        [*command, "--shares", "1", "--seeds", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
    )
    try:
        until = time.monotonic() + 60
        while not any((tmp_path / "tmp").glob("*/cnn")):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
        (origin,) = psutil.Process(process.pid).children()
        (origin if victim == "the one it was forked from" else origin.children()[0]).kill()
        _, told = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, told
    ways = json.loads((tmp_path / "run-compare" / "compare.json").read_text())["ways"]
    majority, cnn, logistic = ways
    assert cnn["why"] == "ended with -9" and "CNN from scratch: ended with -9" in told
    assert (len(majority["points"]), len(cnn["points"]), len(logistic["points"])) == (1, 0, 1)
    assert majority["memory_mb"] < logistic["memory_mb"]


def test_the_way_over_four_layers_takes_those_there_are(make_config, tmp_path):
    path = make_config(training={"epochs": 1, "threads": 1}, features={"store": str(tmp_path / "store")})
    done = regraft("compare", path, "--ways", "bilstm", "--seeds", "1", "--shares", "1", timeout=200)
    assert done.returncode == 0, done.stderr
    (way,) = json.loads((tmp_path / "run-compare" / "compare.json").read_text())["ways"]
    assert len(way["points"]) == 1, way["why"]


def test_the_budget_is_kept(make_config, tmp_path):
    config = load_config(make_config(training={"epochs": 5000, "threads": 1}))
    began = time.monotonic()
    (slow,) = compare(config, ("full",), budget=15.0, seeds=1, shares=[1.0])
    assert time.monotonic() - began < 30
    assert "stopped" in slow.why
    assert not slow.complete


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_memory_is_what_a_process_of_its_own_would_hold(make_config, tmp_path):
    path = make_config(training={"epochs": 1, "threads": 1})
    held = np.ones(200_000_000)  # what this process holds is none of theirs
    (full,) = compare(load_config(path), ("full",), budget=100.0, seeds=1, shares=[1.0])
    code = f"""if True:
        from pathlib import Path
        from regraft.engine.config import load_config
        from regraft.engine.predict import predict
        from regraft.engine.trained import load_trained
        from regraft.engine.training.run import train
        run = train(load_config({str(path)!r}), quiet=True)
        list(predict(load_trained(run.folder), [("good", None)]))
        print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    """
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert full.memory_mb == pytest.approx(1024 * int(alone.stdout.splitlines()[-1]) / 1e6, rel=0.05)
    assert full.memory_mb * 1e6 < held.nbytes


def test_a_way_for_few_rows_is_not_measured_twice_on_all_it_takes(make_config, write_rows):
    data = {"train": str(write_rows("many.csv", 400, 7))}
    config = load_config(make_config(data=data, training={"max_steps": 2, "threads": 1}))
    ways = compare(config, ("contrastive", "tfidf"), budget=100.0, seeds=1, shares=[0.1, 0.5, 1.0])
    by_name = {way.name: [point["share"] for point in way.points] for way in ways}
    assert by_name == {"contrastive": [0.1, 1.0], "tfidf": [0.1, 0.5, 1.0]}


def test_a_learning_rate_stays_with_the_method_it_was_written_for(make_config):
    def rates(**settings) -> dict[str, tuple[float, float]]:
        base = load_config(make_config(**settings))
        ways = {way.name: way for way in WAYS}
        found = {
            name: configured(base, ways[name], seed=0, run="x", rows=5000).training
            for name in ("lora", "full", "linear")
        }
        return {name: (training.learning_rate, training.epochs) for name, training in found.items()}

    own = {"training": {"learning_rate": 1e-4, "epochs": 4}}
    assert rates(**own) == {"lora": (20 * 1e-4, 4), "full": (1e-4, 4), "linear": (1e-3, 15)}
    assert rates(method="lora", **own) == {"lora": (1e-4, 4), "full": (5e-5, 4), "linear": (1e-3, 15)}
    assert rates(method="qlora", **own)["lora"] == (1e-4, 4)
    # what suits a head on stored features suits no encoder
    assert rates(method="frozen", **own) == {"lora": (1e-3, 3), "full": (5e-5, 3), "linear": (1e-3, 15)}


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


@pytest.mark.parametrize("text", ["0", "10x", "-3m", "", "1.2.3s", "."])
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


class Pretended:
    """In the place of the processes of a comparison, with a clock of its own, as no test can count on theirs. `seconds`: of a
    point, by way and share (else 1)."""

    def __init__(self, monkeypatch, seconds):
        from regraft.engine.compare import run

        self.now, self.seconds, self.done, self.spent = 1000.0, seconds, [], {}
        monkeypatch.setattr(run, "Workers", lambda scratch: self)
        monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: self.now))

    def __enter__(self):
        return self

    def __exit__(self, *how):
        pass

    def do(self, job, deadline, take):
        from regraft.engine.compare.workers import Ended

        known, began = bool(job["known"]), self.now
        for share, seed in job["points"]:
            seconds = self.seconds.get((job["way"], share), 1.0)
            if self.now + (seconds if known else 0.0) > job["deadline"]:
                take({"share": share, "seed": seed, "needs": seconds if known else 0.0})
                continue
            self.now = min(deadline, self.now + seconds)
            self.spent[job["way"]] = self.now - began
            if self.now == deadline:
                return Ended(True, "")
            known = True
            self.done.append((job["way"], share, seed))
            figures = {"metrics": {"accuracy": 0.9}, "train_seconds": 1.0, "wall_seconds": seconds}
            take({"share": share, "seed": seed, "rows": 9, **figures})
        take({"memory_mb": 100.0 + len(self.done)})
        return Ended(False, "")


def test_all_rows_come_first_and_those_that_wait_have_what_others_left(make_config, monkeypatch):
    pretended = Pretended(monkeypatch, {("lstm", 1.0): 60.0})
    ways, said = ("majority", "lstm", "logistic"), []
    shares = [0.1, 0.2, 0.5, 1.0]
    config = load_config(make_config())
    results = compare(config, ways, budget=140.0, seeds=2, shares=shares, say=said.append)
    assert pretended.done == [
        *[("majority", 1.0, 0), ("lstm", 0.1, 0), ("lstm", 1.0, 0), ("logistic", 0.1, 0), ("logistic", 1.0, 0)],
        *[("lstm", 0.5, 0), ("lstm", 0.2, 0), ("logistic", 0.5, 0), ("logistic", 0.2, 0)],
        *[("logistic", 1.0, 1), ("lstm", 1.0, 1)],
    ]
    pretended.done.clear()
    results = compare(config, ways, budget=100.0, seeds=2, shares=shares, say=said.append)
    assert pretended.done == [
        *[("majority", 1.0, 0), ("lstm", 0.1, 0), ("logistic", 0.1, 0), ("logistic", 1.0, 0), ("lstm", 1.0, 0)],
        *[("lstm", 0.5, 0), ("lstm", 0.2, 0), ("logistic", 0.5, 0), ("logistic", 0.2, 0)],
        ("logistic", 1.0, 1),
    ]
    assert "LSTM from scratch: on all rows it would take about 60 s, more than its turn" in said
    assert [r.why for r in results] == ["", "", ""]
    assert [p["share"] for p in results[1].points] == [0.1, 0.2, 0.5, 1.0]
    assert [r.memory_mb for r in results] == [101.0, 105.0, 104.0]  # of the process that did all rows first


def test_a_way_that_was_stopped_in_its_turn_has_another_when_time_is_left(make_config, monkeypatch):
    ways, said = ("majority", "tfidf", "lstm", "logistic", "linear", "mix", "full"), []
    Pretended(monkeypatch, {("lstm", 1.0): 100.0})  # begun blindly, with no smaller share to tell
    results = compare(load_config(make_config()), ways, budget=300.0, seeds=1, shares=[1.0], say=said.append)
    assert "LSTM from scratch: stopped, its turn was used up" in said
    assert all(way.complete and not way.why for way in results)


def test_ways_that_take_all_their_time_leave_some_for_those_behind_them(make_config, monkeypatch):
    ways = ("majority", "tfidf", "lstm", "logistic", "linear", "mix", "lora", "full")
    pretended = Pretended(monkeypatch, {(way, 1.0): 1e6 for way in ways})
    results = compare(load_config(make_config()), ways, budget=800.0, seeds=3, shares=[1.0])
    assert list(pretended.spent) == list(ways)
    assert max(pretended.spent.values()) == 150.0 and min(pretended.spent.values()) > 100 / 8
    assert sum(pretended.spent.values()) == pytest.approx(800.0)
    assert results[0].why == "stopped: its turn was used up"
    assert results[-1].why == "stopped: the budget was used up"


def test_nothing_is_begun_when_the_budget_is_used_up(make_config, monkeypatch):
    pretended = Pretended(monkeypatch, {("lstm", 0.5): 1e6, ("full", 0.5): 40.0, ("full", 1.0): 1e6})
    ways = ("tfidf", "lstm", "full")
    tfidf, lstm, full = compare(load_config(make_config()), ways, budget=300.0, seeds=3, shares=[0.5, 1.0])
    assert pretended.done == [
        ("tfidf", 0.5, 0),
        ("tfidf", 1.0, 0),
        ("full", 0.5, 0),
        ("tfidf", 1.0, 1),
        ("tfidf", 1.0, 2),
    ]
    assert [way.why for way in (tfidf, lstm)] == ["", "stopped: its turn was used up"]
    assert full.why == "on all rows it would take about 1000000 s, more than was left"
    pretended.done.clear()
    pretended.seconds["full", 0.5] = 1e6
    tfidf, lstm, full = compare(load_config(make_config()), ways, budget=300.0, seeds=3, shares=[0.5, 1.0])
    assert pretended.done == [("tfidf", 0.5, 0), ("tfidf", 1.0, 0)]
    assert [way.why for way in (tfidf, lstm)] == ["", "stopped: its turn was used up"]
    assert full.why == "stopped: the budget was used up"


def test_a_point_takes_as_long_as_the_rows_that_it_steps_through():
    from regraft.engine.compare.worker import seconds_of

    few = {"share": 0.01, "wall_seconds": 20.0, "prepare_seconds": 2.0, "steps": 60, "step_seconds": 0.1}
    whole = {"share": 1.0, "wall_seconds": 70.0, "prepare_seconds": 3.0, "steps": 600, "step_seconds": 0.1}
    learned = {0.01: 1000.0, 0.25: 2500.0, 1.0: 10_000.0}.__getitem__
    assert seconds_of(1.0, [], learned, False) == 0.0
    assert seconds_of(1.0, [few], learned, False) == pytest.approx(20 + 9 * 6)
    assert seconds_of(0.25, [few, whole], learned, False) == pytest.approx(70 - 1 - 0.75 * 60)
    assert seconds_of(1.0, [few, whole, {**whole, "wall_seconds": 65.0}], learned, False) == 65.0 - 1


def test_features_of_new_rows_are_part_of_what_a_point_takes():
    from regraft.engine.compare.worker import seconds_of

    few = {
        "share": 0.01,
        "rows": 30,
        "held": 170,
        "wall_seconds": 6.0,
        "prepare_seconds": 2.0,
        "steps": 1,
        "step_seconds": 0.1,
    }
    learned = {0.01: 30.0, 0.25: 750.0, 1.0: 3000.0}.__getitem__
    made = 2970 * 2.0 / 200
    assert seconds_of(1.0, [few], learned, True) == pytest.approx(6.0 + made + 0.1 * 99)
    whole = {**few, "share": 1.0, "rows": 3000, "wall_seconds": 40.0, "prepare_seconds": 32.0, "step_seconds": 1.0}
    assert seconds_of(0.25, [few, whole], learned, True) == pytest.approx(8.0 + 2.0 - 0.75)  # they are there by now


def test_a_few_rows_have_a_learning_curve_too(make_config):
    config = load_config(make_config(training={"max_steps": 2, "threads": 1}))
    (found,) = compare(config, ("tfidf",), budget=100.0, seeds=1, shares=[0.5, 1.0])
    assert [point["share"] for point in found.points] == [0.5, 1.0]
