"""Rows of several tasks, read by each task's own rules: for a run, and those that a trained model held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.engine.config import DataConfig, RunConfig
from regraft.engine.errors import ConfigError
from regraft.engine.examples import Examples
from regraft.engine.several.mixed import MixedExamples
from regraft.engine.tasks.several import Several
from regraft.engine.trained import Trained, read_facts
from regraft.engine.training.setup import Prepared, prepare

SUMS = ("rows", "sequences", "truncated_rows", "cut_tokens", "tokens")


def one_run(config: RunConfig, name: str) -> RunConfig:
    """The configuration of one of the tasks alone."""
    task = config.tasks[name]
    return config.model_copy(update={"task": task, "data": task.data, "tasks": {}})


def prepare_several(config: RunConfig, say: Callable[[str], None]) -> Prepared:
    """Every task prepared as for a run of its own, side by side. Raises DataError, ModelError and ConfigError."""
    each: dict[str, Prepared] = {}
    for name in config.tasks:
        say(f"{name}:")
        each[name] = prepare(one_run(config, name), lambda line: say(f"  {line}"))
        task = each[name].task
        if not task.greater_is_better:
            raise ConfigError(
                f"tasks.{name}.metric: {task.metric} is better when smaller, and a mean is to be maximised"
            )
    pairs = {n: config.tasks[n].data.columns.text_pair is not None for n, p in each.items() if reads_plain(p)}
    several = Several({name: prepared.task for name, prepared in each.items()}, pairs)
    several.loss_weights = {name: task.weight for name, task in config.tasks.items()}
    several.uncertain = config.mixing.weighting == "uncertainty"
    splits: dict[str, Examples] = {}
    notes: dict[str, Any] = {}
    for split in ("train", "dev", "test"):
        parts = {name: prepared.splits[split] for name, prepared in each.items() if split in prepared.splits}
        if parts:
            splits[split] = MixedExamples.of(parts)
            notes[split] = _summed([each[name].notes[split] for name in parts])
    notes |= {f"{name} {split}": note for name, p in each.items() for split, note in p.notes.items()}
    first = next(iter(each.values()))
    return Prepared(several, first.tokenizer, first.max_length, splits, notes)


def reads_plain(prepared: Prepared) -> bool:
    """Whether a task takes a text or a pair of texts, as its columns say."""
    from regraft.engine.tasks.base import Task

    own, plain = (getattr(kind.take, "__func__", kind.take) for kind in (type(prepared.task), Task))
    return own is plain


def _summed(notes: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {key: sum(note[key] for note in notes) for key in SUMS}
    rules = dict.fromkeys(rule for note in notes for rule in note["dropped"])
    dropped = {rule: sum(note["dropped"].get(rule, 0) for note in notes) for rule in rules}
    return total | {"path": "all tasks", "dropped": dropped, "labels": {}}


def data_of(trained: Trained, name: str) -> DataConfig:
    """Where a task's rows came from, and by which rules."""
    return DataConfig.model_validate(trained.facts["tasks"][name])


def heldout_of_all(trained: Trained, split: str | None = None) -> MixedExamples:
    """Held-out rows of every task: those of `split`; without one, of test where the task had some, else of dev.

    Raises DataError when a run's own files are gone.
    """
    from regraft.engine.heldout import encoded, heldout_rows

    parts = {}
    for name in trained.facts["tasks"]:
        one = _learned_alone(trained, name)
        parts[name] = encoded(one, heldout_rows(one, None, split=split))
    return MixedExamples.of(parts)


def _learned_alone(trained: Trained, name: str) -> Trained:
    """What the run of one of the tasks kept of its rows: with others, the whole run; of a head that was put beside others
    later (`heads.several`), its own."""
    several: Any = trained.task
    one = replace(trained, task=several.tasks[name], data=data_of(trained, name))
    folders = trained.facts.get("folders")
    return one if folders is None else replace(one, folder=Path(folders[name]), facts=read_facts(Path(folders[name])))
