"""What the encoder tasks reach on real data: figures in points of 100, perplexity as it is.

Regraft learns from the files as they are published (`task_rows.py` cuts and joins some), keeps the epoch that is best on the
dev rows, and is judged on rows that training never saw. Takes most of a day, so it is made to be done in pieces, as
quality.py is: a figure that was measured with the same settings is taken from bench/.data/tasks/ or from the published
result, a run that was stopped goes on where it was, and what is published is all that was measured so far.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import machine
import multi
import sources
import task_rows
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
from task_cases import CASES, CHINESE, LEARNINGS, MINILM, ONE_SEED, Example, Learning

CLAIM = Claim(
    "tasks", "Encoder tasks: figures on real data sets, points of 100", "points or perplexity", compare="difference"
)
PUBLISHED = RESULTS / "tasks.json"
QUICK_ROWS, QUICK_STEPS = 60, 4


def main() -> None:
    parser = arguments(__doc__, rounds=None)
    known = [*CASES, multi.NAME]
    parser.add_argument("--only", default=",".join(known), help="cases, with commas (%(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="with commas (%(default)s)")
    add_precision(parser)
    parser.add_argument("--restart", action="store_true", help="train again what was trained before")
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)}: not one of {', '.join(known)}")
    seeds = [int(seed) for seed in options.seeds.split(",")][: 1 if options.quick else None]
    before = machine.facts()
    if multi.NAME in names:
        for seed in seeds:
            multi.measured(seed, options)
    wanted = dict.fromkeys(figure.of for name in names if name in CASES for figure in CASES[name].figures.values())
    if options.restart:
        for name in wanted:
            for seed in seeds:
                forget(name, seed, options)
    for seed in seeds:
        for name in wanted:
            if seed == 0 or name not in ONE_SEED:
                measure(name, seed, options)
    runs = everything_measured(seeds, options) + multi.everything_measured(seeds, options, options.out or PUBLISHED)
    found = {**published_versions(options), OURS: our_versions()}
    if any(isinstance(LEARNINGS[name], Example) for name in wanted):
        found["transformers"] = versions(peer_python("trainer"), ("torch", "transformers", "accelerate", "numpy"))
    settings = {run.case: described(run, options) if run.case in CASES else multi.settings()[run.case] for run in runs}
    publish(CLAIM, runs, options, versions=found, settings=settings, targets=targets, before=before)


def published_versions(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """What figures of earlier commands were measured with."""
    published = options.out or PUBLISHED
    return json.loads(published.read_text(encoding="utf-8"))["versions"] if published.is_file() else {}


def targets(cases: Mapping[str, Any]) -> list[Target]:
    """The figures that were promised: of medians over seeds."""
    found = multi.targets(cases)
    for name, summary in cases.items():
        if name not in CASES:
            continue
        case, medians = CASES[name], summary["medians"]
        metric = case.figures[OURS].metric
        if OURS in medians and case.at_least is not None:
            found.append(Target(f"{name}, {metric}", medians[OURS], at_least=case.at_least))
        for other, margin in case.beats.items():
            if OURS in medians and other in medians:
                gain = medians[OURS] - medians[other]
                what = f"{name}, {metric}, better than {other} by"
                found.append(Target(what, gain if case.points else -gain, at_least=margin))
    return found


def everything_measured(seeds: list[int], options: argparse.Namespace) -> list[Run]:
    """Every figure that this and earlier commands measured with today's settings."""
    return [
        run for name in CASES for run in in_one_precision(lambda some, name=name: measured(name, seeds, some), options)
    ]


def measured(name: str, seeds: list[int], options: argparse.Namespace) -> list[Run]:
    """What is known of a case."""
    case, runs = CASES[name], []
    for seed in sorted({0, 1, 2, *seeds}):
        for who, figure in case.figures.items():
            details = earlier(figure.of, seed, options)
            if details is not None:
                value = details["metrics"][figure.split][figure.metric] * (100 if case.points else 1)
                runs.append(Run(name, who, seed, round(value, 4), details))
    return runs


