"""`regraft compare`: the ways side by side on the user's rows, within a time budget."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.engine.errors import ConfigError, nearest

if TYPE_CHECKING:
    from regraft.engine.compare.results import Result

ENDING = 8.0  # seconds: a point that is late is stopped, the page is written
UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare", help="train the ways side by side on your rows: which one is worth it, and what it costs"
    )
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--budget", default="10m", metavar="TIME", help="it ends within: 90s, 10m, 2h (default 10m)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way on all rows (default 3)")
    parser.add_argument(
        "--folds", type=int, default=0, metavar="K", help="hold out K parts of the training rows in turn"
    )
    parser.add_argument("--ways", metavar="A,B", help="ways to measure, or all; default: the usual ones")
    parser.add_argument("--shares", default="0.01,0.05,0.25,1", help="learning curve: shares of the rows")
    parser.add_argument("--to", metavar="FOLDER", help="default: the run folder with -compare behind it")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    began, budget = time.monotonic(), seconds(args.budget)
    from regraft.engine.compare.page import text_table, write_comparison
    from regraft.engine.compare.results import advice
    from regraft.engine.compare.rows import splits_of
    from regraft.engine.compare.run import compare
    from regraft.engine.compare.ways import DEFAULT, FOR_TAGS, NAMES
    from regraft.engine.config import load_config
    from regraft.engine.progress import ProgressBar

    config = load_config(args.config, args.overrides)
    usual = FOR_TAGS if config.task.type == "tagging" else DEFAULT
    names = NAMES if args.ways == "all" else tuple(args.ways.split(",")) if args.ways else usual
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--ways: {name!r} is no way{nearest(name, NAMES)}; there are: {', '.join(NAMES)}")
    if args.seeds < 1 or args.folds == 1 or args.folds < 0:
        raise ConfigError("--seeds: at least 1; --folds: 0 for none, or at least 2")
    shares = sorted({*(_share(s) for s in args.shares.split(",")), 1.0})
    task, splits = splits_of(config)
    rows = len(splits["train"][0])
    if args.folds > rows:
        raise ConfigError(f"--folds {args.folds}: there are {rows} training rows")
    measured = (
        "held-out folds" if args.folds else "test" if "test" in splits else "dev, which also picked the checkpoints"
    )
    notes = {"measured_on": measured, "training_rows": rows, "budget": args.budget}
    folder = Path(args.to or f"{config.run}-compare")
    better = task.greater_is_better
    page: Path | None = None

    def write(results: list[Result], **more: str) -> None:
        nonlocal page
        name, about = Path(config.run).name, notes | more
        page = write_comparison(folder, results, name=name, metric=task.metric, greater_is_better=better, notes=about)

    try:
        with ended_by_exception():
            results = compare(
                config,
                names,
                budget=budget - min(ENDING, budget / 5) - (time.monotonic() - began),
                seeds=args.seeds,
                folds=args.folds,
                shares=shares,
                say=ProgressBar("", 0).say,
                measured=lambda results: write(results, finished="no: it was stopped, or is being measured"),
            )
    except (KeyboardInterrupt, SystemExit):
        if page is not None:
            print(f"regraft: stopped; what was measured until then: {page}", file=sys.stderr)
        raise
    write(results)
    print(text_table(results, task.metric))
    print(f"\n{advice(results, task.metric, better)}\n{page}")
    return 0


@contextmanager
def ended_by_exception() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an exception, so that workers and temporary folders go with it."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # as nohup asks
    before = {number: signal.signal(number, end) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds(text: str) -> float:
    """'90', '90s', '10m', '2h' in seconds. Raises ConfigError."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(s|m|min|h)?", text.strip())
    if not found or not float(found[1]) > 0:
        raise ConfigError(f"--budget {text}: expected a time such as 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2] or ""]


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ConfigError(f"--shares: {text!r}: expected shares of the rows above 0 and up to 1, such as 0.01,0.25,1")
    return value
