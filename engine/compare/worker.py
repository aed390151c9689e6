"""One way in a process of its own, so that its memory is its own: every seed and share of the rows, one JSON line each.

    python -m regraft.engine.compare.worker PARENT

Lines go to standard output: {"share", "seed", "wall_seconds", "rows", "held", "metrics", "train_seconds", "prepare_seconds" (until
the first step), "steps", "step_seconds" (median), "latency_ms", "mb"}, or {"share", "seed", "needs"} for what would not be
done in time; then {"memory_mb"}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from regraft.engine.compare.rows import fold_of, part_of, splits_of, write_rows
from regraft.engine.compare.ways import FEW_SHOT_ROWS, WAYS, Way, configured, rows_learned
from regraft.engine.config import RunConfig, parse_config
from regraft.engine.data.rows import Rows
from regraft.engine.errors import RegraftError
from regraft.engine.heads.settings import BAG_METHODS
from regraft.engine.machine import end_with
from regraft.engine.tasks import Tagging, Task

LATENCY_TEXTS = 30
FITTED = ("sklearn.linear_model", "torch")  # what every way imports, whether it trains or is solved
TRAINED = (*FITTED, "transformers.modeling_utils")  # brings accelerate with it


def main(parent: int) -> int:
    """Do the jobs whose files are named on standard input, a line each, for the process `parent`; without it this one ends.

    On Linux each is done by a fork, which prints {"group"}, then its lines; {"ended"} follows, its exit status.
    Elsewhere this process does one job itself and ends.
    """
    end_with(parent)
    for line in sys.stdin:
        job = json.loads(Path(line.rstrip("\n")).read_text(encoding="utf-8"))
        if not sys.platform.startswith("linux"):
            return work(job)
        make_ready(job["way"])
        origin = os.getpid()
        child = os.fork()
        if child == 0:
            end_with(origin)
            os.setsid()
            _say({"group": os.getpid()})
            _map_files_of(origin)
            return work(job)
        _, status = os.waitpid(child, 0)
        _say({"ended": os.waitstatus_to_exitcode(status)})
    return 0


def make_ready(name: str) -> None:
    """Import what the way takes, and nothing else: a fork holds what its origin holds, and its memory is a figure."""
    method = next(way for way in WAYS if way.name == name).settings.get("method", "full")
    for module in () if name == "majority" else FITTED if method in BAG_METHODS else TRAINED:
        importlib.import_module(module)


def work(job: dict[str, Any]) -> int:
    """Do a job: {"config", "way", "folder", "folds", "deadline", "known", "stored", "points": [[share, seed], ...]};
    `deadline`: seconds since 1970; `known`: the points that were measured before; `stored`: another way has left the features
    of all rows."""
    base = parse_config(job["config"], source="compare")
    way = next(w for w in WAYS if w.name == job["way"])
    task, splits = splits_of(base)
    folder = Path(job["folder"])
    known = list(job["known"])

    def at_hand(share: float) -> int:
        rows = max(1, round(share * len(splits["train"][0])))
        return min(rows, FEW_SHOT_ROWS * len(task.labels)) if way.name == "contrastive" else rows

    def learned(share: float) -> float:
        return rows_learned(base, way, at_hand(share))

    keeps = way.features is not None and not job["stored"]
    whole = 1.0 in (*(share for share, _ in job["points"]), *(point["share"] for point in known))
    for share, seed in job["points"]:
        if share < 1.0 and whole and at_hand(share) == at_hand(1.0):
            continue  # a way for few rows has them all by now: the same again says nothing
        needs = seconds_of(share, known, learned, keeps)
        if time.time() + needs > job["deadline"]:
            _say({"share": share, "seed": seed, "needs": needs})
            continue
        started = time.perf_counter()
        try:
            here = held_out(splits, job["folds"], seed) if job["folds"] else splits
            found = point(base, way, task, here, share, seed, folder)
        except RegraftError as error:
            found = {"error": str(error)}
        wall = time.perf_counter() - started
        told = {"share": share, "seed": seed, "wall_seconds": wall, **found}
        known += [told] if "metrics" in found else []
        _say(told)
    _say({"memory_mb": _memory() / 1e6})
    return 0


def seconds_of(share: float, known: list[dict[str, Any]], learned: Callable[[float], float], keeps: bool) -> float:
    """How long a point will take by those that are known, 0 where none is. `learned`: the rows that training steps through,
    by share of the rows; `keeps`: whether features of new rows are computed before it.

    Steps grow with what they step through (a model that is solved has one step); starting, evaluating and timing do not.
    """
    if not known:
        return 0.0
    like = min(known, key=lambda p: (p["share"] != share, -p["share"], p["wall_seconds"]))
    stepping = like["steps"] * like["step_seconds"] * (learned(share) / learned(like["share"]) - 1)
    prepared = min(p["prepare_seconds"] for p in known)
    if keeps and share > like["share"]:
        new = like["rows"] * (share / like["share"] - 1)
        prepared += like["prepare_seconds"] * new / (like["rows"] + like["held"])
    return like["wall_seconds"] - like["prepare_seconds"] + prepared + stepping


def held_out(splits: dict, folds: int, fold: int) -> dict:
    """The splits with one part of the training rows held out as test rows."""
    rows, targets = splits["train"]
    out = fold_of(targets, folds) == fold
    kept, held = np.flatnonzero(~out), np.flatnonzero(out)
    parts = {"train": (rows.take(kept), targets[kept]), "test": (rows.take(held, split="test"), targets[held])}
    return {**splits, **parts}


def point(base: RunConfig, way: Way, task: Task, splits: dict, share: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train on a share of the rows and measure on test rows, or dev where there are none."""
    train, targets = splits["train"]
    kept = part_of(targets, share, seed)
    if way.name == "contrastive":
        kept = _at_most(kept, targets, FEW_SHOT_ROWS, seed)
    rows = train.take(kept)
    held, held_targets = splits.get("test") or splits["dev"]
    if way.name == "majority":
        return _majority(task, rows, targets[kept], held, held_targets)
    here = folder / way.name
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    wanted = within_depth(configured(base, way, seed=seed, run=str(here / "run"), rows=len(rows)))
    config = _on_files(wanted, task, rows, splits, here)
    from regraft.engine.training.run import train as train_run

    steps: list[tuple[float, float]] = []  # when each ended, and how long it took
    began = time.perf_counter()
    result = train_run(config, quiet=True, on_step=lambda step: steps.append((time.perf_counter(), step.seconds)))
    metrics = result.metrics["test" if "test" in splits else "dev"]
    latency = _latency(result.folder, held)
    size = sum(f.stat().st_size for f in (result.folder / "best").rglob("*") if f.is_file()) / 1e6
    found = {
        "rows": len(rows),
        "held": len(held),
        "metrics": metrics,
        "train_seconds": result.seconds,
        "prepare_seconds": steps[0][0] - steps[0][1] - began,
        "steps": len(steps),
        "step_seconds": statistics.median(seconds for _, seconds in steps),
        "latency_ms": latency,
        "mb": size,
    }
    shutil.rmtree(here, ignore_errors=True)
    return found


