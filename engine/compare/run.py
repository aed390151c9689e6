"""`regraft compare`: every way in a process of its own, the learning curve first, then more seeds, until time is up."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regraft.engine.compare.results import Result
from regraft.engine.compare.ways import Way, available
from regraft.engine.compare.workers import Ended, Workers
from regraft.engine.config import RunConfig
from regraft.engine.figures import figure

SHARES = (0.01, 0.05, 0.25, 1.0)
Say = Callable[[str], None]


def compare(
    config: RunConfig,
    names: tuple[str, ...],
    *,
    budget: float,
    seeds: int = 3,
    folds: int = 0,
    shares: Sequence[float] = SHARES,
    say: Say = lambda line: None,
    measured: Callable[[list[Result]], object] = lambda results: None,
) -> list[Result]:
    """Measure the ways within about `budget` seconds. `folds`: 0, or k parts that are held out in turn, as the seeds;
    `measured`: told all results after each point that is finished."""
    deadline = time.time() + budget
    ways = available(config, names)
    results = [Result(w.name, w.title, why=why, folds=folds > 0, seeded=w.seeded) for w, why in ways]
    todo = [(way, result) for (way, why), result in zip(ways, results, strict=True) if not why]
    for way, why in ways:
        if why:
            say(f"{way.title}: left out: {why}")

    def take(result: Result, way: Way, record: dict[str, Any]) -> None:
        _take(result, way, record, say)
        if "metrics" in record:
            measured(results)

    # What a worker that is being killed still writes must not hide why it is killed.
    with (
        tempfile.TemporaryDirectory(prefix="regraft-compare-", ignore_cleanup_errors=True) as scratch,
        Workers(Path(scratch)) as workers,
    ):
        every = {"config": config.model_dump(mode="json", exclude_unset=True), "folder": scratch, "folds": folds}

        def work(way: Way, result: Result, points: list[tuple[float, int]], until: float) -> None:
            if points:
                job = every | {"way": way.name, "points": points, "deadline": until, "last": _last(result)}
                _end(result, way, workers.do(job, until, lambda record: take(result, way, record)), say)

        for number, (way, result) in enumerate(todo):
            own = time.time() + part_of_time(deadline - time.time(), len(todo) - number)
            curve = [1.0] if not way.labels or way.name == "majority" else list(shares)
            work(way, result, [(share, 0) for share in curve], own)
        again = [(way, r) for way, r in todo if r.complete and (way.seeded or folds)]
        for way, result in sorted(again, key=lambda pair: pair[1].median("wall_seconds")):
            work(way, result, [(1.0, seed) for seed in range(1, folds or seeds)], deadline)
    return results


def part_of_time(left: float, ways: int) -> float:
    """Seconds that the next of `ways` may take of those that are left: half as much again as its share, so that those behind
    it have time too. What it leaves is theirs, and in the end goes to more seeds."""
    return left if ways == 1 else left * min(0.5, 1.5 / ways)


def _last(result: Result) -> list[float] | None:
    """What a worker is told of the points so far: share 1, and the least seconds, whole and of training alone."""
    full = [p for p in result.points if p["share"] == 1.0]
    return [1.0, *min((p["wall_seconds"], p["train_seconds"]) for p in full)] if full else None


def _end(result: Result, way: Way, ended: Ended, say: Say) -> None:
    if ended.late:
        say(f"{way.title}: stopped, the time was up")
        result.why = result.why or ("" if result.complete else "stopped: the budget was used up")
    elif ended.why:
        say(f"{way.title}: {ended.why}")
        result.why = result.why or ended.why


def _take(result: Result, way: Way, record: dict[str, Any], say: Say) -> None:
    if "metrics" in record:
        result.points.append(record)
        named = next(iter(record["metrics"].items()))
        say(
            f"{way.title}: {record['rows']:,} rows, seed {record['seed']}: {named[0]} {figure(named[1])}, "
            f"trained in {record['train_seconds']:.1f} s"
        )
    elif "error" in record:
        result.why = record["error"]
        say(f"{way.title}: {record['error']}")
    elif "needs" in record and record["share"] == 1.0 and not result.complete:
        needs = record["needs"]
        result.why = (
            f"on all rows it would take about {needs:.0f} s, more than was left" if needs else "no time was left"
        )
        say(f"{way.title}: {result.why}")
    elif "memory_mb" in record and not result.memory_mb:
        # Of its first process: what others imported in the meantime lies in those that are started later.
        result.memory_mb = record["memory_mb"]
