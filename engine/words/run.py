"""`method: vectors` and `method: scratch`: the main job's loop over word ids, without any pretrained encoder."""

from __future__ import annotations

import os
from collections import Counter

import torch

from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError
from regraft.engine.heads.fits import check_head
from regraft.engine.heads.head import build_head
from regraft.engine.heads.run import accelerator_for
from regraft.engine.tasks import task_class
from regraft.engine.tasks.base import MARKED, TOKENS
from regraft.engine.training.optimizer import AveragedWeights, build_optimizer
from regraft.engine.training.order import Plan
from regraft.engine.training.run import _Run
from regraft.engine.training.setup import Prepared, examples_of, set_threads
from regraft.engine.training.splits import read_parts
from regraft.engine.training.step import Stepper
from regraft.engine.words.model import running_words, save_words, word_model
from regraft.engine.words.tokens import PIECES, SPECIAL, UNKNOWN, choose_unit, count_words, word_tokenizer
from regraft.engine.words.vectors import WordVectors, read_vectors, read_words

MOST_TOKENS = 512
TOKEN_BUDGET = 16_384
SHOWN = 8  # unknown words
LOOKED_AT = 20_000  # words of a file of vectors, to tell how texts are to be split


class WordsRun(_Run):
    """One run of a network over word vectors, or over an embedding learned from nothing."""

    def prepare(self) -> None:
        config = self.config
        self.speaks = not self.quiet and int(os.environ.get("RANK", "0")) == 0
        self.threads, self.precision = set_threads(config), "fp32"
        kind = task_class(config.task.type)
        check_head(config.head.type, config.task.type, kind.reads)
        if kind.reads == MARKED:
            raise ConfigError(
                f"task.type: {config.task.type}: it learns over a pretrained vocabulary; use method: full"
            )
        task, parts = read_parts(config)
        texts = [*parts["train"].texts, *_second_texts(parts["train"])]
        words = self.choose_words(texts)
        tokenizer = word_tokenizer(words, self.unit, self.lowercase)
        limit = config.model.max_length or MOST_TOKENS
        splits, notes = examples_of(config, task, parts, tokenizer, limit)
        for name, made in splits.items():
            ids = made.store.ids
            tokens, unknown = notes[name]["tokens"], int(((ids == UNKNOWN) | (ids >= len(SPECIAL) + len(words))).sum())
            notes[name]["unknown_tokens"] = unknown
            self.say(
                f"{name:5} {len(made.rows):,} rows, {tokens:,} {PIECES[self.unit]}, {unknown / max(1, tokens):.1%} unknown"
            )
        self.data = Prepared(task, tokenizer, limit, splits, notes)

    def choose_words(self, texts: list[str]) -> list[str]:
        """The vocabulary, and `self.table` of its vectors where there is a file of them; tells what is unknown."""
        words = self.config.words
        self.vectors: WordVectors | None = None
        if self.config.method == "scratch":
            self.unit = choose_unit(texts) if words.unit == "auto" else words.unit
            self.lowercase = True
            counts = count_words(texts, self.unit, self.lowercase)
            return [w for w, n in counts.most_common(words.max_words) if n >= words.min_count and w not in SPECIAL]
        assert words.vectors is not None
        first = list(read_words(words.vectors, vocabulary=words.vocabulary, most=LOOKED_AT))
        self.unit = choose_unit(texts, first) if words.unit == "auto" else words.unit
        self.lowercase = not any(w != w.lower() for w in first)
        counts = count_words(texts, self.unit, self.lowercase, self.possible_words(texts))
        found = read_vectors(words.vectors, vocabulary=words.vocabulary, wanted=counts, most=words.max_words)
        kept = [i for i, word in enumerate(found.words) if word not in SPECIAL]
        self.vectors = WordVectors([found.words[i] for i in kept], found.table[kept])
        self.tell_unknown(counts, set(self.vectors.words))
        return self.vectors.words

    def possible_words(self, texts: list[str]) -> list[str]:
        """For unit 'longest' the words of the file that the texts have every character of: which of them a text is split
        into depends on the others."""
        words = self.config.words
        if self.unit != "longest" or words.vectors is None:
            return []
        there = set("".join(texts))
        there |= set("".join(there).lower())
        read = read_words(words.vectors, vocabulary=words.vocabulary)
        return list(dict.fromkeys(word for word in read if there.issuperset(word) and word not in SPECIAL))

    def tell_unknown(self, counts: Counter[str], known: set[str]) -> None:
        unknown = Counter({w: n for w, n in counts.items() if w not in known})
        share = sum(unknown.values()) / max(1, sum(counts.values()))
        examples = ", ".join(w for w, _ in unknown.most_common(SHOWN))
        assert self.vectors is not None
        self.say(
            f"{self.config.words.vectors}: {len(known):,} words of {self.vectors.dimension} numbers; {len(unknown):,} of "
            f"{len(counts):,} distinct training words are not among them ({share:.1%} of all): {examples}"
        )

    def build(self) -> None:
        config, training, train = self.config, self.config.training, self.data.splits["train"]
        self.accelerator = accelerator_for(config)
        torch.manual_seed(training.seed)
        dimension = self.vectors.dimension if self.vectors else config.words.dimension
        size = self.data.tokenizer.backend.get_vocab_size()
        task = self.data.task
        head = build_head(config.head, 1, dimension, task.outputs, tokens=task.reads == TOKENS)
        head.start_at(task.scale)
        learned = config.words.trained or self.vectors is None
        self.model = word_model(size, dimension, head, trained=learned)
        task.attach(self.model)
        self.fill(self.model.backbone.embedding.weight)
        self.running = running_words(self.model)
        self.running.to(self.accelerator.device)
        self.plan = Plan(len(train), training.batch_size, training.seed, training.epochs, training.max_steps)
        self.optimizer = build_optimizer(self.model, training)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.averaged = AveragedWeights(self.parameters, training.ema) if training.ema else None
        self.stepper = Stepper(
            accelerator=self.accelerator,
            model=self.accelerator.prepare_model(self.running),
            optimizer=self.optimizer,
            parameters=self.parameters,
            task=task,
            examples=train,
            seed=training.seed,
            token_budget=TOKEN_BUDGET if training.token_budget == "auto" else int(training.token_budget),
            max_grad_norm=training.max_grad_norm,
        )
        trained = sum(p.numel() for p in self.parameters)
        self.say(
            f"{config.head.type} over {size:,} {PIECES[self.unit]} of {dimension} numbers "
            f"({'learned' if learned else 'frozen'}): {trained:,} parameters trained, {self.plan.total_steps:,} steps"
        )
        self.set_training_mode()

    @torch.no_grad()
    def fill(self, table: torch.Tensor) -> None:
        """Vectors at their words, zeros for padding and start; an unknown word is the mean of all."""
        if self.vectors is None:
            table.mul_(0.1)
            return
        vectors = torch.from_numpy(self.vectors.table)
        unknown = vectors.mean(dim=0)
        table.zero_()
        table[UNKNOWN] = unknown
        table[len(SPECIAL) :] = unknown  # characters that are known only inside words
        table[len(SPECIAL) : len(SPECIAL) + len(vectors)] = vectors

    def save_best(self) -> None:
        if not self.accelerator.is_main_process:
            return
        table = self.model.backbone.embedding.weight
        facts = {
            "task": self.data.task.spec(),
            "max_length": self.data.max_length,
            "data": self.config.data.model_dump(mode="json"),
            "base_model": str(self.config.words.vectors or "nothing"),
            "method": self.config.method,
            "seed": self.config.training.seed,
            "head": self.model.head.shape.spec(),  # type: ignore[union-attr, operator]
            "words": {"words": table.shape[0], "dimension": table.shape[1], "unit": self.unit},
        }
        save_words(self.folder / "best", self.model, self.data.tokenizer, facts)

    def load_best(self) -> None:
        from safetensors.torch import load_file

        from regraft.engine.words.model import WEIGHTS

        self.model.load_state_dict(load_file(self.folder / "best" / WEIGHTS))


def _second_texts(rows: Rows) -> list[str]:
    """Pairs that are texts, and what else a task reads beside one: choices."""
    found = []
    for beside in rows.pairs or ():
        found += [beside] if isinstance(beside, str) else [part for part in beside or () if isinstance(part, str)]
    return found
