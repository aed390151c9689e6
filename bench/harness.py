"""What all measurements share: turns in fresh processes, and a result as table and JSON.

A contestant's turn is a subprocess that prints one JSON line last. Contestants take turns (A B A B ...), so that a
machine that slows down for a while slows all of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import machine

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
WORK = BENCH / ".data"
ENVIRONMENTS = BENCH / ".envs"
RESULTS = BENCH / "results"
OURS = "regraft"
Item = TypeVar("Item")
Found = TypeVar("Found")
_under_way: set[subprocess.Popen[str]] = set()
_told_to_end = threading.Event()


class TurnFailed(RuntimeError):
    """A turn that ended without a result."""


@dataclass(frozen=True)
class Run:
    """One turn of one contestant. `value` is in the unit of the claim; `details` is whatever explains it."""

    case: str
    who: str
    round: int
    value: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A figure that was promised, and whether it was reached."""

    what: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        enough = self.at_least is None or self.measured >= self.at_least
        return enough and (self.at_most is None or self.measured <= self.at_most)


@dataclass(frozen=True)
class Claim:
    """What is measured. `compare`: 'ratio' (how many times better Regraft is) or 'difference' (in the unit)."""

    name: str
    sentence: str
    unit: str
    higher_is_better: bool = True
    compare: Literal["ratio", "difference"] = "ratio"


def arguments(doc: str | None, *, rounds: int | None) -> argparse.ArgumentParser:
    """The options that every measurement has. A measurement that is told to end takes its turns' processes along."""
    signal.signal(signal.SIGTERM, _end)
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny, to see that it runs; writes no result without --out"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; default bench/results/NAME.json")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contestant (%(default)s)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="CPU threads (%(default)s)")
    return parser


# ---- turns --------------------------------------------------------------------------------------------------------


def _end(number: int, frame: object) -> None:
    # Turns side by side are waited for by threads, which this exception does not reach.
    _told_to_end.set()
    for process in tuple(_under_way):
        _kill(process)
    sys.exit(128 + number)


def _kill(process: subprocess.Popen[str]) -> None:
    """With its group: a compiler's workers must not go on and slow down the next turn."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def side_by_side(go: Callable[[Item], Found], items: Sequence[Item], at_once: int) -> list[Found]:
    """What `go` finds for every item, `at_once` of them at a time."""
    if at_once == 1:
        return [go(item) for item in items]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(go, items))


def turn(
    python: Path | str,
    script: str,
    spec: Mapping[str, Any],
    *,
    threads: int,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `bench/SCRIPT SPEC` in a fresh process and return the JSON object on its last line.

    Raises TurnFailed with the end of what it said on an error, or past `timeout` seconds.
    """
    command = [str(python), str(BENCH / script), json.dumps(spec, default=str)]
    return json.loads(last_line(run(command, threads=threads, timeout=timeout, environment=environment), script))