# ---- learning -----------------------------------------------------------------------------------------------------


def work_name(name: str, seed: int, options: argparse.Namespace) -> str:
    """Where what a learning found is kept: other settings, of it or of what it starts from, give another name."""
    mark = hashlib.sha256(json.dumps(decisive(name, options), sort_keys=True).encode()).hexdigest()[:16]
    return f"{name}-{seed}-{mark}"


def decisive(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that decides what is learned, but the seed. Paths, threads and the like do not."""
    learning = LEARNINGS[name]
    if isinstance(learning, Example):
        return {"example": learning.settings, "of": decisive(learning.like, options)}
    data = learning.data if isinstance(learning.data, dict) else learning.data.__name__
    found = {"task": learning.task, "data": data, "training": learning.training, "model": learning.model}
    found |= {"columns": learning.columns, "more": learning.more, "encoder": learning.encoder}
    if learning.encoder in LEARNINGS:
        found["encoder"] = decisive(learning.encoder, options)
    return found | {"precision": options.precision, "quick": options.quick}


def described(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Settings of a figure's case, for the result's readers."""
    figures = CASES[run.case].figures
    learnings = {}
    for figure in figures.values():
        found = LEARNINGS[figure.of]
        values = dict(vars(found))
        if callable(values.get("data")):
            values["data"] = f"task_rows.{values['data'].__name__}"
        learnings[figure.of] = values
    shown = {"metric": figures[OURS].metric, "split": figures[OURS].split, "precision": precision_of(run, options)}
    return shown | {"learned": learnings}


def precision_of(run: Run, options: argparse.Namespace) -> str:
    learned = CASES[run.case].figures[run.who].of
    return harness.precision_of(run, lambda some: work_name(learned, run.round, some), options)


def earlier(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """What a learning found: from its work file, or from the published result."""
    work = work_name(name, seed, options)
    kept = WORK / "tasks" / f"{work}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    if options.restart:
        return None
    return next((run.details for run in published_with(options.out or PUBLISHED, work)), None)


def forget(name: str, seed: int, options: argparse.Namespace) -> None:
    work = WORK / "tasks" / work_name(name, seed, options)
    shutil.rmtree(work, ignore_errors=True)
    work.with_name(f"{work.name}.json").unlink(missing_ok=True)


def measure(name: str, seed: int, options: argparse.Namespace) -> None:
    """Learn, unless that was done before, and keep what was found."""
    if earlier(name, seed, options) is None:
        learn(name, seed, options)
    found = earlier(name, seed, options)
    if found is None:
        raise TurnFailed(f"{name}: what was found is gone")
    told = ", ".join(
        f"{split} {key} {value:.4f}" for split, some in found["metrics"].items() for key, value in some.items()
    )
    print(f"{name} seed {seed}: {told}", file=sys.stderr, flush=True)


def learn(name: str, seed: int, options: argparse.Namespace) -> None:
    work = work_name(name, seed, options)
    folder = WORK / "tasks" / work
    learning = LEARNINGS[name]
    train = follow_example if isinstance(learning, Example) else regraft
    found = train(name, seed, folder, options) | {"settings": work}
    beside = folder.with_name(f"{work}.tmp")
    beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
    beside.replace(folder.with_name(f"{work}.json"))
    starts = {some.encoder for some in LEARNINGS.values() if isinstance(some, Learning)}
    if name in starts:
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def regraft(name: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    config = configuration(name, seed, options) | {"run": str(folder / "run")}
    spec = {"config": config, "folder": folder}
    try:
        found = turn(sys.executable, "regraft_train.py", spec, threads=options.threads)
    except TurnFailed as error:
        if "another configuration" not in str(error):
            raise
        shutil.rmtree(folder / "run")  # stopped before the configuration had the keys it has now
        found = turn(sys.executable, "regraft_train.py", spec, threads=options.threads)
    commit = our_versions().get("commit", "")
    history = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [{"step": r["step"], **r["metrics"]} for r in history if r["kind"] == "eval" and r["split"] == "dev"]
    of = {"commit": commit, "precision": options.precision, "cpu": machine.facts()["cpu"]}
    return {"metrics": found["metrics"], "seconds": found["run_seconds"], "by_evaluation": steps, **of}


def configuration(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The run's configuration, but for its folder."""
    learning = LEARNINGS[name]
    assert isinstance(learning, Learning)
    training = {**learning.training, "seed": seed, "precision": options.precision, "threads": options.threads}
    if options.quick:
        training |= {"epochs": 1, "max_steps": QUICK_STEPS}
    return {
        "model": {"name": starting_point(learning.encoder, options), **learning.model},
        "task": learning.task,
        "data": {**files(learning, options), **learning.columns},
        "training": training,
        **learning.more,
    }


def starting_point(encoder: str, options: argparse.Namespace) -> str:
    """The encoder's folder; a learning's run folder is trained first where it is not here."""
    if encoder == MINILM:
        return str(encoder_folder())
    if encoder == CHINESE:
        return task_rows.chinese_vocabulary()
    folder = WORK / "tasks" / work_name(encoder, 0, options) / "run"
    if not (folder / "best" / "config.json").is_file():
        learn(encoder, 0, options)
    return str(folder)


def files(learning: Learning, options: argparse.Namespace) -> dict[str, Any]:
    """The rows' files; a few rows of each for --quick."""
    if callable(learning.data):
        return learning.data(options.quick)
    root = sources.data_root()
    found: dict[str, Any] = {split: str(root / path) for split, path in learning.data.items()}
    if options.quick:
        found = {split: short(path) for split, path in found.items()} | {"limit": QUICK_ROWS}
    return found


def short(path: str) -> str:
    """The first sentences of a file of sentences with blank lines between."""
    file = Path(path)
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as content:
        text = content.read()
    target = WORK / "tasks" / f"short-{file.name.removesuffix('.gz')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n\n".join(text.split("\n\n")[:QUICK_ROWS]) + "\n\n", encoding="utf-8")
    return str(target)


def follow_example(name: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """transformers' example for answers on the same rows, judged by the same rules."""
    example = LEARNINGS[name]
    assert isinstance(example, Example)
    learning = LEARNINGS[example.like]
    assert isinstance(learning, Learning)
    rows, training = files(learning, options), learning.training
    spec = {
        "kind": "answering",
        "model": starting_point(learning.encoder, options),
        "train": rows["train"],
        "test": rows["test"],
        "answers": folder / "answers.json",
        "max_length": learning.model["max_length"],
        "seed": seed,
        "threads": options.threads,
        "folder": folder / "checkpoints",
        **example.settings,
        "arguments": {
            "learning_rate": training["learning_rate"],
            "per_device_train_batch_size": training["batch_size"],
            "per_device_eval_batch_size": 32,
            "num_train_epochs": 1 if options.quick else training["epochs"],
            "max_steps": QUICK_STEPS if options.quick else -1,
            "weight_decay": 0.01,  # Regraft's defaults, as is the share of steps below
            "warmup_steps": 0.06,
            "use_cpu": True,
            "bf16": options.precision == "bf16",
            "train_sampling_strategy": "group_by_length",  # less padding: the same learning in less time
            "save_strategy": "no",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    found = turn(peer_python("trainer"), "peers/tasks_run.py", spec, threads=options.threads)
    judged = {"answers": folder / "answers.json", "rows": rows["test"]}
    of = {"precision": options.precision, "cpu": machine.facts()["cpu"]}
    return {"metrics": {"test": turn(sys.executable, "score_answers.py", judged, threads=options.threads)}} | found | of


if __name__ == "__main__":
    main()
