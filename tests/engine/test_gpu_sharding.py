"""On a GPU: accelerate's FSDP2 and moments on the host give the run that neither gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL = {"model": {"dropout": 0.0}, "training": {"epochs": 2, "precision": "fp32", "learning_rate": 1e-4, "ema": 0.9}}


def losses(path: Path, folder: Path, *settings: str, processes: int = 1) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "regraft.engine", "train", str(path)]
    command += [x for s in (f"run={folder}", *settings) for x in ("--set", s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=os.environ | {})
    assert done.returncode == 0, done.stderr[-3000:]
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if r["kind"] == "train"]


@needs_gpu
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("settings", [["training.sharding=full"], ["training.offload_optimizer=true"]])
def test_sharded_and_offloaded_runs_lose_what_a_plain_one_does(method, settings, make_config, tmp_path):
    path = make_config(**SMALL, method=method)
    processes = torch.cuda.device_count() if "sharding" in settings[0] else 1
    plain = losses(path, tmp_path / "plain")
    assert losses(path, tmp_path / "other", *settings, processes=min(processes, 8)) == pytest.approx(plain, rel=1e-3)
