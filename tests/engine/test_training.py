"""A training run: what it learns does not depend on how it is cut up, stopped or resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import regraft, sentences
from regraft.engine.config import load_config
from regraft.engine.errors import TrainingError
from regraft.engine.training.order import Plan, share_by_tokens
from regraft.engine.training.run import train
from regraft.engine.training.schedule import learning_rate_share

QUIET = {"model": {"dropout": 0.0}}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "best" / "model.safetensors")


def largest_difference(a: Path, b: Path) -> float:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    return max(float((one[k].double() - two[k].double()).abs().max()) for k in one)


def run(path: Path, folder: Path, *overrides: str):
    return train(load_config(path, [f"run={folder}", *overrides]), quiet=True)


def test_a_run_learns_and_leaves_everything_it_promises(make_config, write_rows, tmp_path):
    path = make_config(data={"train": str(write_rows("many.csv", 500, 7)), "dev": str(write_rows("other.csv", 100, 8))})
    result = run(path, tmp_path / "r", "trackers=[tensorboard]", "training.epochs=8", "training.learning_rate=3e-3")
    assert result.metrics["dev"]["accuracy"] > 0.75
    folder = tmp_path / "r"
    for name in ("config.yaml", "versions.json", "metrics.jsonl", "evaluation.json", "report.html", "run.json"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("config.json", "model.safetensors", "tokenizer.json", "regraft.json", "README.md"):
        assert (folder / "best" / name).stat().st_size > 0, name
    assert list((folder / "trackers").rglob("events.out.tfevents*"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = {r["kind"] for r in records}
    assert {"start", "train", "eval"} <= kinds
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_micro_batches_change_no_result(make_config, tmp_path):
    path = make_config(**QUIET)
    run(path, tmp_path / "whole", "training.token_budget=100000")
    run(path, tmp_path / "cut", "training.token_budget=16")
    assert largest_difference(tmp_path / "whole", tmp_path / "cut") < 1e-5


def test_kernels_and_packing_change_no_result(make_config, tmp_path):
    path = make_config(**QUIET)
    run(path, tmp_path / "fast")
    run(path, tmp_path / "plain", "model.kernels=off")
    run(path, tmp_path / "padded", "model.packing=off", "model.kernels=off")
    assert largest_difference(tmp_path / "fast", tmp_path / "plain") < 1e-5
    assert largest_difference(tmp_path / "fast", tmp_path / "padded") < 1e-5


def test_two_processes_take_the_same_steps_as_one(make_config, tmp_path):
    # 61 rows in steps of 6: the last step of an epoch has one row, so one process has none.
    path = make_config(**QUIET, data={"limit": 61}, training={"batch_size": 6, "threads": 1})
    run(path, tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
    ]
    command += ["-m", "regraft.engine", "train", str(path), "--set", f"run={tmp_path / 'two'}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    ends = [json.loads((tmp_path / n / "run.json").read_text())["result"]["metrics"]["dev"] for n in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(make_config, tmp_path):
    path = make_config()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(path, tmp_path / name, f"training.seed={seed}")
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0.0
    assert largest_difference(tmp_path / "a", tmp_path / "c") > 0.0


def test_the_order_of_rows_comes_from_seed_and_epoch_alone():
    plan = Plan(rows=103, batch_size=10, seed=3, epochs=2.5)
    assert plan.total_steps == 28
    assert sorted(np.concatenate([plan.batch(s, plan.order(0)) for s in range(11)])) == list(range(103))
    assert not np.array_equal(plan.order(0), plan.order(1))
    assert np.array_equal(plan.order(7), Plan(rows=103, batch_size=4, seed=3, epochs=9).order(7))


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_steps_are_found_among_those_a_run_takes(seed):
    rng = np.random.default_rng(seed)
    steps = None if seed % 2 else int(rng.integers(1, 20))
    plan = Plan(int(rng.integers(1, 60)), int(rng.integers(1, 12)), seed, float(rng.uniform(0.1, 4)), steps)
    lengths = rng.integers(1, 100, plan.rows)
    taken = [plan.batch(step, plan.order(plan.epoch_of(step))) for step in range(plan.total_steps)]
    found = plan.largest_steps(lengths)
    for size in (np.sum, np.max):
        assert max(size(lengths[rows]) for rows in found) == max(size(lengths[rows]) for rows in taken)
    assert all(any(np.array_equal(rows, other) for other in taken) for rows in found)


def test_processes_share_a_step_by_tokens():
    lengths = np.array([90, 10, 10, 10, 30, 30])
    shares = share_by_tokens(lengths, 2)
    assert sorted(np.concatenate(shares)) == list(range(6))
    assert abs(lengths[shares[0]].sum() - lengths[shares[1]].sum()) <= 10
    assert [len(s) for s in share_by_tokens(np.array([5]), 3)].count(0) == 2


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "wsd"])
def test_schedules_warm_up_and_end_where_they_say(make_config, name):
    config = load_config(make_config(), [f"training.schedule={name}", "training.warmup=0.1"]).training
    shares = [learning_rate_share(config, s, 100) for s in range(100)]
    assert shares[0] < 0.2
    assert np.all(np.diff(shares[:11]) > 0)
    assert max(shares) == pytest.approx(1.0, abs=0.02)
    assert shares[-1] == 1.0 if name == "constant" else shares[-1] < 0.15
    if name == "wsd":
        assert set(np.round(shares[12:79], 6)) == {1.0}


def test_layer_decay_and_head_rate_reach_the_right_weights(make_config, tiny_model):
    from transformers import AutoModelForSequenceClassification

    from regraft.engine.training.optimizer import parameter_groups

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    settings = ["training.learning_rate=1", "training.layer_decay=0.5", "training.head_learning_rate=8"]
    groups = parameter_groups(model, load_config(make_config(), settings).training)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert rate[id(named["classifier.weight"])] == 8
    assert rate[id(named["bert.encoder.layer.1.output.dense.weight"])] == 0.5
    assert rate[id(named["bert.encoder.layer.0.output.dense.weight"])] == 0.25
    assert rate[id(named["bert.embeddings.word_embeddings.weight"])] == 0.125
    assert decay[id(named["bert.encoder.layer.1.output.dense.weight"])] == 0.01
    assert decay[id(named["bert.encoder.layer.1.output.LayerNorm.weight"])] == 0
    assert len(rate) == len(named)


def test_frozen_leaves_the_encoder_as_it_was(make_config, tmp_path, tiny_model):
    path = make_config()
    run(path, tmp_path / "frozen", "method=frozen", "training.learning_rate=1e-2")
    before, after = load_file(tiny_model / "model.safetensors"), weights(tmp_path / "frozen")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_early_stopping_ends_the_run_and_keeps_the_best(make_config, tmp_path):
    path = make_config(training={"epochs": 40})
    result = run(path, tmp_path / "r", "training.early_stopping.patience=2", "training.learning_rate=1e-7")
    assert result.steps < 40 * 8
    assert result.best_step <= result.steps - 16


def test_a_finished_run_answers_at_once_and_another_configuration_is_refused(make_config, tmp_path):
    path = make_config()
    first = run(path, tmp_path / "r")
    stamp = (tmp_path / "r" / "best" / "model.safetensors").stat().st_mtime_ns
    assert run(path, tmp_path / "r").metrics == first.metrics
    assert (tmp_path / "r" / "best" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(TrainingError, match=r"training.learning_rate: 0.001 there, 0.5 here.*--restart"):
        run(path, tmp_path / "r", "training.learning_rate=0.5")


@pytest.mark.parametrize(
    ("task", "labels"),
    [("multilabel", ["a,b", "b", "", "c", "a,c", "b,c"]), ("regression", ["0.5", "1", "2", "0.25", "3", "1.5"])],
)
def test_every_task_trains_evaluates_and_predicts(make_config, tmp_path, task, labels):
    rows = "\n".join(f'good plot {i},"{labels[i % 6]}"' for i in range(36))
    (tmp_path / "t.csv").write_text("text,label\n" + rows + "\n")
    settings: dict = {"type": task} | ({"thresholds": "tuned"} if task == "multilabel" else {})
    path = make_config(task=settings, data={"train": str(tmp_path / "t.csv"), "dev": None})
    result = run(path, tmp_path / "r")
    assert all(np.isfinite(v) for v in result.metrics["dev"].values())
    done = regraft("predict", tmp_path / "r", "good plot 3", "--format", "jsonl")
    answer = json.loads(done.stdout)
    assert isinstance(answer["label"], list if task == "multilabel" else float)


def test_pairs_are_trained_with_their_token_types(make_config, tmp_path):
    rows = "\n".join(
        f"good {w},{w} film,{'same' if i % 2 else 'other'}" for i, w in enumerate(["plot", "joke", "scene"] * 8)
    )
    (tmp_path / "t.csv").write_text("a,b,label\n" + rows + "\n")
    data = {"train": str(tmp_path / "t.csv"), "dev": None, "columns": {"text": "a", "text_pair": "b"}}
    run(make_config(data=data), tmp_path / "r")
    done = regraft("predict", tmp_path / "r", "good plot", "--pair", "plot film", "--format", "jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text_pair"] == "plot film"


def test_a_regression_learns_labels_of_any_unit_and_is_saved_in_theirs(make_config, tmp_path):
    """Prices around 100,000 are out of reach of a head that starts near 0 and moves by 1e-3 a step."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    prices = {"pos": 150_000.0, "neg": 100_000.0}
    for name, count, seed in (("t.csv", 400, 7), ("d.csv", 80, 8)):
        lines = [f"{text},{prices[label]}" for text, label in sentences(count, seed)]
        (tmp_path / name).write_text("\n".join(["text,label", *lines]) + "\n")
    path = make_config(
        task={"type": "regression"},
        data={"train": str(tmp_path / "t.csv"), "dev": str(tmp_path / "d.csv")},
        training={"epochs": 8, "learning_rate": 3e-3},
    )
    result = run(path, tmp_path / "r")
    assert result.metrics["dev"]["mae"] < 15_000, "the mean of all prices is 25,000 away"
    best = tmp_path / "r" / "best"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(best).eval(),
        AutoTokenizer.from_pretrained(best),
    )
    rows = sentences(80, 8)
    with torch.no_grad():
        found = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text, _ in rows]
    mae = np.abs(np.array(found) - [prices[label] for _, label in rows]).mean()
    assert mae == pytest.approx(result.metrics["dev"]["mae"], rel=1e-3)


