"""Methods beside full fine-tuning: what they score, how fast they learn, what they hold in memory, what `plan` foretells.

Made to be done in pieces, each a turn in a fresh process: what was measured with the same settings is taken from
bench/.data/methods/ or from the published result instead of being measured again, and what is published is all that was
measured so far. `--restart` measures the chosen parts again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import machine
import quality
import sources
import train_cpu
from environments import encoder_folder, our_versions, peer_python, versions
from harness import OURS, RESULTS, WORK, Claim, Run, Target, TurnFailed, arguments, publish, published_with, run, turn
from random_encoder import SIZES

CLAIM = Claim("methods", "Methods beside full fine-tuning; the unit is in the case", "(see case)")
PUBLISHED = RESULTS / "methods.json"
PARTS = ("quality", "speed", "table", "processes")
MODELS = ("MiniLM", *SIZES)
METHODS = ("full", "bitfit", "lora", "qlora", "int8", "ia3", "adapter", "prompt", "prefix")
NO_BIASES, NO_PREFIX = ("ModernBERT-base", "bitfit"), ("ModernBERT-base", "prefix")
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 8, "alpha": 16}},
    "qlora": {"lora": {"rank": 8, "alpha": 16}},
    "int8": {"lora": {"rank": 8, "alpha": 16}},
    "adapter": {"adapter": {"kind": "houlsby", "size": 64}},
    "prompt": {"prompt": {"tokens": 16}},
    "prefix": {"prompt": {"tokens": 16}},
}
PEER = "trainer + peft, lora"
ACCURACY, SPEED, MEMORY = "SST-2 accuracy (points)", "SST-2 tokens/s", "SST-2 peak memory (MB)"
PLAN, WEIGHTS, PROCESSES = "planned / measured peak", "weights (MB)", "processes: tokens/s"
ONE, TWO = "one process, all threads", "two processes"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a method learns SST-2 for its accuracy."""

    learning_rate: float
    epochs: int = 2
    batch_size: int = 32
    max_length: int = 128


FULL = quality.RECIPES["sst2"]
RECIPES = {
    "full": Recipe(FULL.learning_rate, FULL.epochs, FULL.batch_size, FULL.max_length),
    "lora": Recipe(1e-3),
    "qlora": Recipe(1e-3),
    "adapter": Recipe(1e-3),
}
CASE = train_cpu.Case(8000, 32, 128, 10, 50, 5, 1.35, 1.6)
QUICK = train_cpu.Case(400, 32, 128, 2, 4, 1, 1.35, 1.6)
TABLE_STEPS, LARGE_STEPS, QUICK_STEPS = (10, 24), (4, 12), (2, 4)  # those before the window, and in it


