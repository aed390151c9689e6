"""`regraft features`: compute, list, verify and prune stored features."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.data.rows import Rows

COMMANDS = {"list", "verify", "prune"}
# What each takes; a run's YAML file takes the rest.
TAKES = {"list": {"root"}, "verify": {"root", "delete"}, "prune": {"root", "to", "store"}}
OF_A_RUN = {"overrides", "clusters", "processes"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "features", help="compute a run's features once and keep them; list, verify or prune what is kept"
    )
    parser.add_argument("what", metavar="run.yaml|list|verify|prune", help="a run's YAML file, or what to do")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--root", metavar="FOLDER", help="folder of stores; default: features in the cache folder")
    parser.add_argument("--delete", action="store_true", help="verify: delete damaged shards")
    parser.add_argument("--to", type=float, metavar="GB", help="prune: delete least recently used shards down to this")
    parser.add_argument("--store", metavar="NAME", help="prune: delete this store")
    parser.add_argument("--clusters", type=int, metavar="K", help="group the training texts and show the nearest rows")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="share the texts among N processes here")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    _check_options(args)
    if args.what in COMMANDS:
        return {"list": _list, "verify": _verify, "prune": _prune}[args.what](args)
    return _compute(args)


def _check_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option that would be ignored."""
    from regraft.engine.errors import ConfigError

    takes = TAKES.get(args.what, OF_A_RUN)
    unset = {"overrides": [], "processes": 1, "delete": False}
    for name in sorted(OF_A_RUN.union(*TAKES.values()) - takes):
        if getattr(args, name) != unset.get(name):
            flag = "--set" if name == "overrides" else f"--{name}"
            where = ", ".join(k for k, v in TAKES.items() if name in v) or "a run's YAML file"
            folder = (
                "the folder of stores is --root FOLDER" if "root" in takes else "for a run, --set features.store=FOLDER"
            )
            cure = f"; {folder}" if name in ("root", "store") else ""
            raise ConfigError(f"{flag}: for `regraft features` {where}, not for {args.what}{cure}")
    if args.clusters is not None and args.clusters < 2:
        raise ConfigError(f"--clusters {args.clusters}: expected at least 2 groups")
    if args.to is not None and args.store is not None:
        raise ConfigError("prune: --to GB or --store NAME, not both")


def _root(args: argparse.Namespace) -> Path:
    """The folder of stores to look after. Raises StoreError for one that was named and is not there."""
    from regraft.engine.errors import StoreError
    from regraft.engine.features.root import store_root

    root = store_root(args.root)
    if args.root and not root.is_dir():
        raise StoreError(f"--root {args.root}: no such folder")
    return root


def _list(args: argparse.Namespace) -> int:
    from regraft.engine.features.keep import stores

    root = _root(args)
    total = 0
    for store in stores(root):
        print(store.line())
        total += store.bytes
    print(f"{root}: {total / 1e6:,.1f} MB")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from regraft.engine.features.keep import stores, verify

    root = _root(args)
    wrong = verify(root, delete=args.delete)
    for line in wrong:
        print(line)
    print(f"{root}: {sum(s.shards for s in stores(root))} shards, {len(wrong)} wrong")
    return 1 if wrong and not args.delete else 0


def _prune(args: argparse.Namespace) -> int:
    from regraft.engine.errors import StoreError
    from regraft.engine.features.keep import prune, remove

    root = _root(args)
    if args.store:
        remove(root, args.store)
        print(f"{root / args.store}: deleted")
        return 0
    if args.to is None or not 0 <= args.to < math.inf:
        raise StoreError("prune: say how much may stay with --to GB, or which store goes with --store NAME")
    shards, freed = prune(root, int(args.to * 1e9))
    print(f"{root}: {shards} shards deleted, {freed / 1e6:,.1f} MB freed")
    return 0


def _compute(args: argparse.Namespace) -> int:
    from regraft.engine.config import load_config
    from regraft.engine.features.extract import features_of
    from regraft.engine.features.sources import Source, parts_of
    from regraft.engine.features.spec import feature_spec
    from regraft.engine.progress import ProgressBar

    config = load_config(args.what, args.overrides)
    if args.processes != 1:
        return _in_processes(args)
    speaks = int(os.environ.get("RANK", "0")) == 0

    def say(line: str) -> None:
        if speaks:
            ProgressBar("", 0).say(line)

    if args.clusters is not None:
        config, texts = _texts(config)
        parts: dict[str, Source] = {"train": texts}
    else:
        parts = {name: part.source for name, part in parts_of(config, *feature_spec(config))[1].items()}
    found = features_of(config, parts, say)
    if speaks:
        for name, rows in found.items():
            print(f"{name:5} {len(rows):,} rows, {rows.bytes / 1e6:,.1f} MB")
    if args.clusters is not None and speaks:
        from regraft.engine.features.clusters import show_clusters

        show_clusters(found["train"], texts, args.clusters, config.training.seed)
    return 0


def _in_processes(args: argparse.Namespace) -> int:
    from regraft.engine.errors import ConfigError
    from regraft.engine.training.launch import launch

    if args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: expected at least 1")
    flags = [x for o in args.overrides for x in ("--set", o)]
    flags += ["--clusters", str(args.clusters)] if args.clusters else []
    return launch([args.what, *flags], args.processes, "features")


def _texts(config: RunConfig) -> tuple[RunConfig, Rows]:
    """The training texts, labelled or not, and the run with features of whole texts, as groups are made of."""
    from dataclasses import replace

    from regraft.engine.tasks import Task, task_class

    kind, data = task_class(config.task.type), config.data
    rows = kind.read(data.train, data, split="train", need_labels=False, limit=data.limit)
    if kind.examples is not Task.examples:  # what stands beside a text, and its labels, are of parts of it
        rows = replace(rows, pairs=None, labels=None)
    if config.features.pooling != "auto":
        return config, rows
    return config.model_copy(update={"features": config.features.model_copy(update={"pooling": "mean"})}), rows
