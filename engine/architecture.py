"""An encoder to be trained from nothing: its architecture from a configuration, its vocabulary from the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
from regraft.engine.errors import ConfigError, nearest

if TYPE_CHECKING:
    from regraft.engine.config import ModelConfig


def fresh_settings(model: ModelConfig, name: str) -> Any:
    """transformers' configuration of an encoder with `model.config`'s keys over those of `name`'s config.json, and room
    for every token of `name`'s tokenizer.

    Raises ConfigError for an architecture, a key or a value that transformers does not know, or too small a vocabulary.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given = dict(model.config or {})
    known_of = _values_of(name, model.revision)
    kind = given.pop("model_type", known_of.get("model_type"))
    if kind is None:
        raise ConfigError(f"model.config.model_type: missing, and {name} has no config.json; such as bert or roberta")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"model.config.model_type: {kind!r} is not known{nearest(str(kind), CONFIG_MAPPING.keys())}")
    made = CONFIG_MAPPING[kind]
    default = made()
    valid = {*vars(default), *made.attribute_map}
    for key in given:
        if key not in valid or key.startswith("_"):
            raise ConfigError(f"model.config.{key}: not a key of {kind}{nearest(key, valid)}")
    values = {**(known_of if known_of.get("model_type") == kind else {}), **given}
    tokenizer = load_fast_tokenizer(name, revision=model.revision)
    needed = max(tokenizer.backend.get_vocab().values()) + 1
    if given.get("vocab_size", needed) < needed:
        raise ConfigError(
            f"model.config.vocab_size: {given['vocab_size']}; the tokenizer of {name} has {needed} tokens"
        )
    values |= {"vocab_size": given.get("vocab_size", needed), "pad_token_id": tokenizer.pad_token_id}
    for key in valid:  # beginning, end and the like of the vocabulary that the defaults were made for
        value = values.get(key, getattr(default, key, None))
        if key.endswith("_token_id") and isinstance(value, int) and value >= values["vocab_size"]:
            values[key] = None
    try:
        return made.from_dict(values)
    except Exception as error:  # transformers checks types and sizes that fit together, each by an error of its own
        told = " ".join(str(error).split())[:300]
        raise ConfigError(f"model.config: cannot be a {kind}: {told}") from None


def _values_of(name: str, revision: str | None) -> dict[str, Any]:
    """config.json of a folder ({} where there is none) or of a name on the hub, without what describes its weights."""
    from transformers import PreTrainedConfig

    file = Path(name) / "config.json"
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
    elif Path(name).is_dir():
        return {}
    else:
        values = PreTrainedConfig.get_config_dict(name, revision=revision)[0]
    told_of_weights = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label")
    return {key: value for key, value in values.items() if key not in (*told_of_weights, "label2id", "problem_type")}
