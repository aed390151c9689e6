"""What token labelling, question answering and masked words reach on real data, points of 100 (perplexity as it is).

Every case trains with Regraft from the files as they are published, keeps the epoch that is best on the dev rows, and is
judged on test rows that training never saw (SQuAD: on dev, as is the custom; its best epoch is chosen by a tenth of the
training questions). A case that was measured before with the same settings is not measured again; `--restart` is.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
import multi
import sources
from environments import encoder_folder, our_versions
from harness import OURS, WORK, Claim, Run, Target, arguments, publish, turn

CLAIM = Claim("tasks", "Encoder tasks, MiniLM-L6: figures on real data sets, points of 100", "points")


@dataclass(frozen=True)
class Case:
    """How one data set is learned and judged: `metric` on the split that is named."""

    metric: str
    split: str
    data: dict[str, Any]
    task: dict[str, Any]
    at_least: float | None = None
    learning_rate: float = 1e-4
    head_learning_rate: float | None = None
    epochs: int = 4
    batch_size: int = 32
    max_length: int = 256
    extra: dict[str, Any] = field(default_factory=dict)


WNUT = {
    "train": "wnut17/wnut17train.conll",
    "dev": "wnut17/emerging.dev.conll",
    "test": "wnut17/emerging.test.annotated",
    "format": "conll",
}
NCBI = {
    "train": "bio-ncbi-disease/train.tsv.gz",
    "dev": "bio-ncbi-disease/devel.tsv",
    "test": "bio-ncbi-disease/test.tsv",
    "format": "conll",
}
EWT = {split: f"ud-en-ewt/en_ewt-ud-{split}.conllu.gz" for split in ("train", "dev", "test")}
SQUAD = {"train": "squad1/train-part-du-test.json.gz", "test": "squad1/dev-v1.1.json.gz", "dev_fraction": 0.05}
CASES = {
    "ewt-pos": Case("accuracy", "test", EWT, {"type": "tagging"}, at_least=94.0),
    "wnut17-linear": Case("f1", "test", WNUT, {"type": "tagging"}, at_least=40.0, epochs=6),
    "wnut17-crf": Case(
        "f1", "test", WNUT, {"type": "tagging", "crf": True}, at_least=40.0, epochs=6, head_learning_rate=1e-3
    ),
    "ncbi-disease": Case("f1", "test", NCBI, {"type": "tagging"}, at_least=80.0, epochs=6),
    "squad1-em": Case(
        "exact_match", "test", SQUAD, {"type": "answering"}, at_least=55.0, epochs=3, batch_size=16, max_length=384
    ),
    "squad1-f1": Case(
        "f1", "test", SQUAD, {"type": "answering"}, at_least=67.0, epochs=3, batch_size=16, max_length=384
    ),
}
QUICK_ROWS = 60


def main() -> None:
    parser = arguments(__doc__, rounds=None)
    known = [*CASES, multi.NAME]
    parser.add_argument("--only", default=",".join(known), help="cases, with commas (%(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="with commas (%(default)s)")
    parser.add_argument("--restart", action="store_true", help="train again what was trained before")
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)}: not one of {', '.join(known)}")
    seeds = [int(seed) for seed in options.seeds.split(",")][: 1 if options.quick else None]
    before = machine.facts()
    runs: list[Run] = []
    for name in names:
        for seed in seeds:
            found = multi.measured(seed, options) if name == multi.NAME else [measured(name, seed, options)]
            runs += found
            for run in found:
                print(f"{run.case} seed {seed}: {run.who} {run.value:.2f}", file=sys.stderr, flush=True)
    settings = {name: asdict(CASES[name]) for name in names if name in CASES} | multi.settings()
    publish(
        CLAIM, runs, options, versions={"regraft": our_versions()}, settings=settings, targets=targets, before=before
    )


def targets(cases: dict[str, Any]) -> list[Target]:
    """The figures that were promised for this machine's size."""
    found = multi.targets(cases)
    for name, case in ((name, case) for name, case in cases.items() if name in CASES):
        what, wanted = f"{name}, {CASES[name].metric} on {CASES[name].split}, median of seeds", CASES[name].at_least
        found.append(Target(what, case["medians"][OURS], at_least=wanted))
    medians = {name: case["medians"][OURS] for name, case in cases.items()}
    if {"wnut17-crf", "wnut17-linear"} <= medians.keys():
        gain = medians["wnut17-crf"] - medians["wnut17-linear"]
        found.append(Target("wnut17, the CRF less the linear head", gain, at_least=0.0))
    return found


def measured(name: str, seed: int, options: argparse.Namespace) -> Run:
    """A trained model's figure: kept from before, or made now."""
    case = CASES[name]
    config = configuration(case, seed, options)
    mark = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    folder = WORK / "tasks" / mark  # two figures of one training share it
    if options.restart:
        shutil.rmtree(folder, ignore_errors=True)
    kept = folder / "found.json"
    if not kept.is_file():
        spec = {"config": {**config, "run": str(folder / "run")}, "folder": folder}
        found = turn(sys.executable, "regraft_train.py", spec, threads=options.threads)
        kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
    found = json.loads(kept.read_text(encoding="utf-8"))
    value = 100 * found["metrics"][case.split][case.metric]
    return Run(name, OURS, seed, value, {"seconds": found["run_seconds"], "own_figures": found["metrics"]})


def configuration(case: Case, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    root = sources.data_root()
    data = {key: str(root / value) if key in ("train", "dev", "test") else value for key, value in case.data.items()}
    if options.quick:
        data["limit"] = QUICK_ROWS
        data |= {"train": data["train"], "test": short(data["test"], data.get("format"))}
        data.pop("dev", None)
    return {
        "model": {"name": str(encoder_folder()), "max_length": case.max_length},
        "task": {**case.task, "metric": case.metric if case.task["type"] == "tagging" else "f1"},
        "data": data,
        "training": {
            "learning_rate": case.learning_rate,
            "head_learning_rate": case.head_learning_rate,
            "batch_size": case.batch_size,
            "epochs": 1 if options.quick else case.epochs,
            "seed": seed,
            "threads": options.threads,
        },
    }


def short(path: str, form: str | None) -> str:
    """A few test rows, for --quick."""

    file = Path(path)
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as content_of:
        text = content_of.read()
    target = WORK / "tasks" / f"short-{file.name.removesuffix('.gz')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if ".json" in file.name:
        content = json.loads(text)
        content["data"] = [{**content["data"][0], "paragraphs": content["data"][0]["paragraphs"][:5]}]
        text = json.dumps(content)
    else:
        text = "\n\n".join(text.split("\n\n")[:QUICK_ROWS]) + "\n"
    target.write_text(text, encoding="utf-8")
    return str(target)


if __name__ == "__main__":
    main()