def test_a_micro_batch_that_memory_may_not_hold_is_told_from_one_that_it_surely_does(tiny_model):
    from transformers import AutoModelForSequenceClassification

    from regraft.engine.training.setup import activation_bytes, could_run_out, free_memory

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    fits = free_memory() / activation_bytes(model, "fp32")
    assert could_run_out(int(fits / 2), model, "fp32") and could_run_out(int(fits * 2), model, "fp32")
    assert not could_run_out(int(fits / 100), model, "fp32")


def test_processes_on_one_machine_share_its_memory(tiny_model, make_config, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    from regraft.engine.training.setup import activation_bytes, choose_token_budget, could_run_out

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    config, a_token = load_config(make_config()), activation_bytes(model, "fp32")
    monkeypatch.setattr("regraft.engine.training.setup.host_memory", lambda: int(10_000 * a_token))
    alone = choose_token_budget(config, model, "fp32")
    assert alone == 4000 and not could_run_out(900, model, "fp32")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_token_budget(config, model, "fp32") == alone // 4 and could_run_out(900, model, "fp32")


def test_a_run_from_before_there_were_some_keys_is_still_the_same_run(make_config):
    path = make_config(training={"max_steps": 2})
    folder = train(load_config(path)).folder
    mark = json.loads((folder / "run.json").read_text())
    mark["config_hash"] = "of another version"
    del mark["config"]["mixing"], mark["config"]["training"]["ema"]
    (folder / "run.json").write_text(json.dumps(mark))
    assert train(load_config(path)).earlier
    mark["config"]["training"]["seed"] = 7
    (folder / "run.json").write_text(json.dumps(mark))
    with pytest.raises(TrainingError, match=r"another configuration \(training\.seed: 7 there, 0 here\)"):
        train(load_config(path))
