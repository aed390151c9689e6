"""Four GLUE tasks on one encoder, each beside its own run: the case `multi` of tasks.py.

A task alone is trained as quality.py trains it, with the settings that suit it best; what was measured there is not
measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import quality
import sources
from environments import encoder_folder
from harness import OURS, WORK, Run, Target, in_one_precision, published_with, turn

NAME = "multi"
ALONE = "alone"
TASKS = {"sst2": "accuracy", "cola": "matthews", "rte": "accuracy", "stsb": "pearson"}
WITHIN = 1.0  # points
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "batch_size": 32,
    "epochs": 4,
    "ema": 0.999,
    "evaluate_every": 650,
    "weight_decay": quality.WEIGHT_DECAY,
    "warmup": quality.WARMUP,
}
# SST-2 has most of the steps, RTE is learned by heart early: both would pull the encoder away from the others.
WEIGHTS = {"sst2": 0.6, "cola": 2.0, "rte": 0.3, "stsb": 1.6}
SAMPLING = "sqrt"
MAX_LENGTH, DROPOUT = 256, 0.0


def measured(seed: int, options: argparse.Namespace) -> list[Run]:
    """Each task together with the others, and alone."""
    options = _settled(options)
    config = configuration(seed, options)
    folder = WORK / "tasks" / _mark(seed, options)
    if options.restart:
        shutil.rmtree(folder, ignore_errors=True)
    kept = folder / "found.json"
    if not kept.is_file():
        spec = {"config": {**config, "run": str(folder / "run")}, "folder": folder}
        found = turn(sys.executable, "regraft_train.py", spec, threads=options.threads)
        kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
    together = json.loads(kept.read_text(encoding="utf-8"))
    runs = []
    for name, metric in TASKS.items():
        value = 100 * together["metrics"]["dev"][f"{name}/{metric}"]
        details = {"seconds": together["run_seconds"], "settings": folder.name}
        runs.append(Run(f"{NAME}-{name}", OURS, seed, value, details))
        alone = quality.measured(name, OURS, seed, options)
        runs.append(Run(f"{NAME}-{name}", ALONE, seed, alone.value, {**alone.details, "settings": folder.name}))
    for run in runs:
        print(f"{run.case} seed {seed}: {run.who} {run.value:.2f}", file=sys.stderr, flush=True)
    return runs


def everything_measured(seeds: list[int], options: argparse.Namespace, published: Path) -> list[Run]:
    """What this and earlier commands measured with today's settings."""
    return in_one_precision(lambda some: _known(seeds, _settled(some), published), options)


def _known(seeds: list[int], options: argparse.Namespace, published: Path) -> list[Run]:
    runs: list[Run] = []
    for seed in sorted({0, 1, 2, *seeds}):
        mark = _mark(seed, options)
        alone = all(quality.earlier(name, OURS, seed, options) for name in TASKS)  # else they would be trained now
        if alone and (WORK / "tasks" / mark / "found.json").is_file():
            runs += measured(seed, options)
        else:
            runs += published_with(published, mark)
    return runs


def _settled(options: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**vars(options) | {"out": None})


def _mark(seed: int, options: argparse.Namespace) -> str:
    # What decides the figures, and no paths: another checkout of the same settings is to know what this one measured.
    what = [settings(), seed, options.precision, quality.QUICK_ROWS if options.quick else None]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def configuration(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    tasks = {}
    for name, metric in TASKS.items():
        data = sources.data_section(name, limit=quality.QUICK_ROWS if options.quick else None)
        data.pop("test", None)
        if options.quick:
            data.pop("dev", None)
        task = {"type": sources.SOURCES[name].task, "metric": metric, "weight": WEIGHTS[name]}
        tasks[name] = {**task, "data": data}
    training = SETTINGS | {"seed": seed, "threads": options.threads, "precision": options.precision}
    return {
        "model": {"name": str(encoder_folder()), "max_length": MAX_LENGTH, "dropout": DROPOUT},
        "tasks": tasks,
        "mixing": {"sampling": SAMPLING},
        "training": training | ({"epochs": 1} if options.quick else {}),
    }


def settings() -> dict[str, Any]:
    """By case, for the published result."""
    shared = {**SETTINGS, "sampling": SAMPLING, "max_length": MAX_LENGTH, "dropout": DROPOUT, "split": "dev"}
    return {f"{NAME}-{name}": {**shared, "weight": WEIGHTS[name], "metric": metric} for name, metric in TASKS.items()}


def targets(cases: dict[str, Any]) -> list[Target]:
    """Each task together with the others within a point of itself alone."""
    found = []
    for name, metric in TASKS.items():
        case = cases.get(f"{NAME}-{name}")
        if case is not None:
            gap = case["medians"][OURS] - case["medians"][ALONE]
            found.append(Target(f"{name}, {metric} together less alone, median of seeds", gap, at_least=-WITHIN))
    return found
