"""Several processes: the steps of one, whatever happens to a rank on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from conftest import regraft
from regraft.engine.config import load_config
from regraft.engine.training.run import train

WHOLE = {"model": {"dropout": 0.0}, "data": {"limit": 61}, "training": {"batch_size": 6, "threads": 1, "epochs": 1}}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    found = [folder / "best" / n for n in ("adapter_model.safetensors", "model.safetensors")]
    return load_file(next(f for f in found if f.exists()))


def difference(a: Path, b: Path) -> float:
    one, two = saved(a), saved(b)
    assert one.keys() == two.keys()
    return max(float((one[k].double() - two[k].double()).abs().max()) for k in one)


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_two_processes_take_the_steps_of_one(method, make_config, tmp_path):
    path = make_config(**WHOLE, method=method)
    train(load_config(path, [f"run={tmp_path / 'one'}"]), quiet=True)
    done = regraft("train", path, "--processes", "2", "--set", f"run={tmp_path / 'two'}", timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-6
    ends = [json.loads((tmp_path / n / "run.json").read_text())["result"]["metrics"]["dev"] for n in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_a_killed_rank_ends_the_run_by_name_and_one_process_goes_on(make_config, tmp_path):
    path = make_config(**WHOLE, method="lora")
    train(load_config(path, [f"run={tmp_path / 'one'}", "training.epochs=12"]), quiet=True)
    more = ["--set", f"run={tmp_path / 'two'}", "--set", "training.epochs=12", "--set", "training.checkpoint_every=1"]
    command = [sys.executable, "-m", "regraft.engine", "train", str(path), "--processes", "2", *more]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not list((tmp_path / "two" / "checkpoints").glob("step-*")):
            assert parent.poll() is None and time.monotonic() < until, parent.communicate()[1][-2000:]
            time.sleep(0.05)
        victim = next(p for p in psutil.Process(parent.pid).children() if p.environ().get("RANK") == "1")
        os.kill(victim.pid, signal.SIGKILL)
        _, errors = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert parent.returncode == 2
    assert "rank 1 of 2 was ended by SIGKILL" in errors
    done = train(load_config(path, more[1:2] + more[3:4] + more[5:6]), quiet=True)
    assert done.steps == 12 * 11
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-5


def test_a_rank_that_refuses_is_named_with_its_reason(make_config, tmp_path):
    path = make_config()
    (tmp_path / "train.csv").unlink()
    done = regraft("train", path, "--processes", "2", timeout=120)
    assert done.returncode == 2
    assert "train.csv" in done.stderr
    assert "rank 0 of 2" in done.stderr or "rank 1 of 2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "0"], "at least 1"),
        (["--processes", "9"], "training.batch_size is 8"),
        (["--processes", "2", "--set", "unfreeze.gradual=true"], "unfreeze.gradual"),
    ],
)
def test_a_number_of_processes_that_does_not_fit_is_refused_at_once(arguments, words, make_config):
    done = regraft("train", make_config(), *arguments)
    assert done.returncode == 2
    assert words in done.stderr
