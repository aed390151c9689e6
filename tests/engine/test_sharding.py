"""Weights shared out among processes: the steps of one process, and checkpoints that any number goes on from."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forked
from safetensors.torch import load_file

from conftest import FORKS, regraft
from ranks import ended, rank_one, start_ranks
from regraft.engine.config import load_config
from regraft.engine.errors import ConfigError
from regraft.engine.training.offload import OffloadedAdamW, offloaded
from regraft.engine.training.optimizer import clipped_step, gradient_norm
from regraft.engine.training.order import share_by_tokens
from regraft.engine.training.run import train
from regraft.engine.training.together import machines
from regraft.kernels.choice import forced

# 61 rows in steps of 6: the last one has a single row. 40 tokens a micro-batch: two to four of them, and one process may
# have more than the other. Clipping is at work in every step.
UNEVEN = {
    "model": {"dropout": 0.0},
    "data": {"limit": 61},
    "training": {
        "batch_size": 6,
        "threads": 1,
        "epochs": 1,
        "token_budget": 40,
        "max_grad_norm": 0.1,
        "ema": 0.9,
        "epsilon": 1e-5,  # a key's bias has no gradient but rounding, which Adam would make large
        "timeout": 120,
    },
}


def difference(a: Path, b: Path) -> float:
    """Of the weights as the runs ended, and of the averaged ones of their best models."""
    found = []
    for pattern in ("checkpoints/step-*/model.safetensors", "best/*model.safetensors"):
        one, two = (load_file(max(folder.glob(pattern))) for folder in (a, b))
        assert one.keys() == two.keys()
        found += [float((one[k].double() - two[k].double()).abs().max()) for k in one]
    assert last_step(a) == last_step(b)
    return max(found)


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if r["kind"] == "train"]


def test_two_processes_with_shards_take_the_steps_of_one(make_config, tmp_path):
    path = make_config(**UNEVEN, method="lora")  # all weights: test_cluster.py
    train(load_config(path, [f"run={tmp_path / 'one'}"]), quiet=True)
    more = ["--set", f"run={tmp_path / 'two'}", "--set", "training.sharding=full"]
    done = regraft("train", path, "--processes", "2", *more, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights shared out among 2 processes" in done.stderr
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    ends = [json.loads((tmp_path / n / "run.json").read_text())["result"]["metrics"]["dev"] for n in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


class Enough(Exception):
    pass


def test_two_processes_then_one_then_two_is_as_if_never_stopped(make_config, tmp_path):
    """Two processes with shards, one of them killed at a random step; one process, stopped; two machines that hold a set
    of shards each."""
    longer = {**UNEVEN, "training": UNEVEN["training"] | {"epochs": 9, "checkpoint_every": 1}}
    path = make_config(**longer)
    train(load_config(path, [f"run={tmp_path / 'one'}"]), quiet=True)
    run = f"run={tmp_path / 'two'}"
    first = killed_on_the_way(path, tmp_path / "two", "full", random.randint(1, 20))
    stopped_at(first + 20, path, tmp_path / "two")
    arguments = ["train", path, "--set", run, "--set", "training.sharding=hybrid"]
    ranks = start_ranks(arguments, [tmp_path, tmp_path], LOCAL_WORLD_SIZE="1")
    assert [code for code, _ in ended(ranks, 250)] == [0, 0]
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)


def killed_on_the_way(path: Path, folder: Path, sharding: str, step: int) -> int:
    """Two processes, one of them killed once that step is in a checkpoint; the last checkpoint's step."""
    command = ["-m", "regraft.engine", "train", str(path), "--processes", "2", "--set", f"run={folder}"]
    parent = FORKS.start([*command, "--set", f"training.sharding={sharding}"])
    try:
        wait_for_step(folder, step, parent)
        rank_one(parent).kill()
        _, errors = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert "rank 1 of 2 was ended by SIGKILL" in errors
    return last_step(folder)


def stopped_at(step: int, path: Path, folder: Path) -> None:
    """One process goes on to that step."""

    def stop(info):
        if info.step == step:
            raise Enough

    with pytest.raises(Enough):
        train(load_config(path, [f"run={folder}"]), on_step=stop, quiet=True)
    assert last_step(folder) == step


