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
from forks import Forked
from safetensors.torch import load_file

from conftest import FORKS, regraft
from ranks import ended, ran_to_the_end, rank_one, start_ranks
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


HELD = """
import re, sys
from regraft.engine.config import load_config
from regraft.engine.training.run import train
from regraft.engine.training.together import part

def held(info):
    maps = re.findall(r"(?m)^(\\w+)-(\\w+) .*memfd:regraft", open("/proc/self/maps").read())
    print(sum(int(end, 16) - int(start, 16) for start, end in maps), file=open("held.txt", "a"))

train(load_config(sys.argv[1], sys.argv[2:]), quiet=True, on_step=held)
part()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which Linux has")
def test_processes_hold_weights_and_moments_once(make_config, tmp_path):
    path = make_config(**WHOLE, method="full")
    most = []
    for name, setting in (("shared", "training.ema=null"), ("apart", "training.ema=0.9")):
        arguments = [path, f"run={tmp_path / name / 'run'}", setting]
        folders = ran_to_the_end(arguments, tmp_path / name, 2, program=("-c", HELD))
        held = [(folder / "held.txt").read_text().split() for folder in folders]
        assert held[0] == held[1]
        most.append(max(map(int, held[0])))
    trained = sum(t.numel() for t in saved(tmp_path / "apart" / "run").values())
    assert most[0] - most[1] > 0.5 * 3 * 4 * trained  # without the words that no text names


def test_a_killed_rank_ends_the_run_by_name_and_one_process_goes_on(make_config, tmp_path):
    path = make_config(**WHOLE, method="lora")
    train(load_config(path, [f"run={tmp_path / 'one'}", "training.epochs=12"]), quiet=True)
    more = ["--set", f"run={tmp_path / 'two'}", "--set", "training.epochs=12", "--set", "training.checkpoint_every=1"]
    parent = FORKS.start(["-m", "regraft.engine", "train", str(path), "--processes", "2", *more])
    try:
        until = time.monotonic() + 120
        while not list((tmp_path / "two" / "checkpoints").glob("step-*")):
            assert parent.poll() is None and time.monotonic() < until, parent.communicate()[1][-2000:]
            time.sleep(0.05)
        rank_one(parent).kill()
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


def test_a_rank_without_the_data_ends_every_rank_with_its_number_and_reason(make_config, tmp_path):
    """Two machines, as it were, and the file is on one of them alone; nothing stops the other rank from outside."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    path = make_config()
    (tmp_path / "train.csv").rename(here / "train.csv")
    ranks = start_ranks(["train", path, "--set", "data.train=train.csv"], [here, there])
    for code, errors in ended(ranks):
        assert code == 2, errors
        assert "rank 1 of 2" in errors
        assert "train.csv: no such file" in errors
        assert "Traceback" not in errors


def test_a_full_disk_ends_every_rank_and_space_lets_the_run_go_on(make_config, tmp_path, full_disk):
    path, folder = make_config(training={"threads": 1, "sharding": "full", "epochs": 1}), full_disk.path / "run"
    ranks = start_ranks(["train", path, "--set", f"run={folder}"], [tmp_path, tmp_path])
    for code, errors in ended(ranks):
        assert code == 2, errors
        assert "rank 0 of 2" in errors
        assert "the disk is full" in errors
        assert "Traceback" not in errors
    full_disk.make_room()
    assert train(load_config(path, [f"run={folder}"]), quiet=True).steps == 8


def test_a_slow_rank_is_waited_for_and_a_stopped_one_is_named(make_config, tmp_path):
    path = make_config(**WHOLE)
    settings = ["training.epochs=100000", "training.checkpoint_every=5", "training.evaluate_every=100000"]
    settings += ["training.timeout=8"]
    command = ["-m", "regraft.engine", "train", str(path), "--processes", "2"]
    parent = FORKS.start([*command, *(x for s in settings for x in ("--set", s))])
    try:
        steps_after(tmp_path / "run", 0, parent)
        slow = rank_one(parent)
        slow.suspend()  # SIGSTOP
        time.sleep(1.0)
        before = last_step(tmp_path / "run")
        slow.resume()
        steps_after(tmp_path / "run", before, parent)  # it was waited for, and the run goes on
        slow.suspend()
        _, errors = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert parent.returncode == 2
    assert "rank 1 of 2 did not come within 8 seconds (training.timeout)" in errors  # by the rank that waited
    assert "rank 1 of 2 was stopped (SIGSTOP)" in errors  # by the process that watches
    assert not slow.is_running() or slow.status() == psutil.STATUS_ZOMBIE


def last_step(folder: Path) -> int:
    return max((int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*")), default=0)


def steps_after(folder: Path, step: int, process: Forked | subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while last_step(folder) <= step:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


SHORT = """
import sys, torch
from regraft.engine.models import RunningModel
from regraft.engine.training.together import rank
plain, taken = RunningModel.forward, []


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise torch.OutOfMemoryError("no more")


def forward(self, batch):
    logits = plain(self, batch)
    if not self.training or rank() != 1:
        return logits
    taken.append(batch.tokens)
    fails = {fails}
    if fails and {where!r} == "forward":
        raise torch.OutOfMemoryError("no more")
    return Fails.apply(logits) if fails else logits


RunningModel.forward = forward
from regraft.engine.cli import main
code = main()
assert not torch.distributed.is_initialized()  # or its threads might abort this process as the interpreter ends
sys.exit(code)
"""


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_without_memory_takes_its_share_again_and_changes_no_result(where, make_config, tmp_path):
    path = make_config(**WHOLE, method="lora")
    train(load_config(path, [f"run={tmp_path / 'one'}"]), quiet=True)
    script = tmp_path / "short.py"
    script.write_text(SHORT.replace("{fails}", "batch.tokens > 16").replace("{where!r}", repr(where)))
    arguments = ["train", path, "--set", f"run={tmp_path / 'two'}", "--set", "training.timeout=60"]
    for code, errors in ended(start_ranks(arguments, [tmp_path, tmp_path], program=[str(script)])):
        assert code == 0, errors[-3000:]
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-6


def test_a_rank_whose_memory_holds_not_one_sequence_is_the_one_that_is_named(make_config, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n"
        "    import regraft.engine.training.step as step, torch\n"
        "    def none(self, *_):\n        raise torch.OutOfMemoryError('no more')\n"
        "    step.Stepper._gradients = none\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    done = regraft("train", make_config(**WHOLE), "--processes", "2", timeout=120)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "rank 1 of 2 ended with code 2: out of memory in step 0 with one sequence at a time" in last, done.stderr
    assert "gradient_checkpointing" in last and "Traceback" not in done.stderr


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_process_that_started_it(sign, make_config):
    command = [sys.executable, "-m", "regraft.engine", "train", str(make_config(**WHOLE)), "--processes", "2"]
    command += ["--set", "training.epochs=100000"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while len(ranks := psutil.Process(parent.pid).children()) < 2:
            assert parent.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.5)  # until they are programs of their own
        parent.send_signal(sign)
        parent.wait(30)
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive
    finally:
        parent.kill()
        for rank in ranks:
            if rank.is_running():
                rank.kill()
