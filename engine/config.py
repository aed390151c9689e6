"""One YAML file a run, validated before anything heavy is imported.

`load_config` gives a `RunConfig`; every complaint names the key, the line and the nearest valid name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from regraft.engine.config_lines import distinct, explain, lines_of, refuse_twice
from regraft.engine.errors import ConfigError, nearest
from regraft.engine.heads.fits import check as check_head_of
from regraft.engine.heads.settings import FeaturesConfig, HeadConfig, WordsConfig, method_defaults
from regraft.engine.label_names import name_of_number
from regraft.engine.methods.settings import (
    SECTIONS,
    AdapterSettings,
    LoraSettings,
    PromptSettings,
    QuantiseSettings,
    UnfreezeSettings,
)
from regraft.engine.model_settings import ModelConfig
from regraft.engine.section import Section
from regraft.engine.several.settings import MixingConfig, check_tasks, without_rows
from regraft.engine.training.settings import MachineSettings, check_machine

Rule = Literal["error", "drop"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Column = str | int
LabelName = Annotated[str, BeforeValidator(name_of_number)]  # YAML reads a label 1 as a number


TASK_TYPES = ("classification", "multilabel", "regression", "tagging", "answering", "mlm", "choice", "ordinal")
# Keys of `task` that only some types read.
USED_BY = {
    "tags": ("tagging",),
    "crf": ("tagging",),
    "alignment": ("tagging",),
    "stride": ("tagging", "answering", "mlm", "choice", "ordinal"),
    "max_answer": ("answering",),
    "n_best": ("answering",),
    "normalise": ("answering",),
    "mask_share": ("mlm",),
    "masking": ("mlm",),
    "sentences": ("mlm",),
    "options": ("MODULE:CLASS",),
}


class TaskConfig(Section):
    """What is learned."""

    type: str = Field("classification", description="a task of ours, or MODULE:CLASS for one of your own")
    labels: list[LabelName] | None = Field(None, description="label names in order; null: found in the training rows")
    class_weights: Literal["none", "balanced"] | dict[LabelName, float] = "none"
    label_smoothing: Fraction = 0.0
    thresholds: Literal["tuned"] | Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="multilabel: one for all, or tuned for each label on the dev rows"
    )
    tags: Literal["auto", "iob1", "iob2", "bioes", "none"] = Field(
        "auto", description="tagging: how spans are spelled for the model; none: one tag a word, no spans"
    )
    crf: bool = Field(False, description="tagging: a linear-chain CRF on top, with the scheme's constraints")
    alignment: Literal["first", "mean"] = Field("first", description="tagging: which of a word's tokens speak for it")
    stride: int | None = Field(None, ge=0, description="tokens that the windows of a long text share")
    max_answer: int = Field(30, ge=1, description="answering: most tokens of an answer")
    n_best: int = Field(5, ge=1, description="answering: how many candidates an answer lists")
    normalise: Literal["auto", "english", "chinese"] = Field(
        "auto", description="answering: how answers are compared: as SQuAD does, or as CMRC 2018"
    )
    mask_share: float = Field(0.15, gt=0, lt=1, description="mlm: share of tokens that are hidden")
    masking: Literal["token", "word", "span"] = Field("word", description="mlm: what is hidden together")
    sentences: Literal["none", "nsp", "order"] = Field(
        "none", description="mlm: nsp: does the second part follow; order: which part comes first"
    )
    options: dict[str, Any] = Field({}, description="what a task of your own takes")
    metric: str | None = Field(None, description="what picks the best checkpoint; null: the task's own")

    @model_validator(mode="after")
    def _fits_together(self) -> TaskConfig:
        _known_task(self.type)
        for key, types in USED_BY.items():
            given = getattr(self, key) != type(self).model_fields[key].default
            if given and self.type not in types and ":" not in self.type:
                raise ValueError(f"{key}: used by type: {' and '.join(types)} only; remove it")
        if self.type == "regression":
            for key, off in (("labels", None), ("class_weights", "none"), ("label_smoothing", 0.0)):
                if getattr(self, key) != off:
                    raise ValueError(f"{key}: a regression has no classes; remove it")
        if self.type == "multilabel" and self.label_smoothing:
            raise ValueError("label_smoothing: defined for classification only; remove it or set type: classification")
        if self.type != "multilabel" and self.thresholds != 0.5:
            raise ValueError("thresholds: used by type: multilabel only; remove it")
        if self.labels is not None:
            if len(set(self.labels)) != len(self.labels):
                twice = next(x for x in self.labels if self.labels.count(x) > 1)
                raise ValueError(f"labels: {twice!r} is listed twice")
            if self.type == "classification" and len(self.labels) < 2:
                raise ValueError("labels: a classification needs at least two")
            if isinstance(self.class_weights, dict):
                for name in self.class_weights:
                    if name not in self.labels:
                        raise ValueError(f"class_weights: {name!r} is not in labels{nearest(name, self.labels)}")
        return self


def _known_task(name: str) -> None:
    if name not in TASK_TYPES and ":" not in name:
        known = ", ".join(TASK_TYPES)
        raise ValueError(f"type: {name!r} is not known{nearest(name, TASK_TYPES)}; expected {known} or MODULE:CLASS")


class ColumnsConfig(Section):
    """Which column is what: a header name, or a 0-based number where the file has no header."""

    text: Column = "text"
    text_pair: Column | None = None
    label: Column = "label"


class DataConfig(Section):
    """Labelled rows: jsonl, csv, tsv or parquet (each also .gz), or a dataset on the hub as `hub:NAME`."""

    train: str
    dev: str | None = Field(None, description="null: dev_fraction of the training rows, stratified and seeded")
    test: str | None = None
    dev_fraction: float = Field(0.1, gt=0, lt=1)
    format: Literal["auto", "jsonl", "csv", "tsv", "parquet", "conll", "conllu", "text"] = "auto"
    tag_scheme: Literal["auto", "iob1", "iob2", "bioes", "none", "any"] = Field(
        "auto", description="tagging: how tags of words are spelled; any: read what can be read, refuse nothing"
    )
    columns: ColumnsConfig = ColumnsConfig()
    header: bool = Field(True, description="first line of a csv or tsv names its columns")
    quoting: Literal["auto", "standard", "none"] = Field(
        "auto", description="auto: standard for csv, none for tsv (as GLUE files need)"
    )
    encoding: str = "utf-8"
    label_separator: str = Field(",", min_length=1, description="multilabel: between labels in one csv or tsv cell")
    overlap: Literal["error", "longest"] = Field(
        "error", description="tagging: spans that overlap; longest: the longer of two stays, and what goes is counted"
    )
    missing: Rule = Field("error", description="rows where text or label is missing")
    empty: Literal["error", "drop", "keep"] = Field("error", description="rows whose text is empty or blank")
    unknown_label: Rule = Field("error", description="rows in dev or test with a label that training never had")
    hub_config: str | None = Field(None, description="configuration name of a hub dataset")
    limit: int | None = Field(None, ge=1, description="use the first rows of the training file only")


class OneTask(TaskConfig):
    """One of several tasks on one encoder: what `task` says, with rows of its own."""

    data: DataConfig
    weight: float = Field(1.0, gt=0, description="of its loss; 2 counts twice")


class EarlyStopping(Section):
    patience: int = Field(3, ge=1, description="evaluations without a better metric before training stops")
    min_delta: float = Field(0.0, ge=0)


class TrainingConfig(MachineSettings):
    """How it is learned; how fast is said by what it is built on, which changes no result beyond rounding."""

    learning_rate: float = Field(5e-5, gt=0, description="left out: what suits the method")
    batch_size: int = Field(32, ge=1, description="sequences an optimizer step, over all processes")
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="ends training before `epochs` are over")
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup: float = Field(0.06, ge=0, description="below 1: share of all steps; from 1: steps")
    decay: Fraction = Field(0.2, description="wsd: share of all steps for the final decay")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0)
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of each layer, as a share of the one above it"
    )
    head_learning_rate: float | None = Field(None, gt=0, description="null: learning_rate")
    max_grad_norm: float | None = Field(1.0, gt=0)
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the averaged weights that are evaluated and saved"
    )
    seed: int = Field(0, ge=0)
    evaluate_every: int | Literal["epoch"] = Field("epoch", description="optimizer steps, or epoch")
    early_stopping: EarlyStopping | None = None
    max_bad_steps: int = Field(10, ge=1, description="non-finite steps in a row before training stops")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingConfig:
        if isinstance(self.evaluate_every, int) and self.evaluate_every < 1:
            raise ValueError("evaluate_every: must be at least 1")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError("betas: both must be in [0, 1)")
        if self.schedule == "wsd" and self.warmup < 1 and self.warmup + self.decay > 1:
            raise ValueError("decay: warmup and decay together exceed the whole run")
        return self


class RunConfig(Section):
    """Everything one run needs."""

    run: str = Field("runs/{name}", description="run folder; {name} is the name of this file")
    method: Literal[
        "full",
        "frozen",
        "contrastive",
        "vectors",
        "scratch",
        "tfidf",
        "onehot",
        "bitfit",
        "lora",
        "qlora",
        "int8",
        "ia3",
        "adapter",
        "prompt",
        "prefix",
    ] = Field(
        "full",
        description="full: fine-tune; frozen: a head on stored features; contrastive: few rows, by pairs; vectors: over "
        "word vectors; scratch: over nothing; tfidf, onehot: words counted; the others: docs/methods.md",
    )
    lora: LoraSettings = LoraSettings()
    quantise: QuantiseSettings = QuantiseSettings()
    adapter: AdapterSettings = AdapterSettings()
    prompt: PromptSettings = PromptSettings()
    unfreeze: UnfreezeSettings = UnfreezeSettings()
    model: ModelConfig
    task: TaskConfig = TaskConfig()
    tasks: dict[str, OneTask] = Field(
        {}, description="several tasks on one encoder, by name; each takes what task takes"
    )
    mixing: MixingConfig = MixingConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    features: FeaturesConfig = FeaturesConfig()
    head: HeadConfig = HeadConfig()
    words: WordsConfig = WordsConfig()
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml"]] = Field([])

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        values = without_rows(values)
        return method_defaults(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _head_fits(self) -> RunConfig:
        check_head_of(self)
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        check_tasks(self)
        self.model.check(self.method)
        check_machine(self.method, self.training)
        for section, methods in SECTIONS.items():
            if self.method not in methods and getattr(self, section) != type(getattr(self, section))():
                raise ValueError(
                    f"{section}: method: {self.method} does not use it; remove it or set method: "
                    f"{' or '.join(sorted(methods))}"
                )
        if self.adapter.reduction is not None and self.adapter.size is not None:
            raise ValueError("adapter.reduction: size says the same; give one of the two")
        if self.lora.dora and self.method != "lora":
            raise ValueError(f"lora.dora: method: {self.method} has no full-precision weights to decompose; remove it")
        if self.method == "prefix" and self.training.gradient_checkpointing:
            raise ValueError("training.gradient_checkpointing: a prefix is not computed twice; remove it")
        if self.method == "frozen" and self.training.layer_decay != 1.0:
            raise ValueError(
                "training.layer_decay: a frozen backbone has no learning rate; remove it or set method: full"
            )
        rows = {"data": self.data} | {f"tasks.{name}.data": task.data for name, task in self.tasks.items()}
        for key, data in rows.items():
            columns = data.columns
            used = [columns.text, columns.label] + ([columns.text_pair] if columns.text_pair is not None else [])
            if len(set(used)) != len(used):
                raise ValueError(
                    f"{key}.columns: the same column {next(c for c in used if used.count(c) > 1)!r} is named twice"
                )
            if not data.header and not all(isinstance(c, int) for c in used):
                raise ValueError(f"{key}.columns: without a header, columns are 0-based numbers")
        return self


# Keys, of the run and of training, that change where and how often a run writes, how fast it is and what memory it takes, not
# its result beyond rounding and which units dropout draws.
NOT_DECISIVE = frozenset(
    {"run", "trackers", "checkpoint_every", "threads", "steps", "sharding", "offload_optimizer", "timeout"}
    | {"token_budget", "gradient_checkpointing"}
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML file and apply `--set key=value` overrides.

    Relative paths in the file stay relative to the working directory, as on the command line.
    Raises ConfigError, naming key, line and nearest valid name.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `regraft init DATA` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as model, data and training, found {type(values).__name__}")
    refuse_twice(node, path)
    lines = lines_of(node)
    for override in overrides or []:
        key = _apply(values, override)
        lines[key] = 0
    values.setdefault("run", "runs/{name}")
    config = parse_config(values, source=str(path), lines=lines)
    return config.model_copy(update={"run": config.run.replace("{name}", path.stem)})


def changed_data(data: DataConfig, overrides: list[str]) -> DataConfig:
    """`data` with `--set data.KEY=VALUE` overrides. Raises ConfigError."""
    values = {"data": data.model_dump()}
    for override in overrides:
        path = _apply(values, override)
        if path[0] != "data" or len(path) < 2:
            raise ConfigError(f"--set {override}: here only what `data` says can be set, such as data.format=csv")
    try:
        return DataConfig.model_validate(values["data"])
    except ValidationError as error:
        problems = [explain(e, DataConfig, "--set data", {}) for e in distinct(error.errors())]
        raise ConfigError("\n".join(problems)) from None


def parse_config(values: dict[str, Any], *, source: str = "config", lines: dict[tuple, int] | None = None) -> RunConfig:
    """Validate a nested dict; `lines` maps key paths to 1-based lines of `source`, 0 for the command line."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [explain(e, RunConfig, source, lines or {}) for e in distinct(error.errors())]
        raise ConfigError("\n".join(problems)) from None


def config_hash(config: RunConfig) -> str:
    """Hash of all that decides the result of a run (not of where it is written or how often it is saved)."""
    data = config.model_dump(mode="json")
    for section in (data, data["training"]):
        for key in NOT_DECISIVE & section.keys():
            section.pop(key)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _apply(values: dict[str, Any], override: str) -> tuple:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as training.learning_rate=3e-5")
    path = tuple(key.strip().split("."))
    target = values
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {part} holds a value, not keys")
    try:
        target[path[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: not a YAML value: {error}") from None
    return path