@dataclasses.dataclass(frozen=True)
class Piece:
    """One turn. `settings`: all that decides its figure; `measure` gives value and details."""

    part: str
    case: str
    who: str
    round: int
    settings: Mapping[str, Any]
    measure: Callable[[], tuple[float, dict[str, Any]]]

    @property
    def key(self) -> str:
        what = [self.case, self.who, self.round, self.settings]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def main() -> None:
    parser = arguments(__doc__, rounds=None)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (%(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="of the quality part, with commas (%(default)s)")
    parser.add_argument("--methods", help="of the quality and table parts, with commas; default: all")
    parser.add_argument("--models", default=",".join(MODELS), help="of the table, with commas (%(default)s)")
    parser.add_argument("--rows", type=int, help="train on the first rows only (default: all 67,349)")
    parser.add_argument("--precision", default="fp32", help="of all sides (%(default)s; the peer's is looked for)")
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile for the peer")
    parser.add_argument("--restart", action="store_true", help="measure again what was measured before")
    options = parser.parse_args()
    for given, known in ((options.only, PARTS), (options.models, MODELS), (options.methods or "full", METHODS)):
        unknown = [name for name in given.split(",") if name not in known]
        if unknown:
            parser.error(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    before, failed = machine.facts(), list[str]()
    for piece in pieces(options):
        if piece.part in options.only.split(","):
            try:
                found = measured(piece, options)
            except TurnFailed as error:  # the other pieces are worth having
                failed.append(f"{piece.case}: {piece.who}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            print(f"{piece.case}: {piece.who} ({piece.round + 1}) {found.value:,.4g}", file=sys.stderr, flush=True)
    everything = argparse.Namespace(**{**vars(options), "methods": None, "models": ",".join(MODELS), "seeds": "0,1,2"})
    known = [found for piece in pieces(everything) if (found := earlier(piece, options)) is not None]
    peer = ("torch", "transformers", "accelerate", "peft", "numpy")
    found_versions = {"regraft": our_versions() | versions(sys.executable, ("peft", "bitsandbytes"))}
    if any(found.who == PEER for found in known):
        found_versions["trainer + peft"] = versions(peer_python("trainer_peft"), peer)
    settings = {ACCURACY: {name: vars(recipe) for name, recipe in RECIPES.items()}, SPEED: dict(vars(CASE))}
    runs = [*known, *derived(known)]
    publish(CLAIM, runs, options, versions=found_versions, settings=settings, targets=targets, before=before)
    if failed:
        sys.exit(f"{len(failed)} pieces failed, see above")


def pieces(options: argparse.Namespace) -> Iterator[Piece]:
    """Every turn of every part, contestants in turns."""
    wanted = options.methods.split(",") if options.methods else list(METHODS)
    yield from _quality(options, [method for method in wanted if method in RECIPES])
    yield from _speed(options)
    yield from _table(options, wanted)
    yield from _processes(options)


def measured(piece: Piece, options: argparse.Namespace) -> Run:
    """The piece's figure: kept from before, or measured now and kept."""
    kept = WORK / "methods" / f"{piece.key}.json"
    if options.restart:
        kept.unlink(missing_ok=True)
    found = None if options.restart else earlier(piece, options)
    if found is None:
        value, details = piece.measure()
        commit = {} if piece.who == PEER else {"commit": our_versions().get("commit", "")}
        found = Run(piece.case, piece.who, piece.round, value, details | commit | {"settings": piece.key})
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(".tmp")
        beside.write_text(json.dumps(vars(found), indent=1), encoding="utf-8")
        beside.replace(kept)
    return found


def earlier(piece: Piece, options: argparse.Namespace) -> Run | None:
    """What was measured before with the same settings: from its work file, or from the published result."""
    kept = WORK / "methods" / f"{piece.key}.json"
    if kept.is_file():
        return Run(**json.loads(kept.read_text(encoding="utf-8")))
    same = published_with(options.out or PUBLISHED, piece.key)
    return next((run for run in same if run.case == piece.case), None)


def derived(known: list[Run]) -> list[Run]:
    """Memory of the turns that were timed, and weights of the runs that were planned, as cases of their own."""
    found = []
    for one in known:
        more = {"settings": f"{one.details['settings']}, derived"}
        if one.case == SPEED and "peak_bytes" in one.details:
            found.append(Run(MEMORY, one.who, one.round, one.details["peak_bytes"] / 1e6, more))
        if one.case == PLAN:
            found.append(Run(WEIGHTS, one.who, one.round, one.details["plan"]["memory"]["weights"] / 1e6, more))
    return found


# ---- what is measured -----------------------------------------------------------------------------------------------


def config_of(method: str, folder: Path, data: Mapping[str, Any], model: Path, **training: Any) -> dict[str, Any]:
    length = training.pop("max_length", 128)
    return {
        "run": str(folder / "run"),
        "method": method,
        "model": {"name": str(model), "max_length": length},
        "data": dict(data),
        "training": training,
        **SECTIONS.get(method, {}),
    }


def _quality(options: argparse.Namespace, methods: list[str]) -> Iterator[Piece]:
    rows = 300 if options.quick else options.rows
    seeds = [int(seed) for seed in options.seeds.split(",")][: 1 if options.quick else None]
    for seed in seeds:
        for method in methods:
            recipe = RECIPES[method]
            settings = {**vars(recipe), "rows": rows, "precision": options.precision, "more": SECTIONS.get(method)}

            def measure(
                method: str = method, recipe: Recipe = recipe, seed: int = seed
            ) -> tuple[float, dict[str, Any]]:
                if method == "full" and options.rows is None:
                    return fine_tuned(seed, options)
                # Named by its settings: stopped and started again, the run goes on from its last checkpoint.
                folder = (
                    WORK
                    / "methods"
                    / f"quality-{method}-{seed}-{rows}-{recipe.learning_rate}-{recipe.epochs}-{options.precision}"
                )
                data = sources.data_section("sst2", limit=rows)
                training = vars(recipe) | {"weight_decay": quality.WEIGHT_DECAY, "warmup": quality.WARMUP}
                training |= {"seed": seed, "precision": options.precision, "threads": options.threads}
                config = config_of(method, folder, data, encoder_folder(), **training)
                found = turn(
                    sys.executable, "regraft_train.py", {"config": config, "folder": folder}, threads=options.threads
                )
                details = {key: found[key] for key in ("run_seconds", "best_step", "peak_bytes")}
                details["adapter_mb"] = adapter_mb(folder / "run" / "best")
                shutil.rmtree(folder, ignore_errors=True)
                return 100 * found["metrics"]["dev"]["accuracy"], details

            yield Piece("quality", ACCURACY, method, seed, settings, measure)


def fine_tuned(seed: int, options: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Full fine-tuning as quality.py does it: the same run, so one that it has measured is not made again."""
    found = quality.measured("sst2", OURS, seed, argparse.Namespace(**{**vars(options), "out": None}))
    details = {key: found.details[key] for key in ("best_step", "own_figures")}
    return found.value, details | {"run_seconds": found.details["seconds"], "measured by": "quality.py"}


def adapter_mb(best: Path) -> float:
    """What a run leaves to be kept beside its backbone, or all of it."""
    names = ("adapter_model.safetensors", "model.safetensors")
    return next((best / name).stat().st_size for name in names if (best / name).is_file()) / 1e6


def _speed(options: argparse.Namespace) -> Iterator[Piece]:
    case = QUICK if options.quick else CASE
    peer = TrainerWithPeft(case, options)
    for number in range(case.rounds):
        for method in ("full", "lora", "qlora", "adapter"):
            settings = {**vars(case), "precision": options.precision, "threads": options.threads}

            def measure(method: str = method, number: int = number) -> tuple[float, dict[str, Any]]:
                return windowed(method, encoder_folder(), case, options, seed=number)

            yield Piece("speed", SPEED, method, number, settings | {"more": SECTIONS.get(method)}, measure)
        settings = {**vars(case), "threads": options.threads, "compile": not options.no_compile}
        yield Piece("speed", SPEED, PEER, number, settings, lambda number=number: peer.best(seed=number))


def windowed(
    method: str, model: Path, case: train_cpu.Case, options: argparse.Namespace, *, seed: int, steps: int | None = None
) -> tuple[float, dict[str, Any]]:
    """Tokens a second over a window of steps, peak memory of the process, and what the run leaves."""
    folder, files = train_cpu.fresh("regraft"), train_cpu.prepare("sst2", case)
    window = steps or case.window_steps
    training = {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "batch_size": case.batch_size,
        "max_steps": case.warmup_steps + window,
        "epochs": 100,
        "warmup": 0,
        "seed": seed,
        "precision": options.precision,
        "threads": options.threads,
        "checkpoint_every": 500,
        "max_length": case.max_length,
    }
    data = {split: str(path) for split, path in files.items()}
    spec = {"config": config_of(method, folder, data, model, **training), "folder": folder}
    spec |= {"warmup_steps": case.warmup_steps, "window_steps": window}
    value, details = train_cpu.speed(turn(sys.executable, "regraft_train.py", spec, threads=options.threads))
    details["adapter_mb"] = adapter_mb(folder / "run" / "best")
    return value, details


class TrainerWithPeft(train_cpu.Trainer):
    """transformers' Trainer with peft's LoRA, in the settings that are fastest for it; they are looked for once."""

    environment = "trainer_peft"

    def more(self, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        layers = ["query", "key", "value", "dense"]
        return {"lora": {"r": 8, "lora_alpha": 16, "target_modules": layers, "modules_to_save": ["classifier"]}}

    def __init__(self, case: train_cpu.Case, options: argparse.Namespace) -> None:
        self.case, self.options = case, options
        self.found: tuple[train_cpu.Trial, dict[str, Any]] | None = None

    def best(self, *, seed: int) -> tuple[float, dict[str, Any]]:
        if self.found is None:
            self.python, self.files = peer_python(self.environment), train_cpu.prepare("sst2", self.case)
            self.found = self.search()
        trial, tried = self.found
        value, details = self.grouped(trial, seed=seed)
        return value, details | {"settings of the peer": str(trial), "tried": tried}


def _table(options: argparse.Namespace, methods: list[str]) -> Iterator[Piece]:
    for name in options.models.split(",")[: 1 if options.quick else None]:
        warmup, steps = QUICK_STEPS if options.quick else TABLE_STEPS if name == "MiniLM" else LARGE_STEPS
        case = dataclasses.replace(QUICK if options.quick else CASE, warmup_steps=warmup)
        for method in methods if not options.quick else methods[:3]:
            if (name, method) in (NO_BIASES, NO_PREFIX):
                continue
            settings = {
                "warmup": warmup,
                "steps": steps,
                "rows": case.rows,
                "precision": options.precision,
                "threads": options.threads,
            }
            settings |= {"more": SECTIONS.get(method)}

            def measure(
                name: str = name, method: str = method, case: train_cpu.Case = case, steps: int = steps
            ) -> tuple[float, dict[str, Any]]:
                model = encoder(name, options)
                folder, files = train_cpu.fresh("plan"), train_cpu.prepare("sst2", case)
                data = {split: str(path) for split, path in files.items()}
                training = {"max_steps": case.warmup_steps + steps, "epochs": 100, "batch_size": case.batch_size}
                training |= {"precision": options.precision, "threads": options.threads}
                spec = {"config": config_of(method, folder, data, model, **training), "folder": folder}
                plan = turn(sys.executable, "regraft_plan.py", spec, threads=options.threads)
                if not plan["fits"]:
                    raise TurnFailed(f"{name}, {method}: needs {plan['peak_bytes'] / 1e9:.1f} GB, more than there is")
                rate, details = windowed(method, model, case, options, seed=0, steps=steps)
                more = {"plan": plan, "tokens_per_second": rate, **details}
                return plan["peak_bytes"] / details["peak_bytes"], more

            yield Piece("table", PLAN, f"{name}, {method}", 0, settings, measure)


def encoder(name: str, options: argparse.Namespace) -> Path:
    """MiniLM itself, or an encoder of another size with random weights, made once."""
    if name == "MiniLM":
        return encoder_folder()
    folder = WORK / "encoders" / name
    if not (folder / "tokenizer.json").is_file():
        spec = {"name": name, "tokenizer": encoder_folder(), "folder": folder}
        turn(sys.executable, "random_encoder.py", spec, threads=options.threads)
    return folder


def _processes(options: argparse.Namespace) -> Iterator[Piece]:
    case = QUICK if options.quick else CASE
    for number in range(case.rounds):
        for who, flags in ((ONE, []), (TWO, ["--processes", "2"])):
            settings = {**vars(case), "precision": options.precision, "flags": flags, "threads": options.threads}

            def measure(flags: list[str] = flags, number: int = number) -> tuple[float, dict[str, Any]]:
                folder, files = train_cpu.fresh("processes"), train_cpu.prepare("sst2", case)
                # Whole log windows of ten steps, the first left out: it holds what is done once.
                training = {"max_steps": 20 if options.quick else 60, "epochs": 100, "batch_size": case.batch_size}
                training |= {"seed": number, "precision": options.precision, "max_length": case.max_length}
                data = {split: str(path) for split, path in files.items()}
                config = config_of("full", folder, data, encoder_folder(), **training)
                path = folder / "run.yaml"
                path.write_text(json.dumps(config), encoding="utf-8")
                command = [sys.executable, "-m", "regraft.engine", "train", path, "--quiet", *flags]
                run([str(part) for part in command], threads=options.threads)
                lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                rates = [r["tokens_per_second"] for r in map(json.loads, lines) if r["kind"] == "train"][1:]
                return statistics.harmonic_mean(rates), {"windows": rates}

            yield Piece("processes", PROCESSES, who, number, settings, measure)


def targets(cases: Mapping[str, Any]) -> list[Target]:
    """The figures that were promised, of what was measured."""
    found: list[Target] = []

    def over(case: str, what: str, a: str, b: str, **bound: float) -> None:
        """The median of ratios within a round, between neighbours in time."""
        by_round = {(one["who"], one["round"]): one["value"] for one in cases.get(case, {"runs": []})["runs"]}
        ratios = [value / by_round[b, n] for (who, n), value in by_round.items() if who == a and (b, n) in by_round]
        if ratios:
            found.append(Target(what, statistics.median(ratios), **bound))

    by_seed = {(one["who"], one["round"]): one["value"] for one in cases.get(ACCURACY, {"runs": []})["runs"]}
    for method, points in (("lora", 0.5), ("qlora", 1.0), ("adapter", 0.7)):
        gains = [
            value - by_seed["full", n]
            for (who, n), value in by_seed.items()
            if who == method and ("full", n) in by_seed
        ]
        if gains:
            what = f"{method} minus full, points of accuracy, mean over {len(gains)} seed(s)"
            found.append(Target(what, statistics.mean(gains), at_least=-points))
    over(SPEED, "lora / full, tokens/s", "lora", "full", at_least=CASE.at_least)
    over(SPEED, f"lora / {PEER}, tokens/s", "lora", PEER, at_least=CASE.at_least_best)
    over(MEMORY, "lora / full, peak memory", "lora", "full", at_most=0.6)
    over(PROCESSES, "two processes / one, tokens/s", TWO, ONE, at_least=0.95)
    planned = cases.get(PLAN, {"runs": []})["runs"]
    if planned:
        worst = max(abs(one["value"] - 1) for one in planned)
        found.append(Target(f"plan: largest error of {len(planned)} rows of the table", worst, at_most=0.1))
    for one in planned:
        if one["who"].endswith(", qlora"):
            plan = one["details"]["plan"]
            share = plan["memory"]["weights"] / (4 * plan["total"])
            found.append(Target(f"{one['who']}: weights over those of the whole model in fp32", share, at_most=0.35))
        if one["who"] == "MiniLM, lora":
            plan = one["details"]["plan"]
            found.append(Target("lora: share of parameters trained", plan["trained"] / plan["total"], at_most=0.02))
            found.append(Target("lora: adapter, MB", one["details"]["adapter_mb"], at_most=1.5))
    return found


if __name__ == "__main__":
    main()
