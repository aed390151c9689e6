"""`regraft compare` on TREC-6 within ten minutes, and few-shot on banking77 against SetFit's own package.

The comparison measures every way there is; its table and curves are kept as results/compare_trec6.json. Few-shot: k rows a class,
the same rows and encoder for both, accuracy on the same test rows and seconds of training. SetFit runs with its own defaults
(20 pairs a row and kind, one epoch, batch 16). A split that was measured with the same settings is taken from
bench/.data/fewshot/ or from the published result (`--restart` measures it again), and with `--only` the other part stays
as it was published.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping
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
    published_with,
    run,
    side_by_side,
    threads_of,
    turn,
)

CLAIM = Claim("compare", "The comparison in its budget; few rows a class against SetFit", "see case")
PUBLISHED = RESULTS / "compare.json"
PEER = "setfit"
MINUTES, WAYS = "regraft compare on TREC-6, minutes", "regraft compare on TREC-6, ways measured"
ACCURACY, SECONDS = "few-shot accuracy, points", "few-shot training, runs an hour"


def main() -> None:
    parser = arguments(__doc__, rounds=10)
    parser.add_argument("--shots", type=int, default=8, help="rows a class (%(default)s)")
    parser.add_argument("--test-rows", type=int, default=1000, help="banking77 test rows (%(default)s)")
    parser.add_argument("--budget", default="10m", help="of regraft compare (%(default)s)")
    parser.add_argument("--only", choices=("compare", "few-shot"), help="one of the two parts")
    parser.add_argument("--restart", action="store_true", help="measure splits again that were measured before")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="splits side by side, which share the threads: their accuracy counts, their seconds do not (%(default)s)",
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.shots, options.test_rows, options.budget = 1, 2, 50, "60s"
    before = machine.facts()
    runs: list[Run] = []
    found = {"regraft": our_versions()}
    if options.only != "few-shot":
        runs += comparison(options)
    if options.only != "compare":
        runs += few_shot(options)
        found[PEER] = versions(peer_python("setfit"), ("setfit", "sentence-transformers", "torch", "transformers"))
    kept_cases = {}
    if options.only is not None and not options.quick:
        kept_cases = published_cases(options.out or PUBLISHED, without=[run.case for run in runs])
    publish(CLAIM, runs, options, versions=found, targets=targets, before=before, kept=kept_cases)


def comparison(options: argparse.Namespace) -> list[Run]:
    """The command as a user types it."""
    folder = WORK / "compare"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = sources.data_section("trec6", limit=400 if options.quick else None)
    config: dict[str, Any] = {
        "run": str(folder / "trec6"),
        "model": {"name": str(encoder_folder())},
        "data": data,
        "training": {"learning_rate": 1e-4, "epochs": 3, "threads": options.threads},
    }
    vectors = sources.data_root().parent / "models" / "glove-6B-50d-5k" / "glove-50d-5k.json"
    if vectors.is_file():
        config["words"] = {"vectors": str(vectors)}
    path = folder / "trec6.yaml"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    began = time.perf_counter()
    command = [sys.executable, "-m", "regraft.engine", "compare", path, "--ways", "all", "--budget", options.budget]
    run([*command, *(["--seeds", "1"] if options.quick else [])], threads=options.threads)
    minutes = (time.perf_counter() - began) / 60
    table = folder / "trec6-compare" / "compare.json"
    found = json.loads(table.read_text(encoding="utf-8"))
    if not options.quick and options.out is None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(table, RESULTS / "compare_trec6.json")
    measured = [w for w in found["ways"] if any(p["share"] == 1.0 for p in w["points"])]
    named = {w["name"]: w for w in found["ways"]}
    details = {"advice": found["advice"], "ways": {name: w["why"] or "measured" for name, w in named.items()}}
    left = len([w for w in found["ways"] if not w["why"].startswith(("not in", "words."))])
    return [
        Run(MINUTES, OURS, 0, minutes, details),
        Run(WAYS, OURS, 0, len(measured) / left, {"measured": [w["name"] for w in measured]}),
    ]


def few_shot(options: argparse.Namespace) -> list[Run]:
    """Splits of k rows a class; both learn from the same rows and answer the same test rows."""
    rows = sources.read("banking77", "train")
    test = sources.sample(sources.read("banking77", "test"), options.test_rows, seed=0)

    def split(number: int) -> list[Run]:
        train = shots(rows, options.shots, number)
        files = {
            "train": sources.write_jsonl(train, f"fewshot/train-{number}.jsonl"),
            "test": sources.write_jsonl(test, f"fewshot/test-{number}.jsonl"),
        }
        found = {who: kept(who, go, files, number, options) for who, go in ((OURS, ours), (PEER, theirs))}
        print(f"split {number + 1}: {found}", file=sys.stderr, flush=True)
        made = [Run(ACCURACY, who, number, 100 * about["accuracy"], about) for who, about in found.items()]
        if all(about.get("alone", True) for about in found.values()):
            made += [Run(SECONDS, who, number, 3600 / about["seconds"], about) for who, about in found.items()]
        return made

    peer_python("setfit")  # made once, and not by two splits at a time
    return [run for made in side_by_side(split, range(options.rounds), options.at_once) for run in made]


def shots(rows: list[sources.Row], count: int, seed: int) -> list[sources.Row]:
    """`count` rows of every class, drawn with `seed`."""
    draw = random.Random(seed)
    by_class: dict[str, list[sources.Row]] = {}
    for row in rows:
        by_class.setdefault(row["label"], []).append(row)
    return [row for label in sorted(by_class) for row in draw.sample(by_class[label], count)]


def kept(
    who: str, go: Callable[..., dict[str, Any]], files: Mapping[str, Any], number: int, options: argparse.Namespace
) -> dict[str, Any]:
    """What a side reached on a split: kept from before, or measured now."""
    settings = f"{who}-{options.shots}-{options.test_rows}-{number}{'-quick' if options.quick else ''}"
    place = WORK / "fewshot" / f"{settings}.json"
    if options.restart or not place.is_file():
        published = [] if options.restart else published_with(options.out or PUBLISHED, settings)
        if published:
            return published[0].details
        about = {
            "settings": settings,
            "commit": our_versions().get("commit", ""),
            "threads": threads_of(options),
            "alone": options.at_once == 1,
            "cpu": machine.facts()["cpu"],
        }
        found = go(files, number, options) | about
        beside = place.with_suffix(".tmp")
        beside.write_text(json.dumps(found), encoding="utf-8")
        beside.replace(place)
    return json.loads(place.read_text(encoding="utf-8"))


def ours(files: Mapping[str, Any], number: int, options: argparse.Namespace) -> dict[str, Any]:
    folder = WORK / "fewshot" / f"run-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    # The dev rows pick nothing here: there is one evaluation, at the end.
    config = {
        "run": str(folder),
        "method": "contrastive",
        "model": {"name": str(encoder_folder())},
        "data": {"train": str(files["train"]), "dev": str(files["test"]), "test": str(files["test"])},
        "training": {"seed": number, "threads": threads_of(options), **({"max_steps": 4} if options.quick else {})},
    }
    found = turn(
        sys.executable,
        "regraft_train.py",
        {"config": config, "folder": WORK / "fewshot" / f"job-{number}"},
        threads=threads_of(options),
    )
    return {"accuracy": found["metrics"]["test"]["accuracy"], "seconds": found["run_seconds"]}


def theirs(files: Mapping[str, Any], number: int, options: argparse.Namespace) -> dict[str, Any]:
    spec = {
        "model": encoder_folder(),
        **files,
        "seed": number,
        "threads": threads_of(options),
        "iterations": 1 if options.quick else 20,
        "batch_size": 16,
    }
    return turn(peer_python("setfit"), "peers/setfit_run.py", spec, threads=threads_of(options))


def targets(cases: Mapping[str, Any]) -> list[Target]:
    """What was promised of these figures."""
    found = []
    if MINUTES in cases:
        found.append(Target(MINUTES, cases[MINUTES]["medians"][OURS], at_most=10.0))
        found.append(Target("share of the ways measured", cases[WAYS]["medians"][OURS], at_least=1.0))
    if ACCURACY in cases:
        medians = cases[ACCURACY]["medians"]
        if PEER not in medians:
            raise TurnFailed("no turn of setfit")
        found.append(Target("points above setfit", medians[OURS] - medians[PEER], at_least=0.0))
    if SECONDS in cases:
        found.append(Target("times as fast as setfit", cases[SECONDS]["ratios"][PEER], at_least=1.0))
    return found


if __name__ == "__main__":
    main()
