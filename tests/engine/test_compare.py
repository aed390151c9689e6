"""The comparison as a user runs it: the same rows for every way, a budget that is kept, processes that end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import regraft
from regraft.engine.compare.rows import fold_of, part_of
from regraft.engine.compare.run import compare
from regraft.engine.compare.ways import WAYS, configured
from regraft.engine.config import load_config


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks its workers, as on Linux")
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


def test_the_command_ends_within_its_budget(make_config):
    path = make_config(training={"epochs": 5000, "threads": 1})
    command, whole = ("compare", path, "--ways", "full", "--budget", "30s"), dict(os.environ)
    began = time.monotonic()
    done = regraft(*command, timeout=90, env=whole)
    took = time.monotonic() - began
    assert "stopped: the budget was used up" in done.stdout
    assert took < 32


def test_the_budget_is_kept(make_config, tmp_path):
    config = load_config(make_config(training={"epochs": 5000, "threads": 1}))
    began = time.monotonic()
    (slow,) = compare(config, ("full",), budget=15.0, seeds=1, shares=[1.0])
    assert time.monotonic() - began < 30
    assert "stopped" in slow.why
    assert not slow.complete


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks its workers, as on Linux")
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


def test_a_few_rows_have_a_learning_curve_too(make_config):
    config = load_config(make_config(training={"max_steps": 2, "threads": 1}))
    (found,) = compare(config, ("tfidf",), budget=100.0, seeds=1, shares=[0.5, 1.0])
    assert [point["share"] for point in found.points] == [0.5, 1.0]
