"""What tasks.py claims, and what is trained for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import task_rows
from harness import OURS

MINILM, CHINESE = "minilm", "bert-base-chinese's vocabulary"
TINY = {
    "model_type": "bert",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Learning:
    """One training run. `task`, `training`, `model`: keys of its configuration; `data`: files below REGRAFT_DATA, or the
    function that makes them, and `columns` what else is said of them. `encoder`: where it starts from: MINILM, CHINESE
    (a vocabulary alone, so `model.config` says the rest), or another learning, the run of seed 0."""

    task: dict[str, Any]
    data: dict[str, str] | Callable[[bool], dict[str, str]]
    training: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    encoder: str = MINILM
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """transformers' Trainer as its example for the task uses it, with the settings and the rows of a learning."""

    like: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure of a learning, or of an example."""

    of: str
    metric: str
    split: str = "test"


@dataclass(frozen=True)
class Case:
    """Figures side by side, Regraft's first. `beats`: by how much at least Regraft's is better than another's (negative:
    how much worse it may be). `points` False: the figure is no share of 1; less is then better."""

    figures: dict[str, Figure]
    at_least: float | None = None
    beats: dict[str, float] = field(default_factory=dict)
    points: bool = True


WNUT = {
    "train": "wnut17/wnut17train.conll",
    "dev": "wnut17/emerging.dev.conll",
    "test": "wnut17/emerging.test.annotated",
}
NCBI = {
    "train": "bio-ncbi-disease/train.tsv.gz",
    "dev": "bio-ncbi-disease/devel.tsv",
    "test": "bio-ncbi-disease/test.tsv",
}
EWT = {split: f"ud-en-ewt/en_ewt-ud-{split}.conllu.gz" for split in ("train", "dev", "test")}
LABEL = {"learning_rate": 3e-4, "batch_size": 32}
ANSWER = {"learning_rate": 1e-4, "batch_size": 16, "epochs": 3}
REVIEWS = {"learning_rate": 5e-5, "batch_size": 16, "epochs": 5}
RATED = {"learning_rate": 1e-4, "head_learning_rate": 1e-3, "batch_size": 16, "epochs": 3}
CHOICE = {"learning_rate": 1e-4, "head_learning_rate": 1e-3, "batch_size": 16, "epochs": 2}
CONLL = {"format": "conll"}
ON_REVIEWS = {"learning_rate": 2e-4, "head_learning_rate": 1e-3, "batch_size": 32, "epochs": 3}

# What is trained. A case below names these; several may share one.
LEARNINGS: dict[str, Learning | Example] = {
    "ewt": Learning({"type": "tagging", "metric": "accuracy"}, EWT, {**LABEL, "epochs": 4}, {"max_length": 256}),
    "wnut17": Learning({"type": "tagging"}, WNUT, {**LABEL, "epochs": 10}, {"max_length": 256}, CONLL),
    "wnut17-crf": Learning(
        {"type": "tagging", "crf": True},
        WNUT,
        {**LABEL, "epochs": 10, "head_learning_rate": 1e-3},
        {"max_length": 256},
        CONLL,
    ),
    "ncbi": Learning({"type": "tagging"}, NCBI, {**LABEL, "epochs": 8}, {"max_length": 256}, CONLL),
    "squad1": Learning({"type": "answering", "stride": 128}, task_rows.squad, ANSWER, {"max_length": 384}),
    "squad1-example": Example("squad1", {"doc_stride": 128, "max_answer_length": 30, "n_best_size": 20}),
    "imdb-adapted": Learning({"type": "mlm"}, task_rows.reviews_unlabelled, ON_REVIEWS, {"max_length": 128}),
    "imdb-head": Learning(
        {"type": "mlm"},
        task_rows.reviews_unlabelled,
        ON_REVIEWS,
        {"max_length": 128},
        more={"unfreeze": {"last_layers": 0}},  # the encoder as it is, and a head that learned what it can read of it
    ),
    "imdb-1000": Learning({"type": "classification"}, task_rows.reviews_labelled, REVIEWS, {"max_length": 256}),
    "imdb-1000-adapted": Learning(
        {"type": "classification"}, task_rows.reviews_labelled, REVIEWS, {"max_length": 256}, encoder="imdb-adapted"
    ),
    **{
        f"{name}{how}": Learning({"type": task}, rows, training, {"max_length": length}, more=more)
        for name, task, rows, training, length in (
            ("imdb-stars", "ordinal", task_rows.reviews_rated, RATED, 256),
            ("squad-sentences", "choice", task_rows.answering_sentences, CHOICE, 128),
        )
        for how, more in (("", {}), ("-head", {"unfreeze": {"last_layers": 0}}))
    },
    "zh-pretrained": Learning(
        {"type": "mlm", "sentences": "nsp"},
        task_rows.chinese_texts,
        {"learning_rate": 5e-4, "batch_size": 32, "epochs": 2, "warmup": 0.1},
        {"max_length": 128, "config": TINY},
        encoder=CHINESE,
    ),
} | {
    f"zh-{name}{how}": Learning(
        task,
        rows,
        {"learning_rate": 3e-4, "batch_size": 32, "epochs": epochs},
        {"max_length": 128} | ({} if how else {"config": TINY}),
        columns,
        encoder="zh-pretrained" if how else CHINESE,
    )
    for name, task, rows, columns, epochs in (
        ("entities", {"type": "tagging"}, task_rows.chinese_entities, {"overlap": "longest"}, 8),
        ("reviews", {"type": "classification"}, task_rows.chinese_reviews, {}, 4),
    )
    for how in ("", "-pretrained")
}

# What is claimed, an entry each: a task over several data sets is entered as one case for each of its figures.
CASES = {
    "ewt-pos": Case({OURS: Figure("ewt", "accuracy")}, at_least=94.0),
    "wnut17": Case(
        {OURS: Figure("wnut17-crf", "f1"), "regraft-linear": Figure("wnut17", "f1")},
        at_least=40.0,
        beats={"regraft-linear": 0.0},
    ),
    "ncbi-disease": Case({OURS: Figure("ncbi", "f1")}, at_least=80.0),
    "squad1-em": Case(
        {OURS: Figure("squad1", "exact_match"), "transformers": Figure("squad1-example", "exact_match")},
        at_least=55.0,
        beats={"transformers": 0.0},
    ),
    "squad1-f1": Case(
        {OURS: Figure("squad1", "f1"), "transformers": Figure("squad1-example", "f1")},
        at_least=67.0,
        beats={"transformers": 0.0},
    ),
    "imdb-perplexity": Case(
        {OURS: Figure("imdb-adapted", "perplexity", "dev"), "regraft-head": Figure("imdb-head", "perplexity", "dev")},
        beats={"regraft-head": 0.0},
        points=False,
    ),
    "imdb-1000": Case(
        {OURS: Figure("imdb-1000-adapted", "accuracy"), "regraft-plain": Figure("imdb-1000", "accuracy")},
        beats={"regraft-plain": 0.0},
    ),
    "imdb-stars": Case(
        {OURS: Figure("imdb-stars", "quadratic_kappa"), "regraft-head": Figure("imdb-stars-head", "quadratic_kappa")},
        beats={"regraft-head": 0.0},
    ),
    "squad-sentences": Case(
        {OURS: Figure("squad-sentences", "accuracy"), "regraft-head": Figure("squad-sentences-head", "accuracy")},
        beats={"regraft-head": 0.0},
    ),
    "zh-words": Case(
        {
            OURS: Figure("zh-pretrained", "accuracy", "dev"),
            "guessing": Figure("zh-pretrained", "trivial_accuracy", "dev"),
        },
        beats={"guessing": 10.0},
    ),
    "zh-sentences": Case(
        {
            OURS: Figure("zh-pretrained", "sentence_accuracy", "dev"),
            "guessing": Figure("zh-pretrained", "trivial_sentence_accuracy", "dev"),
        },
        beats={"guessing": 10.0},
    ),
    "zh-cluener": Case(
        {OURS: Figure("zh-entities-pretrained", "f1"), "regraft-scratch": Figure("zh-entities", "f1")},
        beats={"regraft-scratch": 0.0},
    ),
    "zh-chnsenticorp": Case(
        {OURS: Figure("zh-reviews-pretrained", "accuracy"), "regraft-scratch": Figure("zh-reviews", "accuracy")},
        beats={"regraft-scratch": 0.0},
    ),
}
ONE_SEED = {"imdb-adapted", "imdb-head", "zh-pretrained"}  # an hour each: seed 0 alone
