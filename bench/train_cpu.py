"""Fine-tuning speed on CPU in real tokens a second: Regraft and transformers' Trainer, as it comes and at its best.

Every turn trains MiniLM-L6 for some steps and counts the tokens of the measured ones (pad tokens are no tokens) over
their wall time. Reading, tokenising, loading, compiling and the first steps lie before the window.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    arguments,
    publish,
    published_cases,
    take_turns,
    turn,
)
from matrix_rate import matrix_weights, training_flops

CLAIM = Claim("train_cpu", "Fine-tuning MiniLM-L6 on CPU: real tokens a second over whole optimizer steps", "tokens/s")
COMPILE_SECONDS = 180.0
LEARNING = {"learning_rate": 5e-5, "weight_decay": 0.01}  # both sides; linear schedule, clipping at 1.0, dropout 0.1


@dataclass(frozen=True)
class Case:
    """`window_steps` is a multiple of 50 because Trainer's length grouping runs from long to short in 50 batches;
    its groups are that large only with `rows` at least 200 batches."""

    rows: int
    batch_size: int
    max_length: int
    warmup_steps: int
    window_steps: int
    rounds: int
    at_least: float
    at_least_best: float
    at_least_share: float | None = None  # of the matrix rate of the precision in which the machine is fastest


CASES = {
    "sst2": Case(8000, 32, 128, 10, 50, 5, 4.0, 1.6),
    "imdb": Case(3200, 16, 256, 5, 50, 3, 2.0, 1.1, 0.5),
}
QUICK = {
    "sst2": Case(400, 32, 128, 2, 4, 1, 4.0, 1.6),
    "imdb": Case(64, 16, 256, 1, 2, 1, 2.0, 1.1, 0.5),
}


@dataclass(frozen=True)
class Trial:
    """Settings of Trainer that are looked for."""

    bf16: bool
    threads: int
    compiled: bool = False

    def __str__(self) -> str:
        precision = "bf16" if self.bf16 else "fp32"
        return f"{precision}, {self.threads} thread(s){', compiled' if self.compiled else ''}, grouped by length"


def main() -> None:
    parser = arguments(__doc__, rounds=None)
    parser.add_argument("--rounds", type=int, help="turns of each contestant (5 on sst2, 3 on imdb)")
    parser.add_argument("--data", choices=[*CASES, "both"], default="both")
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile for the peer")
    parser.add_argument("--precision", default="auto", help="of Regraft's runs (%(default)s)")
    options = parser.parse_args()
    before = machine.facts()
    runs: list[Run] = []
    settings: dict[str, Any] = {}
    cases = {name: case for name, case in (QUICK if options.quick else CASES).items() if options.data in (name, "both")}
    for name, case in cases.items():
        files = prepare(name, case)
        trainer = Trainer(case, files, options)
        best, tried = trainer.search()
        contestants = {
            "regraft": lambda n, c=case, f=files: regraft(c, f, options, seed=n),
            "trainer": lambda n, t=trainer: t.as_it_comes(seed=n),
            "trainer-best": lambda n, t=trainer, b=best: t.grouped(b, seed=n),
        }
        runs += take_turns(name, contestants, options.rounds or case.rounds)
        settings[name] = {**case.__dict__, **LEARNING, "trainer-best": str(best), "tried for trainer-best": tried}

    def targets(cases: Mapping[str, Any]) -> list[Target]:
        wanted = QUICK if options.quick else CASES
        found = []
        for name, summary in cases.items():
            for peer, least in (("trainer", wanted[name].at_least), ("trainer-best", wanted[name].at_least_best)):
                found.append(Target(f"regraft / {peer} on {name}", summary["ratios"][peer], at_least=least))
            if (least := wanted[name].at_least_share) is not None:
                share = statistics.median(r["details"]["matrix_share"] for r in summary["runs"] if r["who"] == OURS)
                found.append(Target(f"share of the matrix rate on {name}", share, at_least=least))
        return found

    found = {
        "regraft": our_versions(),
        "trainer": versions(peer_python("trainer"), ("torch", "transformers", "accelerate", "numpy")),
    }
    kept = {} if options.quick else published_cases(options.out or RESULTS / f"{CLAIM.name}.json", without=list(cases))
    publish(CLAIM, runs, options, versions=found, settings=settings, targets=targets, before=before, kept=kept)


def prepare(name: str, case: Case) -> dict[str, Path]:
    """The rows that all contestants learn from; a few for the evaluation that ends a Regraft run."""
    rows = sources.imdb(case.rows) if name == "imdb" else sources.sample(sources.read(name, "train"), case.rows)
    kept = sources.write_jsonl(rows, f"train_cpu/{name}-{case.rows}.jsonl")
    return {"train": kept, "dev": sources.write_jsonl(rows[:32], f"train_cpu/{name}-dev.jsonl")}


def regraft(case: Case, files: Mapping[str, Path], options: argparse.Namespace, *, seed: int) -> tuple[float, dict]:
    """Tokens a second of Regraft, by its defaults."""
    folder = fresh("regraft")
    config = {
        "run": str(folder / "run"),
        "model": {"name": str(encoder_folder()), "max_length": case.max_length},
        "data": {split: str(path) for split, path in files.items()},
        "training": {
            **LEARNING,
            "batch_size": case.batch_size,
            "max_steps": case.warmup_steps + case.window_steps,
            "epochs": 100,
            "warmup": 0,
            "schedule": "linear",
            "seed": seed,
            "precision": options.precision,
            "threads": options.threads,
            "checkpoint_every": 500,  # as Trainer does
        },
    }
    spec = {"config": config, "folder": folder, "warmup_steps": case.warmup_steps, "window_steps": case.window_steps}
    value, details = speed(turn(sys.executable, "regraft_train.py", spec, threads=options.threads))
    rates = turn(sys.executable, "matrix_rate.py", {"threads": options.threads}, threads=options.threads)
    shape = json.loads((encoder_folder() / "config.json").read_text(encoding="utf-8"))
    flops = training_flops(matrix_weights(shape), details["tokens"]) / details["seconds"]
    shares = {
        f"matrix_share{end}": flops / max(rates[which].values())
        for which, end in (("fastest", ""), ("median", "_of_median"))
    }
    return value, {**details, "matrix_rates": rates, **shares}


class Trainer:
    """transformers' Trainer on one case, as `script` runs it."""

    environment = "trainer"
    script = "peers/trainer_run.py"

    def __init__(self, case: Case, files: Mapping[str, Path], options: argparse.Namespace) -> None:
        self.case, self.files, self.options = case, files, options
        self.python = peer_python(self.environment)

    def as_it_comes(self, *, seed: int) -> tuple[float, dict]:
        return self.run({}, threads=self.options.threads, seed=seed)

    def grouped(self, trial: Trial, *, seed: int, timeout: float | None = None) -> tuple[float, dict]:
        changes = {"train_sampling_strategy": "group_by_length", "bf16": trial.bf16, "torch_compile": trial.compiled}
        return self.run(changes, threads=trial.threads, seed=seed, compiled=trial.compiled, timeout=timeout)

    def search(self) -> tuple[Trial, dict[str, Any]]:
        """The fastest settings: precision and threads first, then the winner compiled, if there is a compiler."""
        cores = self.options.threads
        counts = sorted({1, cores} | {n for n in (2, 4, 8, 16, 32) if n < cores})
        precisions = (True, False) if machine.has_fast_bf16() else (False,)
        trials = [Trial(bf16, threads) for bf16 in precisions for threads in counts]
        found = {trial: self.attempt(str(trial), lambda t=trial: self.grouped(t, seed=0)) for trial in trials}
        best = max(trials, key=lambda t: found[t] or 0.0)
        if not self.options.no_compile and any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            compiled = Trial(best.bf16, best.threads, compiled=True)
            go: Callable[[], tuple[float, dict]] = lambda: self.grouped(compiled, seed=0, timeout=COMPILE_SECONDS)  # noqa: E731
            found[compiled] = self.attempt(str(compiled), go)
            best = max(found, key=lambda t: found[t] or 0.0)
        return best, {str(trial): value for trial, value in found.items()}

    @staticmethod
    def attempt(what: str, go: Callable[[], tuple[float, dict]]) -> float | None:
        try:
            value = go()[0]
        except TurnFailed as error:
            print(f"trainer with {what}: {error}", file=sys.stderr, flush=True)
            return None
        print(f"trainer with {what}: {value:,.0f} tokens/s", file=sys.stderr, flush=True)
        return value

    def more(self, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        """What else a turn with these changes to Trainer's arguments is told."""
        return {}

    def run(
        self,
        changes: Mapping[str, Any],
        *,
        threads: int,
        seed: int,
        compiled: bool = False,
        timeout: float | None = None,
    ) -> tuple[float, dict]:
        # Compiled, the first shapes are compiled one by one before the graph becomes dynamic: a longer warm-up.
        warmup = self.case.warmup_steps + (20 if compiled and not self.options.quick else 0)
        spec = {
            "model": encoder_folder(),
            "train": self.files["train"],
            "max_length": self.case.max_length,
            "seed": seed,
            "threads": threads,
            "folder": fresh("trainer"),
            "warmup_steps": warmup,
            "window_steps": self.case.window_steps,
            **self.more(changes),
            "arguments": {
                **LEARNING,
                "per_device_train_batch_size": self.case.batch_size,
                "max_steps": warmup + self.case.window_steps,
                "use_cpu": True,
                "save_strategy": "no",
                **changes,
            },
        }
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor")}
        return speed(turn(self.python, self.script, spec, threads=threads, timeout=timeout, environment=cache))


def speed(found: dict[str, Any]) -> tuple[float, dict]:
    """Tokens a second, and what they are made of."""
    kept = {key: found[key] for key in ("tokens", "seconds", "steps", "peak_bytes") if key in found}
    return found["tokens"] / found["seconds"], kept


def fresh(name: str) -> Path:
    folder = WORK / "turns" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
