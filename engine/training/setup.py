"""From a configuration to everything a run needs: rows, tokens, targets, the model, the machine's settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.engine.config import RunConfig
from regraft.engine.data.fast_tokenizer import FastTokenizer, load_fast_tokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.examples import Examples
from regraft.engine.heap import keep_freed_memory
from regraft.engine.machine import cpu_has_bf16
from regraft.engine.memory import host_memory
from regraft.engine.methods.settings import VIRTUAL
from regraft.engine.pretrained import position_limit, source_of
from regraft.engine.tasks import Task
from regraft.engine.threads import available_threads
from regraft.engine.training.splits import read_parts
from regraft.engine.training.together import together

if TYPE_CHECKING:
    import torch

    from regraft.engine.new_words import NewWords


@dataclass(frozen=True)
class Prepared:
    """What a run learns from. `splits`: train, dev and perhaps test; `new_words`: what the tokenizer was extended by."""

    task: Task
    tokenizer: FastTokenizer
    max_length: int
    splits: dict[str, Examples]
    notes: dict[str, Any] = field(default_factory=dict)
    new_words: NewWords | None = None


def prepare(config: RunConfig, say: Callable[[str], None] = lambda line: None) -> Prepared:
    """Read, check and tokenise every split. Nothing is dropped in silence: `notes` and `say` tell what was.

    Raises DataError and ModelError. Of several processes, all raise what is wrong in one.
    """
    if config.tasks:
        from regraft.engine.several.data import prepare_several

        return prepare_several(config, say)
    with together("reading the data"):
        return _prepare(config, say)


def _prepare(config: RunConfig, say: Callable[[str], None]) -> Prepared:
    name = source_of(config.model)
    tokenizer = load_fast_tokenizer(name, revision=config.model.revision)
    before = config.prompt.tokens if config.method in VIRTUAL else 0  # they take up positions too
    limit = position_limit(name, config.model)
    takes = [n for n in (tokenizer.max_length, None if limit is None else limit - before) if n is not None]
    if min(takes, default=3) < 3:
        raise ConfigError(
            f"prompt.tokens: {before}; {config.model.name} has {limit} positions, which leaves none for a text"
        )
    if config.model.max_length is not None and takes and config.model.max_length > min(takes):
        raise ConfigError(
            f"model.max_length: {config.model.max_length}; {config.model.name} takes at most {min(takes)} tokens"
            + (f" after {before} virtual ones" if before else "")
        )
    max_length = config.model.max_length or min([*takes, 512])
    task, parts = read_parts(config)
    tokenizer, new_words = _extended(config, tokenizer, parts["train"], say)
    splits, notes = examples_of(config, task, parts, tokenizer, max_length)
    for name, note in notes.items():
        say(_split_line(name, note, max_length))
    return Prepared(task, tokenizer, max_length, splits, notes, new_words)


def _extended(
    config: RunConfig, tokenizer: FastTokenizer, train: Rows, say: Callable[[str], None]
) -> tuple[FastTokenizer, NewWords | None]:
    """The tokenizer with the new words that the configuration asks for. Raises ConfigError."""
    wanted = config.model.new_words
    if wanted is None:
        return tokenizer, None
    from regraft.engine.new_words import grow

    texts = [*train.texts, *(pair for pair in train.pairs or () if isinstance(pair, str))]
    grown, found = grow(tokenizer, wanted, texts)
    words = () if found is None else found.words
    asked = wanted if isinstance(wanted, int) else len(wanted)
    shown = ", ".join(words[:6]) + (", ..." if len(words) > 6 else "")
    say(f"{len(words):,} of {asked:,} new words in the vocabulary{': ' + shown if words else ''}")
    return grown, found


def examples_of(
    config: RunConfig, task: Task, parts: dict[str, Rows], tokenizer: FastTokenizer, max_length: int
) -> tuple[dict[str, Examples], dict[str, dict[str, Any]]]:
    """What the task makes of every split, and what a report says of it. Raises DataError where no row is left."""
    data = config.data
    splits, notes = {}, {}
    for name, rows in parts.items():
        unknown = "error" if name == "train" else data.unknown_label
        made = task.examples(rows, tokenizer, max_length, label_column=data.columns.label, unknown=unknown)
        store, rows = made.store, made.rows
        if not len(made):
            raise DataError(f"{rows.path}: no row of the {name} split is left after the rules in data: {rows.dropped}")
        splits[name] = made
        notes[name] = {
            "path": rows.path,
            "rows": len(rows),
            "sequences": len(store),
            "dropped": dict(rows.dropped),
            "truncated_rows": store.truncated,
            "cut_tokens": store.cut_tokens,
            "tokens": int(store.lengths.sum()),
            "labels": made.counts,
            "remarks": {what: made.counts[what] for what in task.remarks if made.counts.get(what)},
        }
    return splits, notes


def _split_line(name: str, note: dict[str, Any], max_length: int) -> str:
    line = f"{name:5} {note['rows']:,} rows, {note['tokens']:,} tokens"
    if note["sequences"] != note["rows"]:
        line += f" in {note['sequences']:,} sequences"
    if note["dropped"]:
        line += ", dropped: " + ", ".join(f"{n:,} {rule}" for rule, n in note["dropped"].items())
    if note["truncated_rows"]:
        line += f", {note['truncated_rows']:,} cut to {max_length} tokens ({note['cut_tokens']:,} tokens lost)"
    return line + "".join(f", {n:,} {what}" for what, n in note["remarks"].items())


def set_threads(config: RunConfig) -> int:
    """Threads for torch: the configured number or this process's share of the machine."""
    import torch

    threads = config.training.threads or max(1, available_threads() // processes_here())
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        keep_freed_memory()
    return threads


def processes_here() -> int:
    """How many processes of this run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_precision(config: RunConfig) -> str:
    """fp32, bf16 or fp16. Raises ConfigError for fp16 without a GPU."""
    import torch

    wanted = config.training.precision
    cuda = torch.cuda.is_available()
    if wanted == "fp16" and not cuda:
        raise ConfigError("training.precision: fp16 needs a GPU and this machine has none; use bf16, fp32 or auto")
    if wanted != "auto":
        return wanted
    if cuda:
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def choose_token_budget(config: RunConfig, model: torch.nn.Module, precision: str) -> int:
    """Most tokens in one micro-batch, from the memory that is free and what the activations of one token take."""
    import torch

    if config.training.token_budget != "auto":
        return int(config.training.token_budget)
    tokens = free_memory() / activation_bytes(model, precision)
    if torch.cuda.is_available():
        return int(min(262_144, max(1024, 0.6 * tokens)))
    return int(min(16_384, max(512, 0.4 * tokens)))


def could_run_out(tokens: int, model: torch.nn.Module, precision: str) -> bool:
    """Whether the activations of a micro-batch of so many tokens come anywhere near the memory that is free."""
    return tokens * activation_bytes(model, precision) > 0.1 * free_memory()


def activation_bytes(model: Any, precision: str) -> float:
    """Bytes a token that are kept for the backward pass: about 34 hidden-sized values a layer (Korthikanti et al. 2022)."""
    hidden = getattr(model.config, "hidden_size", 768)
    layers = getattr(model.config, "num_hidden_layers", 12)
    return 34 * hidden * layers * (4 if precision == "fp32" else 2.5)


def free_memory() -> int:
    """Bytes free on the GPU, or, where there is none, this process's share of what may still be taken of the machine's."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else host_memory() // processes_here()
