"""`method: tfidf` and `method: onehot`: the baselines before any network, solved by scikit-learn, as a run like any other."""

from __future__ import annotations

import os
import time

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfTransformer

from regraft.engine.heads.adamw import FusedAdamW
from regraft.engine.heads.fitted import import_solver, solve_rows
from regraft.engine.heads.run import accelerator_for
from regraft.engine.training.optimizer import parameter_groups
from regraft.engine.training.order import Plan
from regraft.engine.training.run import StepInfo, _Run
from regraft.engine.training.setup import Prepared, examples_of, set_threads
from regraft.engine.training.splits import read_parts
from regraft.engine.words.bags import (
    BagModel,
    BagShape,
    RunningBag,
    counts,
    frequent_runs,
    put_weights,
    runs_of_ids,
    save_bag,
)
from regraft.engine.words.tokens import PIECES, SPECIAL, choose_unit, count_words, word_tokenizer

WHOLE = 1 << 20  # tokens of a text: none is cut
FEW_ROWS = 2000  # below it a run of words counts from its first text on, else from its second


class BagRun(_Run):
    """One run over bags of words. Several processes each solve the same."""

    def prepare(self) -> None:
        config = self.config
        self.speaks = not self.quiet and int(os.environ.get("RANK", "0")) == 0
        self.threads, self.precision = set_threads(config), "fp32"
        import_solver(config.head)
        task, parts = read_parts(config)
        texts = [*parts["train"].texts, *(parts["train"].pairs or ())]
        self.unit = choose_unit(texts) if config.words.unit == "auto" else config.words.unit
        found = count_words(texts, self.unit, True).most_common(config.words.max_words)
        tokenizer = word_tokenizer([word for word, _ in found if word not in SPECIAL], self.unit, True)
        splits, notes = examples_of(config, task, parts, tokenizer, config.model.max_length or WHOLE)
        self.data = Prepared(task, tokenizer, config.model.max_length or WHOLE, splits, notes)

    def build(self) -> None:
        config, training, train = self.config, self.config.training, self.data.splits["train"]
        self.accelerator = accelerator_for(config)
        torch.manual_seed(training.seed)
        longest = config.words.ngrams or (2 if self.unit in ("word", "mixed") else 3)
        base = self.data.tokenizer.backend.get_vocab_size() + 1
        store = train.store
        self.numbers, self.owner = runs_of_ids(store.ids, store.lengths, base, longest)
        known = frequent_runs(self.numbers, self.owner, len(store), 1 if len(store) < FEW_ROWS else 2)
        shape = BagShape(base, longest, config.method, len(known), self.data.task.outputs)
        self.model = BagModel(shape)
        self.model.codes.copy_(torch.from_numpy(known))
        self.running = RunningBag(self.model)  # type: ignore[assignment]
        self.parameters = list(self.model.parameters())
        groups = parameter_groups(self.model, training)
        self.optimizer = FusedAdamW(groups, betas=training.betas, eps=training.epsilon)
        self.averaged = None
        self.plan = Plan(len(train), training.batch_size, training.seed, training.epochs, 1)
        self.say(f"{config.method}: {len(known):,} {PIECES[self.unit]} and runs of up to {longest}, {config.head.type}")

    def rehearse_if_tight(self) -> None:
        """Nothing here takes memory that grows with a step."""

    def take_step(self) -> None:
        """The one step: solved over all rows at once."""
        began = time.perf_counter()
        train, task = self.data.splits["train"], self.data.task
        if self.model.shape.weighting == "tfidf":
            self.fit_idf()
        x = self.model.weighted(train.store.ids, train.store.lengths)
        weight, bias = solve_rows(x, np.asarray(train.targets), train.weights, task, self.config.head)
        with torch.no_grad():
            self.model.weight.copy_(weight)
            self.model.bias.copy_(bias)
        self.state.step += 1
        self.state.tokens += int(train.store.lengths.sum())
        seconds = time.perf_counter() - began
        self.state.seconds = self.seconds_before + seconds
        self.bar.advance(1)
        if self.history:
            self.history.add({"kind": "fitted", "head": self.config.head.type, "seconds": round(seconds, 3)})
        if self.on_step:
            self.on_step(StepInfo(0, self.state.tokens, seconds, 0.0))

    def fit_idf(self) -> None:
        """Set each run's inverse document frequency as scikit-learn does: ln((1 + n) / (1 + df)) + 1."""
        x = counts(self.numbers, self.owner, self.model.codes.numpy(), len(self.data.splits["train"].store))
        self.model.idf.copy_(torch.from_numpy(TfidfTransformer().fit(x).idf_.astype(np.float32)))

    def save_best(self) -> None:
        if not self.accelerator.is_main_process:
            return
        facts = {
            "task": self.data.task.spec(),
            "max_length": self.data.max_length,
            "data": self.config.data.model_dump(mode="json"),
            "base_model": "nothing",
            "method": self.config.method,
            "seed": self.config.training.seed,
        }
        save_bag(self.folder / "best", self.model, self.data.tokenizer, facts)

    def load_best(self) -> None:
        put_weights(self.model, self.folder / "best")
