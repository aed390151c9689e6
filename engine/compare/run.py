"""`regraft compare`: every way in processes of its own; all rows first, then the learning curve, then more seeds, until time
is up."""

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
PATIENCE = 1.5  # of a turn: then a point that is under way is stopped
Say = Callable[[str], None]
Turn = tuple[Way, Result]
Points = list[tuple[float, int]]  # share of the rows, seed


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
    """Measure the ways within `budget` seconds, and 5 more for a point that is late. `folds`: 0, or k parts that are held out
    in turn, as the seeds; `measured`: told all results after each point that is finished."""
    deadline = time.time() + budget
    ways = available(config, names)
    results = [Result(w.name, w.title, why=why, folds=folds > 0, seeded=w.seeded) for w, why in ways]
    todo = [(way, result) for (way, why), result in zip(ways, results, strict=True) if not why]
    for way, why in ways:
        if why:
            say(f"{way.title}: left out: {why}")
    least, between = min(shares), sorted({*shares} - {min(shares), 1.0}, reverse=True)
    # What a worker that is being killed still writes must not hide why it is killed.
    with (
        tempfile.TemporaryDirectory(prefix="regraft-compare-", ignore_cleanup_errors=True) as scratch,
        Workers(Path(scratch)) as workers,
    ):
        job = {"config": config.model_dump(mode="json", exclude_unset=True), "folder": scratch, "folds": folds}
        schedule = _Schedule(workers, job, todo, deadline, say, lambda: measured(results))
        # The least share tells what all rows will take.
        schedule.in_turns(todo, lambda way: [(share, 0) for share in sorted({least, 1.0} if way.curve else {1.0})])
        schedule.those_that_wait()
        curves = [(way, result) for way, result in todo if way.curve and result.points]
        schedule.in_turns(curves, lambda way: [(share, 0) for share in between])
        again = [(way, r) for way, r in todo if r.complete and (way.seeded or folds)]
        for way, result in sorted(again, key=lambda pair: pair[1].median("wall_seconds")):
            schedule.measure(way, result, [(1.0, seed) for seed in range(1, folds or seeds)], schedule.left)
    return results


class _Schedule:
    """Who has how much of what is left of the budget, and what becomes of the figures."""

    def __init__(
        self,
        workers: Workers,
        job: dict[str, Any],
        every: Sequence[Turn],
        deadline: float,
        say: Say,
        measured: Callable[[], object],
    ) -> None:
        self.workers, self.job, self.every, self.deadline = workers, job, every, deadline
        self.say, self.measured = say, measured
        self.had_features: set[str] = set()  # ways that were begun with them there

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def in_turns(self, turns: Sequence[Turn], points: Callable[[Way], Points]) -> None:
        """Each has an equal part of what those before it have left."""
        for number, (way, result) in enumerate(turns):
            self.measure(way, result, points(way), self.left / (len(turns) - number))

    def those_that_wait(self) -> None:
        """Ways whose turn was too short for all rows, with all the time there is: first those for which another way has made
        features since, as nobody knows how little they take by now; then the shortest first."""
        waiting = [(way, result, result.needs) for way, result in self.every if result.needs is not None]
        for way, result, needs in sorted(waiting, key=lambda one: (not self.is_cheaper_now(one[0]), one[2])):
            if self.left > needs or self.is_cheaper_now(way):
                self.measure(way, result, [(1.0, 0)], self.left)

    def is_cheaper_now(self, way: Way) -> bool:
        return way.name not in self.had_features and self.are_stored(way)

    def are_stored(self, way: Way) -> bool:
        """Whether another way has left the features of all rows that this one takes."""
        taken = way.features
        return taken is not None and any(one.features == taken and result.complete for one, result in self.every)

    def measure(self, way: Way, result: Result, points: Points, turn: float) -> None:
        """`turn`: seconds in which points are begun."""
        now = time.time()
        if now >= self.deadline:
            result.why = result.why or ("" if result.complete else "no time was left")
        elif points:
            stopped = min(self.deadline, now + PATIENCE * turn)
            job = self.job | {"way": way.name, "points": points, "deadline": now + turn, "known": result.points}
            job["stored"] = self.are_stored(way)
            self.had_features |= {way.name} if job["stored"] else set()
            ended = self.workers.do(job, stopped, lambda record: self._take(way, result, record))
            self._end(way, result, ended, stopped - now, "the budget" if stopped == self.deadline else "its turn")

    def _end(self, way: Way, result: Result, ended: Ended, seconds: float, spent: str) -> None:
        if ended.late:
            self.say(f"{way.title}: stopped, {spent} was used up")
            if not result.complete:
                result.needs, result.why = seconds, f"stopped: {spent} was used up"
        elif ended.why:
            self.say(f"{way.title}: {ended.why}")
            result.why = result.why or ended.why

    def _take(self, way: Way, result: Result, record: dict[str, Any]) -> None:
        if "metrics" in record:
            result.points.append(record)
            result.points.sort(key=lambda point: (point["share"], point["seed"]))
            if result.complete:
                result.needs, result.why = None, ""
            named = next(iter(record["metrics"].items()))
            self.say(
                f"{way.title}: {record['rows']:,} rows, seed {record['seed']}: {named[0]} {figure(named[1])}, "
                f"trained in {record['train_seconds']:.1f} s"
            )
            self.measured()
        elif "error" in record:
            result.why = record["error"]
            self.say(f"{way.title}: {record['error']}")
        elif "needs" in record and record["share"] == 1.0 and not result.complete:
            needs = result.needs = record["needs"]
            about = f"on all rows it would take about {needs:.0f} s, more than "
            result.why = about + "was left" if needs else "no time was left"
            self.say(f"{way.title}: {about + 'its turn' if needs else result.why}")
        elif "memory_mb" in record and not result.memory_mb and (result.complete or not way.curve):
            # Of the process that had all rows first: what others imported meanwhile lies in those that are started later.
            result.memory_mb = record["memory_mb"]
