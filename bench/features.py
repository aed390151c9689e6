"""The feature store: extraction against sentence-transformers, an epoch over stored rows, what smaller precisions cost.

Extraction: MiniLM-L6, mean pooled and normalised, against `encode` at its best batch size; both from texts to
embeddings and in the same precision; how far the embeddings are from the peer's in fp32. Epoch: a linear head over all
SST-2 rows against one fine-tuning epoch, from the tokens a second of a window of it. Start: seconds until a second run on
unchanged data takes its first step. With `--only` the other parts stay as they were published.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
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
    run,
    take_turns,
    turn,
)

CLAIM = Claim("features", "Features a second, an epoch over them, what they cost", "see case")
PEER = "sentence-transformers"
BATCHES = [8, 16, 32, 64, 128]
IMPORT = "of which importing torch, by itself, seconds"
EPOCH, START = "epoch over stored rows, times faster than fine-tuning", "second start, seconds"
STORAGE = ("bf16", "fp16", "int8")
STORE = WORK / "features" / "store"
PARTS = ("sst2", "imdb", "storage", "epoch")


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--rows", type=int, default=8000, help="SST-2 rows to extract (%(default)s)")
    parser.add_argument("--documents", type=int, default=400, help="IMDb reviews to extract (%(default)s)")
    parser.add_argument("--train-rows", type=int, default=None, help="SST-2 rows to train heads on; default: all")
    parser.add_argument(
        "--only", choices=PARTS, help="extraction of one data set, what storing costs, or how fast heads are"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.rows, options.documents, options.train_rows = 1, 200, 16, 400
    before = machine.facts()
    parts = PARTS if options.only is None else (options.only,)
    runs: list[Run] = []
    if "sst2" in parts:
        runs += extraction("sst2", sources.sample(sources.read("sst2", "train"), options.rows, seed=1), options)
    if "imdb" in parts:
        runs += extraction("imdb", sources.imdb(options.documents), options)
    if "storage" in parts:
        runs += storage(options)
    if "epoch" in parts:
        runs += epochs(options)
    kept = {}
    if options.only is not None and not options.quick:
        kept = published_cases(options.out or RESULTS / "features.json", without=[run.case for run in runs])
    found = {"regraft": our_versions()}
    peer = peer_python("sentence_transformers")
    found[PEER] = versions(peer, ("sentence-transformers", "torch", "transformers", "numpy"))
    publish(CLAIM, runs, options, versions=found, targets=targets, before=before, kept=kept)


def extraction(name: str, rows: list[sources.Row], options: argparse.Namespace) -> list[Run]:
    """Both sides in every precision that the machine is fast at; fp32 first, whose embeddings are what others are held to."""
    path = sources.write_jsonl(rows, f"features/{name}.jsonl")
    return [run for precision in precisions() for run in Extraction(name, path, precision, options).turns()]


def precisions() -> tuple[str, ...]:
    return ("fp32", "bf16") if machine_has_bf16() else ("fp32",)


def speed_case(name: str, precision: str) -> str:
    return f"extraction, {name}, {precision}, sentences/s"


def distance_case(name: str, precision: str) -> str:
    return f"cosine distance, {name}, {precision}"


class Extraction:
    """Sentences a second of one data set, ours and the peer's in turns, and how far the embeddings are apart."""

    def __init__(self, name: str, rows: Path, precision: str, options: argparse.Namespace) -> None:
        self.name, self.rows, self.precision, self.options = name, rows, precision, options

    def turns(self) -> list[Run]:
        who = {OURS: self.ours, PEER: self.peer}
        runs = take_turns(speed_case(self.name, self.precision), who, self.options.rounds)
        runs.append(Run(distance_case(self.name, self.precision), OURS, 0, self.distance(OURS), {}))
        if self.precision != "fp32":
            runs.append(Run(distance_case(self.name, self.precision), PEER, 0, self.distance(PEER), {}))
        return runs

    def ours(self, number: int) -> tuple[float, dict]:
        config = {
            "method": "frozen",
            "model": {"name": str(encoder_folder()), "max_length": 256},
            "data": {"train": str(self.rows)},
            "features": {"normalise": True},
            "training": {"threads": self.options.threads, "precision": self.precision},
        }
        spec = {"config": config, "rows": self.rows, "embeddings": self.file(OURS, self.precision)}
        found = turn(sys.executable, "regraft_encode.py", spec, threads=self.options.threads)
        return found["sentences"] / found["seconds"], found

    def peer(self, number: int) -> tuple[float, dict]:
        spec = {
            "model": encoder_folder(),
            "rows": self.rows,
            "batch_sizes": BATCHES[:2] if self.options.quick else BATCHES,
            "try_rows": 32 if self.options.quick else 1000 if self.name == "sst2" else 64,
            "threads": self.options.threads,
            "precision": self.precision,
            "embeddings": self.file(PEER, self.precision),
        }
        found = turn(peer_python("sentence_transformers"), "peers/st_encode.py", spec, threads=self.options.threads)
        return found["sentences"] / found["seconds"], found

    def file(self, who: str, precision: str) -> Path:
        return WORK / "features" / f"{self.name}-{who}-{precision}.npy"

    def distance(self, who: str) -> float:
        """The largest, from the peer's embeddings in fp32."""
        import numpy as np

        found, reference = np.load(self.file(who, self.precision)), np.load(self.file(PEER, "fp32"))
        return float((1 - (found.astype(np.float64) * reference).sum(axis=1)).max())


