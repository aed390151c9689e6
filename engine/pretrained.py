"""Pretrained encoders by folder, by name on the hub, or inside an installed package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.engine.errors import ConfigError, ModelError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from regraft.engine.config import ModelConfig
    from regraft.engine.new_words import NewWords
    from regraft.engine.tasks import Task


FROM_PADDING = frozenset(
    {"roberta", "xlm-roberta", "camembert", "data2vec-text", "longformer", "mpnet", "xlm-roberta-xl"}
)


def resolve(name: str, *, bare: bool = False) -> str:
    """`package:NAME/PATH` as the folder it means; anything else as it is. `bare`: a folder without config.json will do.

    Raises ModelError for a package or folder that is not there.
    """
    if name.startswith("package:"):
        package, _, inside = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"model.name: {name}: no installed package {package!r}; pip install {package.replace('_', '-')}"
            )
        folder = Path(next(iter(spec.submodule_search_locations))) / inside
        if not folder.is_dir():
            raise ModelError(f"model.name: {name}: the package has no folder {inside!r}")
        return str(folder)
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or path.exists() or name.count("/") > 1
    if not looks_local:
        return name
    path = path.expanduser()
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(f"model.name: {name}: no such folder{nearest(path.name, siblings)}")
    if (path / "best" / "config.json").is_file():
        return str(path / "best")  # a run folder: one run goes on from another
    if not bare and not (path / "config.json").is_file():
        hint = "; to train an encoder from nothing set model.config" if (path / "tokenizer.json").is_file() else ""
        raise ModelError(f"model.name: {path}: not a model folder: config.json is missing{hint}")
    return str(path)


def source_of(model: ModelConfig) -> str:
    """Folder, or name on the hub, that a run's tokenizer and weights (or those of its architecture) come from.

    Raises ModelError.
    """
    return resolve(model.name, bare=model.config is not None)


def has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


def position_limit(name: str, model: ModelConfig | None = None) -> int | None:
    """Most tokens a sequence may have by the model's position table; None where its config does not say. `model`: whose
    weights may be drawn at random, for an architecture of its own.

    The RoBERTa family counts positions from padding_idx + 1, so its table holds that many fewer.
    """
    file = Path(name) / "config.json"
    try:
        if model is not None and model.config is not None:
            from regraft.engine.architecture import fresh_settings

            values = fresh_settings(model, name).to_dict()
        else:
            values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else _hub_config(name)
    except (OSError, ValueError) as error:
        raise ModelError(explain(name, error)) from None
    limit = values.get("max_position_embeddings")
    if not isinstance(limit, int) or limit < 1:
        return None
    counts_from_padding = values.get("model_type") in FROM_PADDING
    return limit - (values.get("pad_token_id") or 0) - 1 if counts_from_padding else limit


def _hub_config(name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name).to_dict()


def load_classifier(config: ModelConfig, task: Task, new_words: NewWords | None = None) -> PreTrainedModel:
    """The encoder with a head for the task, in fp32; label names and problem type in its config. With `model.config` its
    weights are drawn from torch's generator; `new_words` get rows in its vocabulary.

    Raises ModelError for a folder that is not a model, and for a hub name without a network; ConfigError for an
    architecture that cannot be.
    """
    if task.type == "several":
        from regraft.engine.several.model import load_heads

        return load_heads(config, task)  # type: ignore[arg-type, return-value]
    labels = task.labels
    named: dict[str, Any] = {"num_labels": task.outputs} if task.outputs else {}
    if labels and len(labels) == task.outputs:
        named |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if task.problem_type is not None:
        named["problem_type"] = task.problem_type
    return _load(config, task.auto_model, named, new_words)


def load_encoder(config: ModelConfig, new_words: NewWords | None = None) -> PreTrainedModel:
    """The bare encoder in fp32, its weights and vocabulary as `load_classifier` says. Raises ModelError, ConfigError."""
    return _load(config, "AutoModel", {}, new_words)


def _load(config: ModelConfig, kind: str, named: dict[str, Any], new_words: NewWords | None) -> PreTrainedModel:
    import transformers
    from transformers import AutoConfig
    from transformers.utils import logging

    name = source_of(config)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fresh = config.config is not None
    try:
        if fresh:
            from regraft.engine.architecture import fresh_settings

            settings = fresh_settings(config, name)
            for key, value in named.items():
                setattr(settings, key, value)
        else:
            settings = AutoConfig.from_pretrained(name, revision=config.revision, **named)
        if config.dropout is not None:
            for key in (
                "hidden_dropout_prob",
                "attention_probs_dropout_prob",
                "dropout",
                "attention_dropout",
                "mlp_dropout",
            ):
                if hasattr(settings, key):
                    setattr(settings, key, config.dropout)
        made = getattr(transformers, kind)
        if fresh:
            model = _drawn(made, settings)
            drawn = {n for n, _ in model.named_parameters()}
        else:
            model, found = made.from_pretrained(
                name, config=settings, revision=config.revision, dtype="float32", output_loading_info=True
            )
            drawn = found["missing_keys"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(explain(name, error)) from None
    if new_words is not None:
        from regraft.engine.new_words import add_rows

        add_rows(model, new_words)
    model.regraft_fresh = frozenset(drawn)  # at random: no method may leave them untrained
    return model


def _drawn(made: Any, settings: Any) -> Any:
    try:
        return made.from_config(settings, dtype="float32").eval()
    except ValueError as error:  # sizes that do not fit together
        raise ConfigError(f"model.config: {' '.join(str(error).split())[:300]}") from None


def explain(name: str, error: Exception) -> str:
    """Why a model could not be loaded, in one line."""
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    if Path(name).is_dir():
        hint = "" if has_weights(Path(name)) else "; it has no weights: to draw them at random set model.config: {}"
        return f"model.name: {name}: cannot be loaded as an encoder with a head for the task: {first}{hint}"
    return (
        f"model.name: {name}: no such folder here, and the hub did not give it ({first}). "
        "Without a network, give the folder of a downloaded model"
    )
