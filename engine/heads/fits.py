"""Which head goes with which method, task and features; asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from regraft.engine.errors import ConfigError, nearest
from regraft.engine.heads.settings import BAG_METHODS, LIVE_HEADS, LIVE_METHODS, SOLVED, WORD_METHODS

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig

TOKEN_TASKS = frozenset({"tagging", "answering"})
TAGGING_HEADS = frozenset({"linear", "mlp", "bilstm", "cnn"})


def on_live_encoder(config: RunConfig) -> bool:
    """Whether a head of ours is trained together with the encoder."""
    return config.method in LIVE_METHODS and config.head.type in LIVE_HEADS


def check(config: RunConfig) -> None:
    """Raises ValueError, for pydantic, at a head that does not fit the rest."""
    method, head, task = config.method, config.head.type, config.task.type
    if method in WORD_METHODS:
        _check_words(config)
    elif method in BAG_METHODS:
        _check_bag(config)
    elif method == "contrastive":
        _check_pairs(config)
    elif method == "frozen":
        _check_frozen(config)
    elif head in SOLVED:
        raise ValueError(
            f"head.type: {head} is solved at once, on features that stay as they are; method: {method} trains the encoder "
            "and takes linear, mlp, attention, bilstm or cnn"
        )
    elif head in LIVE_HEADS:
        _check_live(config)
    if task in TOKEN_TASKS and (method in ("frozen", *WORD_METHODS) or on_live_encoder(config)):
        _check_tokens(config)


def check_head(head: str, task: str, reads: str) -> None:
    """The same for a task of the user's own, whose class alone tells what it reads. Raises ConfigError."""
    if reads == "tokens" and head not in TAGGING_HEADS:
        raise ConfigError(_not_for_tokens(head, task))


def check_descriptions(descriptions: Collection[str], labels: Collection[str]) -> None:
    """Raises ConfigError for a description of a label that the rows do not have."""
    for label in descriptions:
        if label not in labels:
            raise ConfigError(
                f"head.descriptions: {label!r} is no label of the rows{nearest(label, labels)}; there are: {', '.join(labels)}"
            )


def _not_for_tokens(head: str, task: str) -> str:
    return f"head.type: {head} gives one answer a text; task.type: {task} needs one a token: linear, mlp, bilstm or cnn"


def _check_tokens(config: RunConfig) -> None:
    if config.head.type not in TAGGING_HEADS:
        raise ValueError(_not_for_tokens(config.head.type, config.task.type))
    _check_unpooled(config, f"keeps one row a text, and task.type: {config.task.type} needs every token; remove it")


def _check_unpooled(config: RunConfig, why: str) -> None:
    pooling = config.features.pooling
    if pooling not in ("auto", "none"):
        raise ValueError(f"features.pooling: {pooling} {why}")
    if config.features.normalise:
        raise ValueError("features.normalise: for pooled rows only; remove it")


def _check_frozen(config: RunConfig) -> None:
    pooling, head, task = config.features.pooling, config.head.type, config.task.type
    if config.head.reads_tokens:
        _check_pooling_of_tokens(config)
    elif pooling == "none" and task not in TOKEN_TASKS and ":" not in task:
        raise ValueError(
            f"features.pooling: none keeps every token, and head.type {head} reads one row a text; set "
            "features.pooling: mean, or a head that reads tokens (attention, bilstm, cnn)"
        )
    if task != "classification" and head in ("centroid", "zeroshot"):
        raise ValueError(f"head.type: {head} needs task.type: classification")
    if task in ("regression", "ordinal", "choice") and head in SOLVED:
        raise ValueError(f"head.type: {head} has classes; for task.type: {task} use linear or mlp")
    if head == "zeroshot" and config.data.columns.text_pair is not None:
        raise ValueError(
            "head.type: zeroshot compares one text with descriptions; data.columns.text_pair names a second"
        )


def _check_pooling_of_tokens(config: RunConfig) -> None:
    _check_unpooled(
        config,
        f"keeps one row a text, and head.type {config.head.type} reads every token; set features.pooling: none, or a head "
        "that reads pooled rows (linear, mlp, logistic, svm)",
    )


def _check_live(config: RunConfig) -> None:
    head, pooling = config.head, config.features.pooling
    if config.method not in LIVE_METHODS:
        raise ValueError(
            f"head.type: {head.type}: trained with the encoder by method: {', '.join(LIVE_METHODS)}; set one of them, or "
            "head.type: linear"
        )
    if config.task.type in ("mlm", "choice"):
        raise ValueError(f"head.type: {head.type}: task.type: {config.task.type} has a head of its own; remove it")
    if head.reads_tokens:
        _check_pooling_of_tokens(config)
    elif pooling == "none" and config.task.type not in TOKEN_TASKS:
        raise ValueError("features.pooling: none keeps every token, and head.type mlp reads one row a text; remove it")
    if head.mix_penalty:
        raise ValueError("head.mix_penalty: used by method: frozen only; remove it")


def _check_words(config: RunConfig) -> None:
    if config.method == "vectors" and config.words.vectors is None:
        raise ValueError("words.vectors: missing; method: vectors reads word vectors from a file (scratch needs none)")
    if config.head.type in SOLVED:
        raise ValueError(
            f"head.type: {config.head.type} is solved on stored features; method: {config.method} takes "
            "bilstm, cnn, attention, linear or mlp"
        )


def _check_bag(config: RunConfig) -> None:
    if config.head.type not in ("logistic", "svm"):
        raise ValueError(
            f"head.type: {config.head.type}; method: {config.method} counts words and is solved at once: logistic or svm"
        )
    if config.task.type not in ("classification", "multilabel"):
        raise ValueError(
            f"task.type: {config.task.type}; method: {config.method} knows classes: classification or multilabel"
        )


def _check_pairs(config: RunConfig) -> None:
    if config.task.type != "classification":
        raise ValueError(f"task.type: {config.task.type}; method: contrastive needs classes to pull rows together")
    if config.head.type not in ("logistic", "svm", "centroid"):
        raise ValueError(
            f"head.type: {config.head.type}; method: contrastive ends in a head that is solved at once: "
            "logistic, svm or centroid"
        )
