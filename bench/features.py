"""The feature store: extraction against sentence-transformers, an epoch over stored rows, what smaller precisions cost.

Extraction: MiniLM-L6, mean pooled and normalised, against `encode` at its best batch size; both from texts to
embeddings. Epoch: a linear head over all SST-2 rows against one fine-tuning epoch, from the tokens a second of a
window of it. Start: seconds until a second run on unchanged data takes its first step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import machine
import sources
from environments import encoder_folder, our_versions, peer_python, versions
from harness import OURS, WORK, Claim, Run, Target, TurnFailed, arguments, publish, take_turns, turn

CLAIM = Claim("features", "Features a second, an epoch over them, what they cost", "see case")
PEER = "sentence-transformers"
BATCHES = [8, 16, 32, 64, 128]
EPOCH, START = "epoch over stored rows, times faster than fine-tuning", "second start, seconds"
STORAGE = ("bf16", "fp16", "int8")


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--rows", type=int, default=8000, help="SST-2 rows to extract (%(default)s)")
    parser.add_argument("--documents", type=int, default=400, help="IMDb reviews to extract (%(default)s)")
    parser.add_argument("--train-rows", type=int, default=None, help="SST-2 rows to train heads on; default: all")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.rows, options.documents, options.train_rows = 1, 200, 16, 400
    before = machine.facts()
    rows = {"sst2": sources.sample(sources.read("sst2", "train"), options.rows, seed=1)}
    rows["imdb"] = sources.imdb(options.documents)
    runs: list[Run] = []
    for name, some in rows.items():
        path = sources.write_jsonl(some, f"features/{name}.jsonl")
        runs += Extraction(name, path, options).turns()
    runs += heads(options)
    found = {"regraft": our_versions()}
    peer = peer_python("sentence_transformers")
    found[PEER] = versions(peer, ("sentence-transformers", "torch", "transformers", "numpy"))
    publish(CLAIM, runs, options, versions=found, targets=targets, before=before)


class Extraction:
    """Sentences a second of one data set, ours and the peer's in turns, and how far the embeddings are apart."""

    def __init__(self, name: str, rows: Path, options: argparse.Namespace) -> None:
        self.name, self.rows, self.options = name, rows, options

    def turns(self) -> list[Run]:
        who = {OURS: self.ours, PEER: self.peer}
        runs = take_turns(f"extraction, {self.name}, sentences/s", who, self.options.rounds)
        runs.append(Run(f"cosine distance, {self.name}", OURS, 0, self.distance(), {}))
        return runs

    def ours(self, number: int) -> tuple[float, dict]:
        config = {
            "method": "frozen",
            "model": {"name": str(encoder_folder()), "max_length": 256},
            "data": {"train": str(self.rows)},
            "features": {"normalise": True},
            "training": {"threads": self.options.threads},
        }
        spec = {"config": config, "rows": self.rows, "embeddings": self.file(OURS)}
        found = turn(sys.executable, "regraft_encode.py", spec, threads=self.options.threads)
        return found["sentences"] / found["seconds"], found

    def peer(self, number: int) -> tuple[float, dict]:
        spec = {
            "model": encoder_folder(),
            "rows": self.rows,
            "batch_sizes": BATCHES[:2] if self.options.quick else BATCHES,
            "try_rows": 32 if self.options.quick else 1000 if self.name == "sst2" else 64,
            "threads": self.options.threads,
            "precision": "bf16" if machine_has_bf16() else "fp32",
            "embeddings": self.file(PEER),
        }
        found = turn(peer_python("sentence_transformers"), "peers/st_encode.py", spec, threads=self.options.threads)
        return found["sentences"] / found["seconds"], found

    def file(self, who: str) -> Path:
        return WORK / "features" / f"{self.name}-{who}.npy"

    def distance(self) -> float:
        import numpy as np

        ours, theirs = np.load(self.file(OURS)), np.load(self.file(PEER))
        return float((1 - (ours * theirs).sum(axis=1)).max())


