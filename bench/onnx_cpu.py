"""Sentences a second on CPU, without a server: packed fp32 graph, padded fp32 graph, packed int8 graph, and optimum's.

All are the same fine-tuned MiniLM-L6 on SST-2 dev, tokenising included. `padded` is the exported padded graph in plain
ONNX Runtime, in an environment of its own, each batch padded to its longest sentence; `padded-grouped` is the same
graph in Regraft's session, which runs sentences of like length together; `optimum` is the graph that optimum exports
from the same folder, in optimum's own ONNX Runtime model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import sources
from environments import encoder_folder, our_versions, peer_python, versions
from harness import (
    OURS,
    WORK,
    Claim,
    Run,
    Target,
    TurnFailed,
    arguments,
    publish,
    run,
    take_turns,
    turn,
)

CLAIM = Claim(
    "onnx_cpu", "Fine-tuned MiniLM-L6 on SST-2 dev, tokenising included: sentences a second on CPU", "sentences/s"
)
CASES = {"batch 1": (1, False), "batch 32": (32, False), "batch 32, sorted": (32, True)}
BUNDLES = {"packed": [], "padded": ["--layout", "padded"], "int8": ["--int8"]}
REGRAFT = [sys.executable, "-m", "regraft.engine"]


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--run", type=Path, help="a run folder of an SST-2 model; default: one is trained, and kept")
    parser.add_argument("--passes", type=int, default=2, help="times over the dev rows in a turn (%(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.passes = 1, 1
    before = machine.facts()
    rows = sources.read("sst2", "dev")[: 64 if options.quick else None]
    trained = options.run or train(options)
    bundles, refused = export(trained, WORK / "onnx_cpu", options)
    shutil.rmtree(WORK / "onnx_cpu" / "optimum", ignore_errors=True)  # a graph of another model, perhaps
    runs: list[Run] = []
    for case, (batch, sort) in CASES.items():
        kept = by_length(rows, bundles["packed"]) if sort else rows
        file = sources.write_jsonl(kept, f"onnx_cpu/{'sorted' if sort else 'as-they-come'}.jsonl")
        turns = {OURS: answer(bundles["packed"], file, kept, batch, options, ours=True)}
        turns["padded"] = answer(bundles["padded"], file, kept, batch, options, ours=False)
        turns["optimum"] = answer(bundles["padded"], file, kept, batch, options, ours=False, optimum=trained / "best")
        turns["padded-grouped"] = answer(bundles["padded"], file, kept, batch, options, ours=True)
        if "int8" in bundles:
            turns["regraft-int8"] = answer(bundles["int8"], file, kept, batch, options, ours=True)
        runs += take_turns(case, turns, options.rounds)
    settings = {case: {"rows": len(rows), "passes": options.passes, "int8 refused": refused} for case in CASES}
    found = {
        "regraft": our_versions(),
        "padded": versions(peer_python("onnx"), ("onnxruntime", "tokenizers", "numpy")),
        "optimum": versions(peer_python("optimum"), ("optimum", "optimum-onnx", "transformers", "onnxruntime")),
    }
    publish(CLAIM, runs, options, versions=found, settings=settings, targets=targets, before=before)


def train(options: argparse.Namespace) -> Path:
    """An SST-2 run long enough for a real accuracy; kept, and gone on with when it was stopped."""
    name = "quick" if options.quick else "sst2"
    folder = WORK / "onnx_cpu" / f"run-{name}"
    data = sources.data_section("sst2", limit=320 if options.quick else 20_000)
    if options.quick:
        data.pop("dev")
    config = {
        "run": str(folder),
        "model": {"name": str(encoder_folder()), "max_length": 128},
        "data": data,
        "training": {"batch_size": 32, "epochs": 1, "learning_rate": 5e-5, "threads": options.threads},
    }
    path = WORK / "onnx_cpu" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    run([*REGRAFT, "train", path], threads=options.threads)
    return folder


def export(source: Path, into: Path, options: argparse.Namespace) -> tuple[dict[str, Path], str | None]:
    """The bundles by name, and why int8 was refused if it was."""
    bundles, refused = {}, None
    for name, flags in BUNDLES.items():
        bundle = into / f"bundle-{name}"
        shutil.rmtree(bundle, ignore_errors=True)
        if name == "int8" and options.quick:
            flags = [*flags, "--max-loss", "100"]  # a hardly trained model would be searched for layers that bear it
        try:
            run([*REGRAFT, "export", source, "--to", bundle, *flags], threads=options.threads)
        except TurnFailed as error:
            if name != "int8":
                raise
            refused = str(error).splitlines()[-1]
            print(f"int8: {error}", file=sys.stderr)
            continue
        bundles[name] = bundle
    return bundles, refused


def by_length(rows: Sequence[sources.Row], bundle: Path) -> list[sources.Row]:
    """The rows, shortest first, by their number of tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.no_padding()
    lengths = [len(item.ids) for item in tokenizer.encode_batch([row["text"] for row in rows])]
    return [rows[i] for i in sorted(range(len(rows)), key=lengths.__getitem__)]


def answer(
    bundle: Path,
    file: Path,
    rows: Sequence[sources.Row],
    batch: int,
    options: argparse.Namespace,
    *,
    ours: bool,
    optimum: Path | None = None,
) -> Any:
    """A contestant: sentences a second, and the accuracy of what it answered."""
    info = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    spec = {"folder": bundle, "rows": file, "batch": batch, "passes": options.passes, "threads": options.threads}
    spec |= {"max_length": info["max_length"], "pad_token_id": info["pad_token_id"]}
    labels = info["task"]["labels"]

    def go(number: int) -> tuple[float, dict]:
        if ours:
            found = turn(sys.executable, "regraft_answer.py", spec, threads=options.threads)
        elif optimum is not None:
            peer = spec | {"model": optimum, "work": WORK / "onnx_cpu" / "optimum"}
            found = turn(peer_python("optimum"), "peers/optimum_run.py", peer, threads=options.threads)
        else:
            found = turn(peer_python("onnx"), "peers/onnx_padded.py", spec, threads=options.threads)
        right = sum(labels[k] == row["label"] for k, row in zip(found["predicted"], rows, strict=True))
        value = found["sentences"] / found["seconds"]
        return value, {"seconds": found["seconds"], "accuracy": right / len(rows)}

    return go


def targets(cases: Mapping[str, Any]) -> list[Target]:
    found = [
        Target("packed / padded, batch 32", cases["batch 32"]["ratios"]["padded"], at_least=1.5),
        Target("packed / padded, batch 32, sorted", cases["batch 32, sorted"]["ratios"]["padded"], at_least=1.0),
    ]
    for case, summary in cases.items():
        if "regraft-int8" in summary["ratios"]:
            # The ratio says how many times better the fp32 graph is.
            found.append(Target(f"int8 / fp32, {case}", 1 / summary["ratios"]["regraft-int8"], at_least=1.5))
    accuracy = {r["who"]: r["details"]["accuracy"] for r in cases["batch 32"]["runs"]}
    if "regraft-int8" in accuracy:
        lost = 100 * (accuracy[OURS] - accuracy["regraft-int8"])
        found.append(Target("points of accuracy that int8 loses", lost, at_most=0.5))
    return [replace(target, measured=round(target.measured, 4)) for target in found]


if __name__ == "__main__":
    main()
