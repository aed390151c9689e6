"""The ways that `regraft compare` knows: what each needs, and the settings it is run with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regraft.engine.config import RunConfig, parse_config
from regraft.engine.heads.fits import on_live_encoder
from regraft.engine.heads.settings import BAG_METHODS, WORD_METHODS
from regraft.engine.methods.settings import SECTIONS


@dataclass(frozen=True)
class Way:
    """`settings` go over the user's configuration, section by section. `labels`: whether it learns from labels;
    `seeded`: whether another seed gives another figure."""

    name: str
    title: str
    settings: dict[str, Any]
    labels: bool = True
    seeded: bool = True

    @property
    def curve(self) -> bool:
        """Whether fewer rows than all tell anything of it."""
        return self.labels and self.name != "majority"

    @property
    def features(self) -> dict[str, Any] | None:
        """What it asks of the features of all training rows; None where it takes none."""
        return self.settings.get("features", {}) if self.labels and self.settings.get("method") == "frozen" else None


FROZEN = {"learning_rate": 1e-3, "epochs": 15, "batch_size": 32, "layer_decay": 1.0, "head_learning_rate": None}
SCRATCH = {"learning_rate": 1e-3, "epochs": 6, "batch_size": 32, "layer_decay": 1.0, "head_learning_rate": None}
WAYS = (
    Way("majority", "majority class", {}, seeded=False),
    Way("tfidf", "TF-IDF + logistic regression", {"method": "tfidf", "head": {"type": "logistic", "c": 10.0}}),
    Way("vectors", "word vectors + BiLSTM", {"method": "vectors", "head": {"type": "bilstm", "dropout": 0.3, "hidden": 100}, "training": SCRATCH}),
    Way("lstm", "LSTM from scratch", {"method": "scratch", "head": {"type": "bilstm", "dropout": 0.3, "hidden": 100}, "training": SCRATCH}),
    Way("cnn", "CNN from scratch", {"method": "scratch", "head": {"type": "cnn", "dropout": 0.3, "hidden": 100}, "training": SCRATCH}),
    Way("zeroshot", "zero-shot by label names", {"method": "frozen", "head": {"type": "zeroshot"}, "training": FROZEN}, labels=False, seeded=False),
    Way("centroid", "frozen + nearest centroid", {"method": "frozen", "head": {"type": "centroid"}, "training": FROZEN}),
    Way("logistic", "frozen + logistic regression", {"method": "frozen", "head": {"type": "logistic"}, "training": FROZEN}),
    Way("linear", "frozen + linear", {"method": "frozen", "head": {"type": "linear"}, "training": FROZEN}),
    Way("mix", "frozen + scalar mix of layers", {"method": "frozen", "head": {"type": "linear", "mix": "scalar"}, "features": {"layers": "all"}, "training": FROZEN}),
    Way("bilstm", "frozen + BiLSTM over last four layers", {"method": "frozen", "head": {"type": "bilstm", "mix": "concat", "hidden": 100, "dropout": 0.3}, "features": {"layers": "last4", "precision": "bf16"}, "training": FROZEN | {"epochs": 6}}),
    Way("contrastive", "contrastive few-shot", {"method": "contrastive", "head": {"type": "logistic"}, "training": {"layer_decay": 1.0, "learning_rate": 5e-5, "epochs": 20, "batch_size": 32}}),
    Way("lora", "LoRA", {"method": "lora"}),
    Way("full", "full fine-tuning", {"method": "full"}),
)  # fmt: skip
NAMES = tuple(way.name for way in WAYS)
DEFAULT = ("majority", "tfidf", "vectors", "lstm", "logistic", "linear", "mix", "lora", "full")
FOR_TAGS = ("vectors", "lstm", "linear", "mix", "bilstm", "lora", "full")  # where each word gets an answer
OWN_HEAD = ("frozen", "contrastive", *WORD_METHODS, *BAG_METHODS)  # methods that take the head section
LEAST_STEPS = 60  # of a trained way: an epoch over 1% of the rows is no training
EVALUATIONS = 5  # on the dev rows while so few steps are taken
LOW_RANK = ("lora", "qlora", "int8")
LOW_RANK_RATE = 20  # times that of the whole encoder: what suits the one, suits the other (tried on TREC-6 and SST-2)
FEW_SHOT_ROWS = 64  # a class: beyond it pairs of rows teach no more than the rows themselves


def configured(base: RunConfig, way: Way, *, seed: int, run: str, rows: int) -> RunConfig:
    """The user's run as `way` does it on `rows` training rows. Raises ConfigError where the method is not in this version."""
    values = base.model_dump(mode="json", exclude_unset=True)
    values["training"] = _training_of(base, values.get("training", {}), way)
    for section, settings in way.settings.items():
        values[section] = {**values.get(section, {}), **settings} if isinstance(settings, dict) else settings
    if way.settings.get("method") in OWN_HEAD:
        # What the user's head or features say holds for the way they were written for.
        for section in ("head", "features"):
            kept = {"store", "limit_gb", "descriptions"} & values.get(section, {}).keys()
            own = {k: v for k, v in values.get(section, {}).items() if k in kept}
            values[section] = {**own, **way.settings.get(section, {})}
    elif not on_live_encoder(base):  # a head of ours on the live encoder is part of what the user trains
        values.pop("head", None)
        values.pop("features", None)
    method = way.settings.get("method", "full")
    for section, methods in SECTIONS.items():
        if method not in methods:
            values.pop(section, None)
    values["run"], values["trackers"] = run, []
    values["training"] = {**values["training"], "seed": seed}
    found = parse_config(values, source=f"compare ({way.title})")
    # parse_config has filled in what the user left open, by method.
    epochs = LEAST_STEPS * found.training.batch_size / rows
    if epochs <= found.training.epochs:
        return found
    # Many epochs over few rows: looking at the dev rows after each would take longer than learning.
    changes = {"epochs": epochs, "evaluate_every": LEAST_STEPS // EVALUATIONS}
    return found.model_copy(update={"training": found.training.model_copy(update=changes)})


def _training_of(base: RunConfig, training: dict[str, Any], way: Way) -> dict[str, Any]:
    """The user's training section for another method than theirs: a learning rate is right for what it was written for, and so
    are the many epochs over stored features."""
    method, rate = way.settings.get("method", "full"), training.get("learning_rate")
    if method == base.method or {method, base.method} <= set(LOW_RANK):
        return training
    left = {"learning_rate", "epochs"} if base.method in OWN_HEAD else {"learning_rate"}
    others = {key: value for key, value in training.items() if key not in left}
    if rate is not None and base.method == "full" and method in LOW_RANK:
        return {**others, "learning_rate": LOW_RANK_RATE * rate}
    return others


def rows_learned(base: RunConfig, way: Way, rows: int) -> float:
    """How many rows training goes through, counted again in every epoch, with `rows` of them at hand."""
    return rows * configured(base, way, seed=0, run="compare", rows=rows).training.epochs


def available(base: RunConfig, names: tuple[str, ...]) -> list[tuple[Way, str]]:
    """Each way with why it cannot run here, or ''."""
    from regraft.engine.config import RunConfig as Config

    known = Config.model_fields["method"].annotation
    methods = set(getattr(known, "__args__", ()))
    found = []
    for way in WAYS:
        if way.name not in names:
            continue
        method, why = way.settings.get("method", "full"), ""
        if method not in methods:
            why = "not in this version"
        elif way.name == "vectors" and base.words.vectors is None:
            why = "words.vectors names no file"
        elif base.task.type == "tagging" and way.name not in (*FOR_TAGS, "cnn"):
            why = "for one answer a text only"
        elif base.task.type != "classification" and way.name in ("zeroshot", "centroid", "contrastive"):
            why = "for classifications only"
        elif base.task.type in ("regression", "ordinal") and way.name in ("logistic", "tfidf"):
            why = "for classes only"
        found.append((way, why))
    return found