def machine_has_bf16() -> bool:
    from regraft.engine.machine import cpu_has_bf16

    return cpu_has_bf16()


def heads(options: argparse.Namespace) -> list[Run]:
    """An epoch of a linear head, a second start, and the metric at every storage precision."""
    section = sources.data_section("sst2", limit=options.train_rows)
    if options.quick:
        few = {name: sources.sample(sources.read("sst2", name), 128) for name in ("train", "dev")}
        section = {name: str(sources.write_jsonl(rows, f"features/few-{name}.jsonl")) for name, rows in few.items()}
    base = {
        "model": {"name": str(encoder_folder()), "max_length": 128},
        "data": section,
        "training": {"threads": options.threads, "batch_size": 32},
    }
    runs = []
    accuracy = {}
    store = WORK / "features" / "store"
    for precision in ("fp32", *STORAGE):
        found = trained(
            base,
            {"method": "frozen", "features": {"precision": precision, "store": str(store)}},
            {"epochs": 10},
            options,
        )
        accuracy[precision] = found["metrics"]["dev"]["accuracy"]
        if precision != "fp32":
            runs.append(
                Run(f"points lost, {precision}", OURS, 0, 100 * (accuracy["fp32"] - accuracy[precision]), accuracy)
            )
    runs.append(Run("int8, bytes a value", OURS, 0, bytes_a_value(store), {}))
    tune = trained(base, {"method": "full"}, {"max_steps": 60 if not options.quick else 6}, options, window=True)
    epoch = trained(base, {"method": "frozen", "features": {"store": str(store)}}, {"epochs": 2}, options)
    rows = tune["tokens"] / tune["seconds"]
    fine = epoch["tokens_an_epoch"] / rows
    runs.append(Run(EPOCH, OURS, 0, fine / epoch["epoch_seconds"], {"fine_tuning_epoch_seconds": fine, **epoch}))
    runs.append(Run(START, OURS, 0, epoch["seconds_to_first_step"], {}))
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
    notes = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["data"]["train"]
    epochs = max(steps[-1]["epoch"], 1e-9)
    return found | {
        "seconds_to_first_step": start["seconds_to_first_step"],
        "epoch_seconds": steps[-1]["seconds"] / epochs,
        "tokens_an_epoch": notes["tokens"],
    }


def bytes_a_value(store: Path) -> float:
    """Bytes of features and scales over the number of values, of an int8 store."""
    for about in store.glob("*/store.json"):
        spec = json.loads(about.read_text(encoding="utf-8"))
        if spec["precision"] == "int8":
            sizes = values = 0
            for shard in about.parent.glob("[!.]*.safetensors"):
                with shard.open("rb") as file:
                    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                for name in ("features", "scales"):
                    first, last = header[name]["data_offsets"]
                    sizes += last - first
                    values += (last - first) if name == "features" else 0
            return sizes / values
    raise TurnFailed(f"{store}: no int8 store")


def targets(cases: Mapping[str, Any]) -> list[Target]:
    """What was promised of these figures."""
    found = []
    for name, ratio in (("sst2", 2.0), ("imdb", 1.5)):
        ratios = cases[f"extraction, {name}, sentences/s"]["ratios"]
        found.append(Target(f"times {PEER}, {name}", ratios[PEER], at_least=ratio))
        found.append(
            Target(f"cosine distance, {name}", cases[f"cosine distance, {name}"]["medians"][OURS], at_most=1e-3)
        )
    found.append(Target(EPOCH, cases[EPOCH]["medians"][OURS], at_least=100))
    found.append(Target(START, cases[START]["medians"][OURS], at_most=2.0))
    found.append(Target("int8, bytes a value", cases["int8, bytes a value"]["medians"][OURS], at_most=1.1))
    found.append(Target("points lost, int8", cases["points lost, int8"]["medians"][OURS], at_most=0.2))
    return found


if __name__ == "__main__":
    main()
