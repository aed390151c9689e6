"""What fine-tuned models score on real data sets, and on SST-2 whether Regraft's are as good as Trainer's.

Both sides train with the same settings and seeds, keep the epoch that is best on the dev rows, and are scored by
score.py alike. Takes hours, so it is made to be done in pieces: a figure that was measured with the same settings is
taken from bench/.data/quality/ or from the published result instead of being measured again, a run of Regraft that was
stopped goes on where it was, and what is published is all that was measured so far. `--restart` trains again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import machine
import sources
from environments import encoder_folder, our_versions, peer_python, versions
from harness import (
    OURS,
    RESULTS,
    WORK,
    Claim,
    Run,
    Target,
    TurnFailed,
    add_precision,
    arguments,
    in_one_precision,
    publish,
    published_with,
    turn,
)

CLAIM = Claim(
    "quality", "Fine-tuned MiniLM-L6: figures on real data sets, points of 100", "points", compare="difference"
)


@dataclass(frozen=True)
class Recipe:
    """How one data set is learned, and the figure that is reported: `metric` on `split`."""

    metric: str
    split: str
    learning_rate: float
    epochs: int
    max_length: int = 128
    batch_size: int = 32
    thresholds: str | None = None
    dev_fraction: float = 0.1
    at_least: float | None = None
    peer: bool = False
    ema: float | None = None
    layer_decay: float | None = None
    dropout: float | None = None


RECIPES = {
    "sst2": Recipe("accuracy", "dev", 5e-5, 1, at_least=90.5, peer=True),
    "banking77": Recipe("accuracy", "test", 1e-4, 15, dev_fraction=0.05, at_least=92.0),
    "stsb": Recipe("pearson", "dev", 1e-4, 3, at_least=87.0, ema=0.99, dropout=0.0),
    "cola": Recipe("matthews", "dev", 5e-5, 6),
    "rte": Recipe("accuracy", "dev", 5e-5, 6, max_length=256),
    "trec6": Recipe("accuracy", "test", 5e-5, 8, dev_fraction=0.05),
    "agnews": Recipe("accuracy", "test", 5e-5, 4, dev_fraction=0.05),
    "goemotions": Recipe("macro_f1", "test", 1e-4, 3, thresholds="tuned"),
}
# Settings that recipes did not have from the start: None is as if they were not there.
LATER = {"ema", "layer_decay", "dropout"}
PUBLISHED = RESULTS / "quality.json"
WEIGHT_DECAY, WARMUP = 0.01, 0.06
QUICK_ROWS = 300


def main() -> None:
    parser = arguments(__doc__, rounds=None)
    parser.add_argument("--only", default=",".join(RECIPES), help="data sets, with commas (%(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="with commas (%(default)s)")
    add_precision(parser)
    parser.add_argument("--restart", action="store_true", help="train again what was trained before")
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(",")]
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)}: not one of {', '.join(RECIPES)}")
    seeds = [int(seed) for seed in options.seeds.split(",")][: 1 if options.quick else None]
    before = machine.facts()
    for name in names:
        for seed in seeds:
            for who in contestants(name):
                found = measured(name, who, seed, options)
                print(f"{name} seed {seed}: {who} {found.value:.2f}", file=sys.stderr, flush=True)
    runs = everything_measured(seeds, options)
    settings = {run.case: {**asdict(RECIPES[run.case]), "precision": precision_of(run, options)} for run in runs}
    found = {"regraft": our_versions()}
    if any(run.who == "trainer" for run in runs):
        found["trainer"] = versions(peer_python("trainer"), ("torch", "transformers", "accelerate", "numpy"))
    publish(CLAIM, runs, options, versions=found, settings=settings, targets=targets, before=before)


def contestants(name: str) -> tuple[str, ...]:
    return (OURS, "trainer") if RECIPES[name].peer else (OURS,)


def everything_measured(seeds: list[int], options: argparse.Namespace) -> list[Run]:
    """What this and earlier commands measured with today's settings, data set by data set."""
    return [
        run for name in RECIPES for run in in_one_precision(lambda some, name=name: known(name, seeds, some), options)
    ]


def precision_of(run: Run, options: argparse.Namespace) -> str:
    return harness.precision_of(run, lambda some: work_folder(run.case, run.who, run.round, some).name, options)


def known(name: str, seeds: list[int], options: argparse.Namespace) -> list[Run]:
    """What was measured of a data set."""
    found = [earlier(name, who, seed, options) for seed in sorted({0, 1, 2, *seeds}) for who in contestants(name)]
    return [run for run in found if run is not None]


def earlier(name: str, who: str, seed: int, options: argparse.Namespace) -> Run | None:
    """A figure measured before with the same settings: from its work file, or from the published result."""
    folder = work_folder(name, who, seed, options)
    kept = folder.with_suffix(".json")
    if kept.is_file():
        details = json.loads(kept.read_text(encoding="utf-8"))
        return Run(name, who, seed, details["score"][RECIPES[name].metric], details | {"settings": folder.name})
    if options.restart:
        return None
    return next((run for run in published_with(options.out or PUBLISHED, folder.name) if run.case == name), None)


