"""`regraft plan`: a run's parameters, memory, steps and time, before it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.engine.methods.plan import MethodPlan, RunPlan

PARTS = ("weights", "gradients", "optimizer", "averages", "activations", "rest")


def add_parser(commands: Any, add_config: Callable[[argparse.ArgumentParser], None]) -> None:
    parser = commands.add_parser("plan", help="what a run will take (memory, steps, time), and whether it fits")
    add_config(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="memory of one of N processes on this machine"
    )
    parser.add_argument("--only", action="store_true", help="the chosen method, without the others")
    parser.set_defaults(handler=_plan)


def _plan(args: argparse.Namespace) -> int:
    from regraft.engine.config import load_config

    config = load_config(args.config, args.overrides)
    from regraft.engine.methods.plan import plan_run

    found = plan_run(config, alternatives=not args.only, processes=args.processes)
    if args.format == "json":
        record = asdict(found) | {"peak": found.chosen.memory.peak, "fits": found.fits}
        print(json.dumps(record, indent=2))
    else:
        print(describe(found))
    return 0 if found.fits else 1


def describe(plan: RunPlan) -> str:
    """The plan as a table: megabytes by part, a method a row."""
    head = f"{'method':10}{'trained':>13}{'of':>13}" + "".join(f"{p:>12}" for p in PARTS) + f"{'peak MB':>12}"
    lines = [head, _row(plan.chosen, "* "), *(_row(o, "  ") for o in plan.others)]
    lines += [
        "",
        f"{plan.steps:,} steps, {plan.tokens:,} tokens; the largest step has {plan.longest_step:,} tokens, at most "
        f"{plan.token_budget:,} at a time",
        _speed(plan),
        _verdict(plan),
    ]
    if plan.processes > 1 or plan.sharding != "none":
        lines.append(_whose(plan))
    return "\n".join(lines)


def _speed(plan: RunPlan) -> str:
    if plan.tokens_per_second is None or plan.seconds is None:
        return "no step was taken: what is counted does not fit, and what activations take is an estimate"
    told = (
        f"{plan.tokens_per_second:,.0f} tokens a second in a probe of ten steps: {_duration(plan.seconds)} of training"
    )
    if plan.watts:
        told += (
            f", {plan.watts * plan.seconds * plan.processes / 3.6e6:.2f} kWh at the {plan.watts:,.0f} W drawn meanwhile"
        )
    return told


def _verdict(plan: RunPlan) -> str:
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    where = (
        f"this {plan.device}" if plan.processes == 1 or plan.device != "cpu" else "the share of each on this machine"
    )
    least = "at least " if plan.seconds is None else ""
    return f"{verdict}: {least}{plan.chosen.memory.peak / 1e6:,.0f} MB of {plan.available / 1e6:,.0f} MB on {where}"


def _whose(plan: RunPlan) -> str:
    if plan.processes == 1:
        return f"for one process, which holds everything; --processes N plans training.sharding: {plan.sharding}"
    shared = {
        "none": "each holds everything",
        "zero1": "moments divided",
        "zero2": "gradients and moments divided",
    }.get(plan.sharding, "weights, gradients and moments divided")
    return (
        f"for each of {plan.processes} processes (training.sharding: {plan.sharding}: {shared}); messages are not timed"
    )


def _row(plan: MethodPlan, mark: str) -> str:
    if plan.note:
        return f"{mark}{plan.method:8}  {plan.note}"
    cells = "".join(f"{getattr(plan.memory, p) / 1e6:12,.1f}" for p in PARTS)
    return f"{mark}{plan.method:8}{plan.trained:13,}{plan.total:13,}{cells}{plan.memory.peak / 1e6:12,.1f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
