"""Resuming fed other batches, or took hours to skip (accelerate 2016, 4071; transformers 11284, 26413)."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from forks import Forked
from safetensors.torch import load_file

from conftest import FORKS
from regraft.engine.config import load_config
from regraft.engine.training.order import Plan
from regraft.engine.training.run import train


def largest_difference(a: Path, b: Path) -> float:
    one, two = (load_file(folder / "best" / "model.safetensors") for folder in (a, b))
    return max(float((one[k].double() - two[k].double()).abs().max()) for k in one)


def test_killed_at_any_moment_and_started_again_is_as_if_never_killed(make_config, tmp_path):
    steps = {"epochs": 12, "checkpoint_every": 3, "evaluate_every": 7, "ema": 0.9, "early_stopping": {"patience": 50}}
    path = make_config(training=steps)
    train(load_config(path, [f"run={tmp_path / 'whole'}"]), quiet=True)
    command = ["-m", "regraft.engine", "train", str(path), "--quiet", "--set", f"run={tmp_path / 'killed'}"]
    draw = random.Random()
    kills = 0
    for _ in range(12):
        process = FORKS.start(command)
        wait_for_steps(tmp_path / "killed", process, draw.randint(0, 8) if kills < 3 else 10**6)
        if process.poll() is None:
            time.sleep(draw.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if process.returncode == 0:
            break
    assert process.returncode == 0
    assert kills >= 2
    assert largest_difference(tmp_path / "whole", tmp_path / "killed") == 0.0
    assert lines_that_matter(tmp_path / "whole") == lines_that_matter(tmp_path / "killed")


class Enough(Exception):
    """Ends a run as a kill would, after a checkpoint."""


def test_memory_that_is_free_on_the_day_of_resuming_decides_nothing(make_config, tmp_path, monkeypatch):
    """With dropout, as the micro-batches decide which random numbers it draws."""
    path = make_config(training={"checkpoint_every": 1})
    train(load_config(path, [f"run={tmp_path / 'whole'}"]), quiet=True)

    def stop(info):
        if info.step == 6:
            raise Enough

    resumed = load_config(path, [f"run={tmp_path / 'resumed'}"])
    with pytest.raises(Enough):
        train(resumed, on_step=stop, quiet=True)
    monkeypatch.setattr("regraft.engine.training.setup.free_memory", lambda: 1)
    small = load_config(path, [f"run={tmp_path / 'small'}"])
    monkeypatch.setattr("regraft.engine.training.setup.choose_token_budget", lambda *_: 20)
    train(resumed, quiet=True)
    assert largest_difference(tmp_path / "whole", tmp_path / "resumed") == 0.0
    train(small, quiet=True)  # the budget would have told
    assert largest_difference(tmp_path / "whole", tmp_path / "small") > 1e-5


def wait_for_steps(folder: Path, process: Forked | subprocess.Popen[str], lines: int) -> None:
    """Until `lines` more lines of history, or the process's end."""
    history = folder / "metrics.jsonl"
    start = len(history.read_bytes().splitlines()) if history.exists() else 0
    while process.poll() is None:
        if history.exists() and len(history.read_bytes().splitlines()) > start + lines:
            return
        time.sleep(0.01)


def lines_that_matter(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = {"seconds", "tokens_per_second", "seconds_to_first_step"}
    return [{k: v for k, v in r.items() if k not in times} for r in records]


def test_resuming_costs_no_pass_over_the_data():
    # The batch of the last step of a long run is there at once: nothing before it is drawn or read.
    plan = Plan(rows=1_000_000, batch_size=32, seed=1, epochs=50)
    started = time.perf_counter()
    step = plan.total_steps - 1
    rows = plan.batch(step, plan.order(plan.epoch_of(step)))
    assert len(rows) == 32
    assert rows.max() < 1_000_000
    assert time.perf_counter() - started < 1.0
