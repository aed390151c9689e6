"""Which layers a frozen encoder's token features are best taken from: BERT's table 7, on WNUT-17 and NCBI-disease.

A BiLSTM over stored features of the embeddings, of each layer, of the last four side by side and of all in a learned
mix, beside fine-tuning the whole encoder; F1 on test, points of 100. The epoch that is best on dev counts.
Made to be done in pieces: what was measured with the same settings is taken from bench/.data/layers/ or from the
published result, and what is published is all that was measured so far. `--restart` trains again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import machine
from environments import encoder_folder, our_versions
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
    published_with,
    side_by_side,
    threads_of,
    turn,
)
from task_cases import CONLL, NCBI, WNUT
from tasks import QUICK_ROWS, short

CLAIM = Claim(
    "layers",
    "Frozen MiniLM-L6 + BiLSTM by layer, and fine-tuning: F1 on test, points of 100",
    "points",
    compare="difference",
)
DATA = {"wnut17": WNUT | CONLL, "ncbi": NCBI | CONLL}
DEPTH = 6
FROZEN = {"learning_rate": 1e-3, "epochs": 12, "batch_size": 32}
TUNED = {"learning_rate": 1e-4, "epochs": 6, "batch_size": 32}
MAX_LENGTH = 256
PUBLISHED = RESULTS / "layers.json"
LAST_FOUR, MIX, FULL = "last four, concatenated", "all, weighted sum", "fine-tuning"


def ways() -> dict[str, dict[str, Any]]:
    """The rows of the table: sections of a run's configuration."""

    def frozen(layers: Any, mix: str = "scalar") -> dict[str, Any]:
        # Stored in bf16: the encoder computes in it where the machine is fast at it, so nothing more is lost.
        return {
            "method": "frozen",
            "features": {"layers": layers, "precision": "bf16", "limit_gb": 24},
            "head": {"type": "bilstm", "hidden": 200, "dropout": 0.3, "mix": mix},
            "training": FROZEN,
        }

    one = {f"layer {n}": frozen(n) for n in range(1, DEPTH + 1)}
    return {
        "embeddings": frozen("embeddings"),
        **one,
        LAST_FOUR: frozen("last4", "concat"),
        MIX: frozen("all"),
        FULL: {"method": "full", "training": TUNED},
    }


WAYS = ways()
CASES = [f"{data}, {way}" for data in DATA for way in WAYS]


def main() -> None:
    parser = arguments(__doc__, rounds=None)
    parser.add_argument("--only", help="data sets or cases, with semicolons; default: all")
    parser.add_argument("--seeds", default="0,1,2", help="with commas (%(default)s)")
    parser.add_argument("--restart", action="store_true", help="train again what was trained before")
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="runs side by side, which share the threads (%(default)s)"
    )
    options = parser.parse_args()
    names = chosen(options.only, parser)
    seeds = [int(seed) for seed in options.seeds.split(",")][: 1 if options.quick else None]
    before = machine.facts()

    def one(what: tuple[str, int]) -> None:
        name, seed = what
        print(f"{name} seed {seed}: {measured(name, seed, options).value:.2f}", file=sys.stderr, flush=True)

    every = [(name, seed) for seed in seeds for name in names]
    side_by_side(one, every, options.at_once)
    options.restart = False  # what was not trained again still stands
    runs = [earlier(name, seed, options) for name in CASES for seed in sorted({0, 1, 2, *seeds})]
    known = [run for run in runs if run is not None]
    settings = {run.case: configuration(run.case, 0, options) for run in known}
    for one in settings.values():
        one.pop("model"), one.pop("data")  # of this machine
    publish(
        CLAIM, known, options, versions={"regraft": our_versions()}, settings=settings, targets=targets, before=before
    )