def last_step(folder: Path) -> int:
    return max((int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*")), default=0)


def wait_for_step(folder: Path, step: int, process: Forked | subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while last_step(folder) < step:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("seed", range(8))
def test_no_process_has_more_than_one_sequence_more_tokens_than_another(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 512, int(generator.integers(1, 200)))
    for processes in (2, 3, 8, 13):
        shares = share_by_tokens(lengths, processes)
        assert sorted(np.concatenate(shares)) == list(range(len(lengths)))
        tokens = [int(lengths[share].sum()) for share in shares]
        assert max(tokens) - min(tokens) <= lengths.max()


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_accumulating_over_micro_batches_changes_no_result(micro_batches, make_config, tmp_path):
    rows = "\n".join(f"{'good film ' * 7},{'pos' if i % 3 else 'neg'}" for i in range(40))  # 16 tokens each
    (tmp_path / "t.csv").write_text("text,label\n" + rows + "\n")
    path = make_config(model={"dropout": 0.0}, data={"train": str(tmp_path / "t.csv")}, training={"epochs": 1})
    train(load_config(path, [f"run={tmp_path / 'whole'}", "training.token_budget=100000"]), quiet=True)
    budget = 8 * 16 // micro_batches
    train(load_config(path, [f"run={tmp_path / 'cut'}", f"training.token_budget={budget}"]), quiet=True)
    assert difference(tmp_path / "whole", tmp_path / "cut") < 1e-6
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method=qlora", "training.sharding=full"], "training.sharding: method: qlora keeps its weights in blocks"),
        (["method=frozen", "training.sharding=full"], "training.sharding: method: frozen is not shared out"),
        (["training.optimizer=adamw8bit", "training.sharding=full"], "optimizer: adamw8bit keeps its moments"),
        (["training.precision=fp16", "training.sharding=hybrid"], "use bf16 or fp32"),
        (["training.optimizer=paged_adamw8bit", "training.offload_optimizer=true"], "offload_optimizer"),
        (["method=frozen", "training.offload_optimizer=true"], "training.offload_optimizer: method: frozen"),
        (["training.sharding=some"], "training.sharding"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_is_read(settings, words, make_config):
    with pytest.raises(ConfigError) as refused:
        load_config(make_config(), settings)
    assert words in str(refused.value)


def test_machines_with_unlike_numbers_of_processes_cannot_hold_a_set_of_shards_each(make_config, monkeypatch):
    config = load_config(make_config(), ["training.sharding=hybrid", "training.batch_size=32"])
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="12 in all are no multiple of the 8 on this one"):
        train(config, quiet=True)
    assert not Path(config.run).exists()
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert machines("hybrid") == 2


def optimizers() -> tuple[list[torch.Tensor], torch.optim.AdamW]:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((40, 8), (8,), (3, 5, 2))]
    groups = [
        {"params": weights[:1], "lr": 1e-2, "base_lr": 1e-2, "weight_decay": 0.1},
        {"params": weights[1:], "lr": 3e-2, "base_lr": 3e-2, "weight_decay": 0.0},
    ]
    return weights, torch.optim.AdamW(groups, fused=True)


def steps(weights: list[torch.Tensor], optimizer, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - number / count)
        clipped_step(optimizer, gradient_norm(weights), 1.0 if number % 2 else None)
        optimizer.zero_grad()


@forced("reference")  # torch's fused AdamW on both sides: beside weights on a GPU nothing else runs
def test_moments_kept_on_the_host_give_the_same_weights_bit_for_bit():
    plain, moments = optimizers()
    steps(plain, moments, 7, seed=1)
    weights, inner = optimizers()
    away = OffloadedAdamW(inner)
    steps(weights, away, 7, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True))
    assert not inner.state, "no moment is held beside the weights"
    # From the state of the one the other goes on.
    resumed, inner = optimizers()
    with torch.no_grad():
        for a, b in zip(resumed, plain, strict=True):
            a.copy_(b)
    back = OffloadedAdamW(inner)
    back.load_state_dict(copy.deepcopy(moments.state_dict()))
    steps(plain, moments, 5, seed=2)
    steps(resumed, back, 5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(plain, resumed, strict=True))
    assert away.state_dict()["state"].keys() == moments.state_dict()["state"].keys()


def test_a_run_on_the_cpu_says_that_there_is_nothing_to_move_to_the_host(make_config):
    said: list[str] = []
    training = load_config(make_config(), ["training.offload_optimizer=true"]).training
    _, optimizer = optimizers()
    assert offloaded(optimizer, training, torch.device("cpu"), said.append) is optimizer
    assert said == ["training.offload_optimizer: the run is on the CPU, so the moments are in its memory anyway"]