def threads_of(options: argparse.Namespace) -> int:
    """Threads of each of the turns that are taken side by side (`--at-once`)."""
    return max(1, options.threads // options.at_once)


def run(
    command: Sequence[str | Path],
    *,
    threads: int,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Standard output of a command that must succeed, in a process group of its own. Raises TurnFailed."""
    WORK.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env.setdefault("REGRAFT_CACHE", str(WORK / "cache"))
    env.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # users have modules compiled; a second of every start otherwise goes into that
    if str(command[0]).startswith(str(ENVIRONMENTS)):
        env.pop("PYTHONPATH", None)  # a peer must not see Regraft's packages
    env.update(environment or {})
    shown = shlex.join([Path(command[0]).name, *map(str, command[1:2])])
    if _told_to_end.is_set():
        raise TurnFailed(f"{shown}: not begun, the measurement was told to end")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True
    )
    _under_way.add(process)
    try:
        if _told_to_end.is_set():  # while it was started
            _kill(process)
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TurnFailed(f"{shown}: still running after {timeout:.0f} s") from None
    finally:
        if process.poll() is None:
            _kill(process)
            process.communicate()
        _under_way.discard(process)
    if process.returncode:
        raise TurnFailed(f"{shown}: exit code {process.returncode}\n{(err or out)[-3000:]}")
    return out


def last_line(text: str, source: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or not lines[-1].startswith("{"):
        raise TurnFailed(f"{source}: printed no JSON: {text[-500:]!r}")
    return lines[-1]


def take_turns(case: str, contestants: Mapping[str, Callable[[int], tuple[float, dict]]], rounds: int) -> list[Run]:
    """`rounds` turns of each contestant, A B A B ...; each is a function of the round giving value and details."""
    runs = []
    for number in range(rounds):
        for who, go in contestants.items():
            value, details = go(number)
            runs.append(Run(case, who, number, value, details))
            print(f"{case} round {number + 1}/{rounds}: {who} {value:,.4g}", file=sys.stderr, flush=True)
    return runs


# ---- results ------------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Run], claim: Claim, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """By case: settings, every run, medians, and the median over rounds of Regraft against each peer."""
    cases: dict[str, Any] = {}
    for case in dict.fromkeys(run.case for run in runs):
        mine = [run for run in runs if run.case == case]
        values = {who: {r.round: r.value for r in mine if r.who == who} for who in dict.fromkeys(r.who for r in mine)}
        cases[case] = {
            "settings": (settings or {}).get(case, {}),
            "medians": {who: statistics.median(by_round.values()) for who, by_round in values.items()},
            f"{claim.compare}s": {
                who: statistics.median(
                    _against(claim, values[OURS][n], by_round[n]) for n in by_round if n in values[OURS]
                )
                for who, by_round in values.items()
                if who != OURS and OURS in values and by_round.keys() & values[OURS].keys()
            },
            "runs": [asdict(run) for run in mine],
        }
    return cases


def _against(claim: Claim, ours: float, peer: float) -> float:
    if claim.compare == "difference":
        return ours - peer if claim.higher_is_better else peer - ours
    return ours / peer if claim.higher_is_better else peer / ours


def table(cases: Mapping[str, Any], claim: Claim) -> str:
    """The cases as lines of text."""
    head = ("case", "who", f"median {claim.unit}", "lowest", "highest", "runs", f"{OURS} is")
    rows = [head]
    for case, summary in cases.items():
        for who, median in summary["medians"].items():
            values = [run["value"] for run in summary["runs"] if run["who"] == who]
            against = summary[f"{claim.compare}s"].get(who)
            shown = "" if against is None else f"{against:.2f}x" if claim.compare == "ratio" else f"{against:+.2f}"
            rows.append((case, who, number(median), number(min(values)), number(max(values)), str(len(values)), shown))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    left = {0, 1}
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def publish(
    claim: Claim,
    runs: Sequence[Run],
    options: argparse.Namespace,
    *,
    versions: Mapping[str, Mapping[str, str]],
    settings: Mapping[str, Any] | None = None,
    targets: Callable[[Mapping[str, Any]], list[Target]] = lambda cases: [],
    before: Mapping[str, Any] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Print the table and, as the last line, the JSON; write it to --out or, unless --quick, to bench/results/.

    `targets` makes the promised figures from the cases; `before` is machine.facts() taken before the first turn; `kept`:
    cases as an earlier command published them.
    """
    cases = {**(kept or {}), **summarise(runs, claim, settings)}
    reached = [{**asdict(target), "reached": target.reached} for target in targets(cases)]
    result = {
        "name": claim.name,
        "claim": claim.sentence,
        "unit": claim.unit,
        "higher_is_better": claim.higher_is_better,
        "compare": claim.compare,
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "quick": options.quick,
        "threads": options.threads,
        "machine": dict(before or machine.facts()),
        "versions": {who: dict(found) for who, found in versions.items()},
        "targets": reached,
        "cases": cases,
    }
    print(f"{claim.sentence}\n\n{table(cases, claim)}\n")
    for target in reached:
        bound = (
            f"at least {target['at_least']:g}" if target["at_least"] is not None else f"at most {target['at_most']:g}"
        )
        print(f"{'reached' if target['reached'] else 'MISSED '}  {target['what']}: {target['measured']:.3f} ({bound})")
    path = options.out or (None if options.quick else RESULTS / f"{claim.name}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return result


def published_cases(path: Path, *, without: Sequence[str]) -> dict[str, Any]:
    """Cases of an earlier, not quick, result that are not among `without`, each with when, how and of what it was measured:
    what a command that measures one part adds its figures to."""
    if not path.is_file():
        return {}
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("quick"):
        return {}
    measured = {key: result[key] for key in ("command", "date", "machine", "versions")}
    return {name: {"measured": measured, **case} for name, case in result["cases"].items() if name not in without}


def published_with(path: Path, settings: str) -> list[Run]:
    """Runs of an earlier result that were measured with these settings: `settings` in a run's details is their mark."""
    if not path.is_file():
        return []
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"].values()
    runs = [run for case in cases for run in case.get("runs", [])]
    return [Run(**run) for run in runs if run["details"].get("settings") == settings]


def add_precision(parser: argparse.ArgumentParser) -> None:
    usual = machine.precision()
    about = "of all sides (default: bf16 where the machine is fast at it, so here %(default)s)"
    parser.add_argument("--precision", choices=machine.PRECISIONS, default=usual, help=about)


def in_one_precision(known: Callable[[argparse.Namespace], list[Run]], options: argparse.Namespace) -> list[Run]:
    """What is known of a case, in the precision in which most of it is, today's where that is as much: figures stand until they
    are measured anew, and those of two precisions are not compared with one another."""
    others = [some for some in machine.PRECISIONS if some != options.precision]
    settings = ({"precision": some, "restart": False} for some in (options.precision, *others))
    return max((known(argparse.Namespace(**vars(options) | some)) for some in settings), key=len)


def precision_of(run: Run, mark: Callable[[argparse.Namespace], str], options: argparse.Namespace) -> str:
    """What a figure was measured in, which is part of its settings' mark. `mark`: of the settings, by options."""
    every = (argparse.Namespace(**vars(options) | {"precision": precision}) for precision in machine.PRECISIONS)
    return {mark(some): some.precision for some in every}[run.details["settings"]]


def command_line() -> str:
    """The command as it is typed in the repository root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(shown), *sys.argv[1:]])
