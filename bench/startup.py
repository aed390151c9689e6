"""Seconds until something happens: `regraft --help`, and the first optimizer step of a run on 67,000 rows.

Cold: rows that were never seen before, in a cache folder that is empty. Cached: the same command once more. The
peer is a plain Trainer script on the same rows, which has no cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import machine
import sources
from environments import encoder_folder, our_versions, peer_python, versions
from harness import (
    OURS,
    WORK,
    Claim,
    Run,
    Target,
    TurnFailed,
    arguments,
    publish,
    run,
    take_turns,
    turn,
)

CLAIM = Claim("startup", "Seconds from the command to its first sign of work", "s", higher_is_better=False)
HELP, COLD, CACHED = "regraft --help", "first step, cold", "first step, cached"


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--help-rounds", type=int, default=10, help="of `regraft --help` (%(default)s)")
    parser.add_argument("--rows", type=int, default=67_000, help="training rows (%(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.help_rounds, options.rows = 1, 2, 320
    before = machine.facts()
    runs: list[Run] = take_turns(HELP, {OURS: lambda n: show_help(options)}, options.help_rounds)
    starts = Starts(options)
    runs += take_turns(COLD, {OURS: starts.cold, "trainer": starts.trainer}, options.rounds)
    runs += take_turns(CACHED, {OURS: starts.cached}, options.rounds)
    found = {
        "regraft": our_versions(),
        "trainer": versions(peer_python("trainer"), ("torch", "transformers", "accelerate", "numpy")),
    }
    settings = {COLD: {"rows": options.rows}, CACHED: {"rows": options.rows}}
    publish(CLAIM, runs, options, versions=found, settings=settings, targets=targets, before=before)


def show_help(options: argparse.Namespace) -> tuple[float, dict]:
    """Wall time of `regraft --help`, started as a shell would."""
    script = Path(sys.executable).with_name("regraft")
    command = [script] if script.exists() else [sys.executable, "-m", "regraft.engine"]
    began = time.perf_counter()
    run([*command, "--help"], threads=options.threads)
    return time.perf_counter() - began, {}


class Starts:
    """Runs of one step. Each cold one has its rows in another order, so that no cache by content can know them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows = sources.read("sst2", "train")
        self.dev = sources.write_jsonl(sources.read("sst2", "dev")[:32], "startup/dev.jsonl")
        self.cache = WORK / "startup" / "cache"

    def cold(self, number: int) -> tuple[float, dict]:
        shutil.rmtree(self.cache, ignore_errors=True)
        return self.first_step(self.train_file(number))

    def cached(self, number: int) -> tuple[float, dict]:
        return self.first_step(self.train_file(self.options.rounds - 1))  # what the last cold run has left

    def train_file(self, number: int) -> Path:
        return sources.write_jsonl(sources.sample(self.rows, self.options.rows, seed=number), "startup/train.jsonl")

    def first_step(self, train: Path) -> tuple[float, dict]:
        folder = WORK / "startup" / "run"
        shutil.rmtree(folder, ignore_errors=True)
        config = {
            "run": str(folder),
            "model": {"name": str(encoder_folder()), "max_length": 128},
            "data": {"train": str(train), "dev": str(self.dev)},
            "training": {"max_steps": 1, "threads": self.options.threads},
        }
        path = WORK / "startup" / "run.yaml"
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
        command = [sys.executable, "-m", "regraft.engine", "train", path]
        run(command, threads=self.options.threads, environment={"REGRAFT_CACHE": str(self.cache)})
        return start_seconds(folder / "metrics.jsonl"), {}

    def trainer(self, number: int) -> tuple[float, dict]:
        folder = WORK / "startup" / "trainer"
        shutil.rmtree(folder, ignore_errors=True)
        spec = {
            "model": encoder_folder(),
            "train": self.train_file(number),
            "max_length": 128,
            "seed": number,
            "threads": self.options.threads,
            "folder": folder,
            "warmup_steps": 1,
            "window_steps": 1,
            "arguments": {"max_steps": 2, "per_device_train_batch_size": 32, "use_cpu": True, "save_strategy": "no"},
            "started": time.time(),
        }
        found = turn(peer_python("trainer"), "peers/trainer_run.py", spec, threads=self.options.threads)
        return found["first_step_seconds"], {}


def start_seconds(path: Path) -> float:
    """Seconds from the start of the process to the first optimizer step, as the run itself wrote them down."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("kind") == "start":
            return float(record["seconds_to_first_step"])
    raise TurnFailed(f"{path.name}: no record of kind 'start'")


def targets(cases: Mapping[str, Any]) -> list[Target]:
    bounds = {HELP: 0.5, COLD: 15.0, CACHED: 5.0}
    return [Target(f"seconds, {case}", cases[case]["medians"][OURS], at_most=bound) for case, bound in bounds.items()]


if __name__ == "__main__":
    main()
