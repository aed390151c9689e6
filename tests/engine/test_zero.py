"""DeepSpeed's ZeRO: the steps of one process, and checkpoints that go on with and without it."""

from __future__ import annotations

import importlib.util
import random

import pytest
from test_sharding import UNEVEN, difference, killed_on_the_way, losses, stopped_at

from conftest import regraft
from regraft.engine.config import load_config
from regraft.engine.errors import ConfigError
from regraft.engine.training.run import train
from regraft.engine.training.together import check_deepspeed

PLAIN = {**UNEVEN, "training": {k: v for k, v in UNEVEN["training"].items() if k != "ema"}}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@needs_deepspeed
def test_two_processes_under_stage_1_take_the_steps_of_one(make_config, tmp_path):
    path = make_config(**PLAIN, method="lora")  # all weights, other stages: below
    train(load_config(path, [f"run={tmp_path / 'one'}"]), quiet=True)
    more = ["--set", f"run={tmp_path / 'two'}", "--set", "training.sharding=zero1"]
    done = regraft("train", path, "--processes", "2", *more, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights shared out among 2 processes" in done.stderr
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)


@needs_deepspeed
@pytest.mark.slow
def test_a_run_goes_on_from_stage_2_to_no_deepspeed_to_stage_3(make_config, tmp_path):
    """Two processes under stage 2, one of them killed at a random step; one process without DeepSpeed, stopped; stage 3.
    Three classes: weights that two processes cannot share evenly."""
    rows = [f"{['good', 'bad', 'fair'][i % 3]} film {'indeed ' * (i % 5)},{i % 3}" for i in range(61)]
    (tmp_path / "three.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    data = {"train": str(tmp_path / "three.csv"), "dev": str(tmp_path / "three.csv")}
    longer = {**PLAIN, "data": data, "training": PLAIN["training"] | {"epochs": 3, "checkpoint_every": 1}}
    path = make_config(**longer)
    train(load_config(path, [f"run={tmp_path / 'one'}"]), quiet=True)
    run = f"run={tmp_path / 'two'}"
    first = killed_on_the_way(path, tmp_path / "two", "zero2", random.randint(1, 8))
    stopped_at(first + 8, path, tmp_path / "two")
    done = regraft("train", path, "--processes", "2", "--set", run, "--set", "training.sharding=zero3", timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)


def test_averaged_weights_are_refused_under_zero_before_anything_is_read(make_config):
    with pytest.raises(ConfigError) as refused:
        load_config(make_config(), ["training.sharding=zero2", "training.ema=0.9"])
    assert "training.ema: DeepSpeed keeps the weights to itself" in str(refused.value)


def test_without_deepspeed_the_run_ends_before_anything_is_read_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"training.sharding: zero2 needs DeepSpeed.*pip install deepspeed"):
        check_deepspeed("zero2")
    check_deepspeed("full")