def machine_has_bf16() -> bool:
    from regraft.engine.machine import cpu_has_bf16

    return cpu_has_bf16()


def base_of(options: argparse.Namespace) -> dict[str, Any]:
    """What runs on SST-2 have in common."""
    section = sources.data_section("sst2", limit=options.train_rows)
    if options.quick:
        few = {name: sources.sample(sources.read("sst2", name), 128) for name in ("train", "dev")}
        section = {name: str(sources.write_jsonl(rows, f"features/few-{name}.jsonl")) for name, rows in few.items()}
    return {
        "model": {"name": str(encoder_folder()), "max_length": 128},
        "data": section,
        "training": {"threads": options.threads, "batch_size": 32},
    }


def frozen(precision: str = "fp32") -> dict[str, Any]:
    return {"method": "frozen", "features": {"precision": precision, "store": str(STORE)}}


def storage(options: argparse.Namespace) -> list[Run]:
    """What every storage precision costs: in the metric, a round a seed (one of SST-2's 872 dev rows is 0.11 points), and
    in bytes."""
    base, runs = base_of(options), []
    for seed in range(options.rounds):
        accuracy = {}
        for precision in ("fp32", *STORAGE):
            found = trained(base, frozen(precision), {"epochs": 10, "seed": seed}, options)
            accuracy[precision] = found["metrics"]["dev"]["accuracy"]
        for precision in STORAGE:
            lost = 100 * (accuracy["fp32"] - accuracy[precision])
            runs.append(Run(f"points lost, {precision}", OURS, seed, lost, accuracy))
    for precision in ("fp32", *STORAGE):
        a_value = bytes_a_value(STORE, precision)
        runs.append(Run(f"bytes of a text or token, {precision}", OURS, 0, a_value["bytes"] / a_value["rows"], a_value))
        if precision == "int8":
            runs.append(Run("int8, bytes a value", OURS, 0, a_value["bytes"] / a_value["values"], a_value))
    return runs