def work_folder(name: str, who: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a model is trained; its figures are kept beside it as .json. Other settings give another place."""
    what = {
        **{key: value for key, value in asdict(RECIPES[name]).items() if key not in LATER or value is not None},
        "shared": [WEIGHT_DECAY, WARMUP],
        "precision": options.precision,
        "rows": QUICK_ROWS if options.quick else None,
    } | ({} if who == OURS else {"sampling": "group_by_length"})
    fingerprint = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    return WORK / "quality" / f"{name}-{who}-{seed}-{fingerprint}"


def measured(name: str, who: str, seed: int, options: argparse.Namespace) -> Run:
    """A trained and scored model: out of the work file, or made now."""
    recipe = RECIPES[name]
    folder = work_folder(name, who, seed, options)
    kept = folder.with_suffix(".json")
    if options.restart:
        shutil.rmtree(folder, ignore_errors=True)
        kept.unlink(missing_ok=True)
    if earlier(name, who, seed, options) is None:
        learn = regraft if who == OURS else trainer
        model, details = learn(name, recipe, seed, folder, options)
        rows = sources.read(name, recipe.split)[: QUICK_ROWS if options.quick else None]
        spec = {"folder": model, "rows": sources.write_jsonl(rows, f"quality/{name}-{recipe.split}.jsonl")}
        spec |= {"max_length": recipe.max_length, "threads": options.threads}
        score = turn(sys.executable, "score.py", spec, threads=options.threads)
        commit = {"commit": our_versions().get("commit", "")} if who == OURS else {}
        beside = kept.with_suffix(".tmp")
        beside.write_text(json.dumps({"score": score, **details, **commit}, indent=1), encoding="utf-8")
        beside.replace(kept)
        shutil.rmtree(folder, ignore_errors=True)
    found = earlier(name, who, seed, options)
    if found is None:
        raise TurnFailed(f"{kept}: was written and is gone")
    return found


def regraft(
    name: str, recipe: Recipe, seed: int, folder: Path, options: argparse.Namespace
) -> tuple[Path, dict[str, Any]]:
    """Train with Regraft; the best model's folder and what the run said of itself."""
    source = sources.SOURCES[name]
    task: dict[str, Any] = {"type": source.task, "metric": recipe.metric}
    if source.labels_file:
        task["labels"] = source.labels()
    if recipe.thresholds:
        task["thresholds"] = recipe.thresholds
    data = sources.data_section(name, limit=QUICK_ROWS if options.quick else None)
    data.pop("test", None)  # scored from outside, once
    if options.quick:
        data.pop("dev", None)  # thousands of rows in some: a tenth of the few training rows instead
    config = {
        "run": str(folder / "run"),
        "model": {"name": str(encoder_folder()), "max_length": recipe.max_length, "dropout": recipe.dropout},
        "task": task,
        "data": {**data, "dev_fraction": recipe.dev_fraction},
        "training": {
            "learning_rate": recipe.learning_rate,
            "batch_size": recipe.batch_size,
            "epochs": recipe.epochs,
            "weight_decay": WEIGHT_DECAY,
            "warmup": WARMUP,
            "seed": seed,
            "ema": recipe.ema,
            "layer_decay": recipe.layer_decay or 1.0,
            "precision": options.precision,
            "threads": options.threads,
        },
    }
    found = turn(sys.executable, "regraft_train.py", {"config": config, "folder": folder}, threads=options.threads)
    kept = {"seconds": found["run_seconds"], "best_step": found["best_step"], "own_figures": found["metrics"]}
    return folder / "run" / "best", kept


def trainer(
    name: str, recipe: Recipe, seed: int, folder: Path, options: argparse.Namespace
) -> tuple[Path, dict[str, Any]]:
    """Train with transformers' Trainer; the best epoch's folder and its dev accuracy by epoch."""
    files = {}
    for split in ("train", "dev"):
        rows = sources.read(name, split)[: QUICK_ROWS if options.quick else None]
        files[split] = sources.write_jsonl(rows, f"quality/{name}-trainer-{split}.jsonl")
    shutil.rmtree(folder, ignore_errors=True)
    spec = {
        **files,
        "model": encoder_folder(),
        "max_length": recipe.max_length,
        "seed": seed,
        "threads": options.threads,
        "folder": folder / "checkpoints",
        "save": folder / "best",
        "arguments": {
            "learning_rate": recipe.learning_rate,
            "weight_decay": WEIGHT_DECAY,
            "warmup_steps": WARMUP,  # below 1: a share of all steps
            "num_train_epochs": recipe.epochs,
            "per_device_train_batch_size": recipe.batch_size,
            "per_device_eval_batch_size": 32,
            "use_cpu": True,
            "bf16": options.precision == "bf16",
            "train_sampling_strategy": "group_by_length",  # less padding: the same learning in less time
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
        },
    }
    found = turn(peer_python("trainer"), "peers/trainer_run.py", spec, threads=options.threads)
    if not found["dev_accuracy_by_epoch"]:
        raise TurnFailed("trainer: evaluated nothing")
    return folder / "best", {key: found[key] for key in ("seconds", "dev_accuracy_by_epoch")}


def targets(cases: Mapping[str, Any]) -> list[Target]:
    found = []
    for name, summary in cases.items():
        recipe = RECIPES[name]
        if recipe.at_least is not None:
            what = f"{name}, {recipe.metric} on {recipe.split}, median of seeds"
            found.append(Target(what, summary["medians"][OURS], at_least=recipe.at_least))
        if recipe.peer:
            mean = {
                who: statistics.mean(run["value"] for run in summary["runs"] if run["who"] == who)
                for who in summary["medians"]
            }
            if mean.keys() >= {OURS, "trainer"}:  # made in pieces: one may be all there is so far
                what = f"{name}, mean over seeds, regraft minus trainer"
                found.append(Target(what, mean[OURS] - mean["trainer"], at_least=-0.3))
    return found


if __name__ == "__main__":
    main()
