"""In which order a comparison measures its points, and who has what of its budget, in virtual time."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from regraft.engine.compare.run import compare
from regraft.engine.config import load_config


class Pretended:
    """In the place of the processes of a comparison, with a clock of its own, as no test can count on theirs. `seconds`: of a
    point, by way and share (else 1), of all rows whose features are there by way and "stored"."""

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
            if job["stored"] and share == 1.0:
                seconds = self.seconds.get((job["way"], "stored"), seconds)
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


def test_a_way_whose_features_another_one_has_made_is_not_left_out_for_the_time_they_take(make_config, monkeypatch):
    seconds = {("logistic", 1.0): 60.0, ("logistic", "stored"): 2.0, ("linear", 1.0): 60.0, ("cnn", 1.0): 50.0}
    pretended = Pretended(monkeypatch, seconds)
    ways, shares = ("majority", "cnn", "logistic", "linear"), [0.1, 1.0]
    results = compare(load_config(make_config()), ways, budget=110.0, seeds=1, shares=shares)
    assert pretended.done[-2:] == [("linear", 1.0, 0), ("logistic", 1.0, 0)]
    assert [r.why for r in results] == ["", "on all rows it would take about 50 s, more than was left", "", ""]


def test_features_that_were_there_already_make_no_way_cheaper(make_config, monkeypatch):
    ways = ("majority", "logistic", "cnn", "linear", "full")
    seconds = {("cnn", 1.0): 42.0, ("linear", 1.0): 60.0}
    pretended = Pretended(monkeypatch, seconds)
    *_, linear, _ = compare(load_config(make_config()), ways, budget=90.0, seeds=1, shares=[0.1, 1.0])
    assert ("cnn", 1.0, 0) in pretended.done and not linear.complete  # the shorter of the two that waited
    pretended.done.clear()
    pretended.seconds = {("cnn", 1.0): 90.0, ("linear", 1.0): 1e6}
    compare(load_config(make_config()), ways, budget=160.0, seeds=2, shares=[1.0])
    assert pretended.done[-1] == ("full", 1.0, 1), "it was not begun again with all that was left"


def test_ways_with_the_same_features_are_known_by_their_settings(make_config):
    from regraft.engine.compare.ways import WAYS, configured
    from regraft.engine.compare.worker import within_depth
    from regraft.engine.features.spec import feature_spec

    config = load_config(make_config())
    taking = [way for way in WAYS if way.features is not None]
    runs = {way.name: within_depth(configured(config, way, seed=0, run="x", rows=64)) for way in taking}
    keys = {name: feature_spec(run)[0] for name, run in runs.items()}
    assert set(keys) == {"centroid", "logistic", "linear", "mix", "bilstm"}
    for one in taking:
        for other in taking:
            assert (one.features == other.features) == (keys[one.name] == keys[other.name]), (one.name, other.name)


def test_a_worker_counts_on_features_that_are_stored(make_config, tmp_path, capsys):
    from regraft.engine.compare.worker import work

    data = {"store": str(tmp_path / "store")}
    config = load_config(make_config(features=data, training={"threads": 1}))
    few = {"share": 0.1, "rows": 6, "held": 6, "wall_seconds": 91.0, "prepare_seconds": 90.0}
    known = [few | {"seed": 0, "steps": 1, "step_seconds": 0.1}]
    for stored, told in ((False, "needs"), (True, "metrics")):
        job = {"config": config.model_dump(mode="json", exclude_unset=True), "way": "logistic", "folds": 0}
        job |= {"folder": str(tmp_path), "deadline": time.time() + 200, "known": known, "points": [(1.0, 0)]}
        assert work(job | {"stored": stored}) == 0
        first, memory = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
        assert told in first and "memory_mb" in memory


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