def within_depth(config: RunConfig) -> RunConfig:
    """The last four layers, or as many as the encoder has: a way is compared on whatever encoder the user has."""
    from regraft.engine.features.spec import depth_and_width, model_folder

    if config.method != "frozen" or config.features.layers != "last4":
        return config
    if depth_and_width(model_folder(config))[0] >= 3:
        return config
    return config.model_copy(update={"features": config.features.model_copy(update={"layers": "all"})})


def _on_files(config: RunConfig, task: Task, rows: Rows, splits: dict, here: Path) -> RunConfig:
    """The same run over files of just these rows, with the labels of the whole data."""
    columns = {k: str(v) for k, v in config.data.columns.model_dump().items() if v is not None}
    write_rows(here / "train.jsonl", rows, columns, task)
    names = {"train": str(here / "train.jsonl")}
    for name in ("dev", "test"):
        if name in splits:
            write_rows(here / f"{name}.jsonl", splits[name][0], columns, task)
            names[name] = str(here / f"{name}.jsonl")
    values = config.model_dump(mode="json")
    values["data"] |= {
        **names,
        "columns": columns,
        "format": "auto",
        "limit": None,
        "encoding": "utf-8",
        "header": True,
    }
    if isinstance(task, Tagging):
        values["task"] |= {"labels": list(task.kinds), "tags": task.tags}
        values["data"]["tag_scheme"] = task.tags
    elif task.type != "regression":
        values["task"]["labels"] = list(task.labels)
    return parse_config(values, source="compare")


def _majority(task: Task, rows: Rows, targets: np.ndarray, held: Rows, held_targets: np.ndarray) -> dict[str, Any]:
    from regraft.engine.compare.majority import fit_majority

    fitted = fit_majority(rows, targets, task)
    metrics = task.metrics()
    metrics.update(fitted.model(held), held_targets)
    times = []
    for i in range(min(LATENCY_TEXTS, len(held))):
        one = held.take(np.array([i]))
        began = time.perf_counter()
        fitted.model(one)
        times.append(time.perf_counter() - began)
    return {
        "rows": len(rows),
        "held": len(held),
        "metrics": metrics.compute(),
        "train_seconds": fitted.seconds,
        "prepare_seconds": 0.0,
        "steps": 1,
        "step_seconds": fitted.seconds,
        "latency_ms": 1000 * statistics.median(times),
        "mb": fitted.bytes / 1e6,
    }


def _latency(folder: Path, held: Rows) -> float:
    """Median milliseconds of one text at a time through the trained model, tokenising included."""
    from regraft.engine.predict import predict
    from regraft.engine.trained import load_trained

    trained = load_trained(folder)
    times = []
    for i in range(min(LATENCY_TEXTS, len(held)) + 3):
        i %= len(held)
        one = [(held.texts[i], None if held.pairs is None else held.pairs[i])]
        began = time.perf_counter()
        list(predict(trained, one))
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[3:] or times)


def _at_most(rows: np.ndarray, targets: np.ndarray, most: int, seed: int) -> np.ndarray:
    draw = np.random.Generator(np.random.Philox(key=[seed, 78]))
    parts = [draw.permutation(rows[targets[rows] == label])[:most] for label in np.unique(targets[rows])]
    return np.sort(np.concatenate(parts))


def _memory() -> float:
    """Most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _map_files_of(origin: int) -> None:
    """Map the pages of libraries that the origin has mapped: a fork starts without them, and a process that imported the same
    by itself would hold them. Where the system does not tell which, nothing is done."""
    page = resource.getpagesize()
    with (
        contextlib.suppress(OSError),
        Path(f"/proc/{origin}/maps").open() as areas,
        Path(f"/proc/{origin}/pagemap").open("rb") as pages,
        Path("/proc/self/mem").open("rb", buffering=0) as memory,
    ):
        for area in areas:
            span, rights, _, _, inode, *_ = area.split()
            if inode == "0" or not rights.startswith("r"):
                continue
            first, end = (int(at, 16) // page for at in span.split("-"))
            pages.seek(8 * first)
            there = np.frombuffer(pages.read(8 * (end - first)), np.uint64) >> np.uint64(63)  # proc_pid_pagemap(5)
            for number in first + np.flatnonzero(there):
                memory.seek(int(number) * page)
                memory.read(1)


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
