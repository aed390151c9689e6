"""Training speed on CPU in real tokens a second: token labelling, answers and hidden words, Regraft and Trainer.

As train_cpu.py does it: both sides on the same rows, the tokens of the measured steps (pad tokens are no tokens) over their
wall time. `trainer` prepares the rows as transformers' examples do; `trainer-best` pads to the longest of a batch, groups by
length, and was searched for. With `--only` the other cases stay as they were published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import machine
import task_rows
from environments import encoder_folder, our_versions, peer_python, versions
from harness import RESULTS, Claim, Run, Target, arguments, publish, published_cases, take_turns, turn
from train_cpu import LEARNING, Trainer, fresh, speed

CLAIM = Claim(
    "tasks_speed",
    "Training MiniLM-L6 on CPU for other tasks: real tokens a second over whole optimizer steps",
    "tokens/s",
)


@dataclass(frozen=True)
class Case:
    """`window_steps`: as many as length grouping needs to run from long to short, where rows differ in length."""

    kind: str
    batch_size: int
    max_length: int
    warmup_steps: int
    window_steps: int
    rounds: int
    at_least: float
    at_least_best: float


ROWS: dict[str, Callable[[bool], dict[str, str]]] = {
    "tagging": task_rows.entity_words,
    "answering": task_rows.questions,
    "mlm": task_rows.running_text,
}
TASKS: dict[str, dict[str, Any]] = {
    "tagging": {"type": "tagging"},
    "answering": {"type": "answering", "stride": 128},
    "mlm": {"type": "mlm", "masking": "token"},  # the same choice as the peer's
}
CASES = {
    "tagging": Case("tagging", 32, 256, 10, 50, 5, 1.3, 1.3),
    "answering": Case("answering", 16, 384, 5, 50, 3, 2.0, 1.3),
    "mlm": Case("mlm", 32, 128, 3, 20, 3, 1.3, 1.3),
}
QUICK = {
    "tagging": Case("tagging", 16, 128, 1, 3, 1, 1.3, 1.3),
    "answering": Case("answering", 4, 384, 1, 2, 1, 2.0, 1.3),
    "mlm": Case("mlm", 4, 64, 1, 2, 1, 1.3, 1.3),
}


def main() -> None:
    parser = arguments(__doc__, rounds=None)
    parser.add_argument("--rounds", type=int, help="turns of each contestant (5 for tagging, else 3)")
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile for the peer")
    parser.add_argument("--precision", default="auto", help="of Regraft's runs (%(default)s)")
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(",")]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)}: not one of {', '.join(CASES)}")
    before, wanted = machine.facts(), QUICK if options.quick else CASES
    runs: list[Run] = []
    settings: dict[str, Any] = {}
    for name in names:
        case, files = wanted[name], ROWS[name](options.quick)
        trainer = TaskTrainer(case, files, options)
        best, tried = trainer.search()
        contestants = {
            "regraft": lambda n, c=case, f=files: regraft(c, f, options, seed=n),
            "trainer": lambda n, t=trainer: t.as_it_comes(seed=n),
            "trainer-best": lambda n, t=trainer, b=best: t.grouped(b, seed=n),
        }
        runs += take_turns(name, contestants, options.rounds or case.rounds)
        settings[name] = {**asdict(case), **LEARNING, "trainer-best": str(best), "tried for trainer-best": tried}

    def targets(cases: Mapping[str, Any]) -> list[Target]:
        return [
            Target(f"regraft / {peer} on {name}", summary["ratios"][peer], at_least=least)
            for name, summary in cases.items()
            for peer, least in (("trainer", wanted[name].at_least), ("trainer-best", wanted[name].at_least_best))
        ]

    found = {
        "regraft": our_versions(),
        "trainer": versions(peer_python("trainer"), ("torch", "transformers", "accelerate", "numpy")),
    }
    kept = {} if options.quick else published_cases(options.out or RESULTS / "tasks_speed.json", without=names)
    publish(CLAIM, runs, options, versions=found, settings=settings, targets=targets, before=before, kept=kept)


def regraft(case: Case, files: Mapping[str, str], options: argparse.Namespace, *, seed: int) -> tuple[float, dict]:
    """Tokens a second of Regraft, by its defaults."""
    folder = fresh("regraft")
    config = {
        "run": str(folder / "run"),
        "model": {"name": str(encoder_folder()), "max_length": case.max_length},
        "task": TASKS[case.kind],
        "data": {**files, "format": "jsonl", "limit": 64} if options.quick else {**files, "format": "jsonl"},
        "training": {
            **LEARNING,
            "batch_size": case.batch_size,
            "max_steps": case.warmup_steps + case.window_steps,
            "epochs": 100,
            "warmup": 0,
            "seed": seed,
            "precision": options.precision,
            "threads": options.threads,
            "evaluate_every": case.warmup_steps + case.window_steps,
            "checkpoint_every": 500,
        },
    }
    spec = {"config": config, "folder": folder, "warmup_steps": case.warmup_steps, "window_steps": case.window_steps}
    return speed(turn(sys.executable, "regraft_train.py", spec, threads=options.threads))


class TaskTrainer(Trainer):
    """transformers' Trainer on one of these tasks; its settings are searched for as train_cpu.py does."""

    script = "peers/tasks_run.py"

    def more(self, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        # the example for answers pads to the full length; no other example does
        return {"kind": self.case.kind, "doc_stride": 128, "pad_to_max_length": not changes}


if __name__ == "__main__":
    main()