def chosen(only: str | None, parser: argparse.ArgumentParser) -> list[str]:
    names: list[str] = []
    for part in (only or ";".join(DATA)).split(";"):
        found = [case for case in CASES if part.strip() in (case, case.split(", ")[0])]
        if not found:
            parser.error(
                f"--only: {part.strip()!r}: neither a data set ({', '.join(DATA)}) nor one of {'; '.join(CASES)}"
            )
        names += found
    return names


def configuration(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    import sources

    data, way = name.split(", ", 1)
    root = sources.data_root()
    files = {key: str(root / v) if key in ("train", "dev", "test") else v for key, v in DATA[data].items()}
    settings = WAYS[way]
    training = {**settings["training"], "seed": seed, "threads": threads_of(options)}
    if options.quick:
        files |= {"limit": QUICK_ROWS, "test": short(files["test"], files["format"])}
        files.pop("dev")
        training["epochs"] = 1
    return {
        **settings,
        "model": {"name": str(encoder_folder()), "max_length": MAX_LENGTH},
        "task": {"type": "tagging"},
        "data": files,
        "training": training,
    }


def work_folder(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a case is trained; its figures are kept beside it. Other settings give another place."""
    data, way = name.split(", ", 1)
    what = [data, WAYS[way], MAX_LENGTH, seed, bool(options.quick)]
    return WORK / "layers" / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def earlier(name: str, seed: int, options: argparse.Namespace) -> Run | None:
    """A figure measured before with the same settings: from its work file, or from the published result."""
    folder = work_folder(name, seed, options)
    kept = folder.with_suffix(".json")
    if kept.is_file():
        details = json.loads(kept.read_text(encoding="utf-8"))
        return Run(name, OURS, seed, 100 * details["metrics"]["test"]["f1"], details | {"settings": folder.name})
    if options.restart:
        return None
    return next((run for run in published_with(options.out or PUBLISHED, folder.name) if run.case == name), None)


def measured(name: str, seed: int, options: argparse.Namespace) -> Run:
    """A trained model's figure: kept from before, or made now."""
    folder = work_folder(name, seed, options)
    kept = folder.with_suffix(".json")
    if options.restart:
        shutil.rmtree(folder, ignore_errors=True)
        kept.unlink(missing_ok=True)
    if earlier(name, seed, options) is None:
        config = configuration(name, seed, options) | {"run": str(folder / "run")}
        found = turn(
            sys.executable, "regraft_train.py", {"config": config, "folder": folder}, threads=threads_of(options)
        )
        details = {"metrics": found["metrics"], "seconds": found["run_seconds"], "best_step": found["best_step"]}
        details |= {"layer_weights": layer_weights(folder / "run"), "commit": our_versions().get("commit", "")}
        beside = kept.with_suffix(".tmp")
        beside.write_text(json.dumps(details, indent=1), encoding="utf-8")
        beside.replace(kept)
        shutil.rmtree(folder, ignore_errors=True)
    run = earlier(name, seed, options)
    if run is None:
        raise TurnFailed(f"{kept}: was written and is gone")
    return run


def layer_weights(run: Path) -> list[float]:
    """What the learned mix gave each layer; empty where nothing was mixed."""
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8")).get("layer_weights", {})
    return [round(layer["weight"], 4) for layer in found.get("layers", [])]


def targets(cases: Mapping[str, Any]) -> list[Target]:
    """The table's shape: a late-middle layer beats the last; four layers side by side come near fine-tuning."""
    medians = {name: case["medians"][OURS] for name, case in cases.items()}
    found = []
    for data in DATA:
        middle = [medians[f"{data}, layer {n}"] for n in range(2, DEPTH) if f"{data}, layer {n}" in medians]
        last, four, full = (medians.get(f"{data}, {way}") for way in (f"layer {DEPTH}", LAST_FOUR, FULL))
        if middle and last is not None:
            found.append(
                Target(f"{data}, the best layer before the last, less the last", max(middle) - last, at_least=0.0)
            )
        if four is not None and full is not None:
            found.append(Target(f"{data}, fine-tuning less the last four concatenated", full - four, at_most=5.0))
    return found


if __name__ == "__main__":
    main()