def epochs(options: argparse.Namespace) -> list[Run]:
    """An epoch of a linear head beside one of fine-tuning, and a second start beside what importing torch takes of it."""
    base, runs = base_of(options), []
    trained(base, frozen(), {"max_steps": 2}, options)  # the features are there from here on
    for number in range(options.rounds):
        tune = trained(base, {"method": "full"}, {"max_steps": 60 if not options.quick else 6}, options, window=True)
        epoch = trained(base, frozen(), {"epochs": 2}, options)
        fine = epoch["tokens_an_epoch"] / (tune["tokens"] / tune["seconds"])
        runs.append(
            Run(EPOCH, OURS, number, fine / epoch["epoch_seconds"], {"fine_tuning_epoch_seconds": fine, **epoch})
        )
        runs.append(Run(START, OURS, number, epoch["seconds_to_first_step"], {}))
        began = time.perf_counter()
        run([sys.executable, "-c", "import torch"], threads=options.threads)
        runs.append(Run(IMPORT, OURS, number, time.perf_counter() - began, {}))
    return runs


def trained(
    base: dict, over: dict, training: dict, options: argparse.Namespace, *, window: bool = False
) -> dict[str, Any]:
    """One run in a fresh process, with what its metrics.jsonl tells."""
    folder = WORK / "features" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    config = {**base, **over, "run": str(folder), "training": {**base["training"], **training}}
    spec: dict[str, Any] = {"config": config, "folder": WORK / "features"}
    if window:
        steps = training["max_steps"]
        spec |= {"warmup_steps": steps // 6, "window_steps": steps - steps // 6}
    found = turn(sys.executable, "regraft_train.py", spec, threads=options.threads)
    if over["method"] == "full":
        return found
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    start = next((r for r in lines if r["kind"] == "start"), None)
    if start is None:
        raise TurnFailed("the run has no first step")
    steps = [r for r in lines if r["kind"] == "train"]
    later = [r for r in steps if r["epoch"] > 1]  # between the evaluations: neither they nor what they import
    first, last = (later[0], later[-1]) if len(later) > 1 else ({"seconds": 0.0, "epoch": 0.0}, steps[-1])
    notes = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["data"]["train"]
    return found | {
        "seconds_to_first_step": start["seconds_to_first_step"],
        "epoch_seconds": (last["seconds"] - first["seconds"]) / max(last["epoch"] - first["epoch"], 1e-9),
        "tokens_an_epoch": notes["tokens"],
    }


def bytes_a_value(store: Path, precision: str) -> dict[str, int]:
    """Bytes of features and scales, values and rows of the store of a precision."""
    for about in store.glob("*/store.json"):
        if json.loads(about.read_text(encoding="utf-8"))["precision"] != precision:
            continue
        found = {"bytes": 0, "values": 0, "rows": 0}
        for shard in about.parent.glob("[!.]*.safetensors"):
            with shard.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            rows, layers, hidden = header["features"]["shape"]
            found["rows"] += rows
            found["values"] += rows * layers * hidden
            for name in {"features", "scales"} & header.keys():
                first, last = header[name]["data_offsets"]
                found["bytes"] += last - first
        return found
    raise TurnFailed(f"{store}: no {precision} store")


def targets(cases: Mapping[str, Any]) -> list[Target]:
    """What was promised of these figures, of those that were measured."""
    median = {name: case["medians"][OURS] for name, case in cases.items()}
    found = []
    for name, ratio in (("sst2", 2.0), ("imdb", 1.5)):
        fast = next((c for p in ("bf16", "fp32") if (c := speed_case(name, p)) in cases), None)
        if fast is not None:
            found.append(Target(f"times {PEER}, {name}", cases[fast]["ratios"][PEER], at_least=ratio))
        for precision, bound in (("bf16", 1e-3), ("fp32", 1e-5)):
            case = distance_case(name, precision)
            if case in median:
                found.append(Target(case, median[case], at_most=bound))
    promised = {
        "at_least": {EPOCH: 100.0},
        "at_most": {START: 2.0, "int8, bytes a value": 1.1, "points lost, int8": 0.2},
    }
    for bound, figures in promised.items():
        found += [Target(case, median[case], **{bound: v}) for case, v in figures.items() if case in median]
    return found


if __name__ == "__main__":
    main()
