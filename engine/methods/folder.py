"""Load an adapter folder: its backbone, checked to be the one it was made for, and the adapter on it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from regraft.engine.config import ModelConfig
from regraft.engine.errors import ModelError
from regraft.engine.methods.adapt import WEIGHTS, Adaptation
from regraft.engine.methods.fingerprint import fingerprint
from regraft.engine.methods.settings import VIRTUAL, QuantiseSettings

CONFIG = "adapter_config.json"


def is_adapter_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def load_adapter(folder: Path, facts: dict[str, Any]) -> Adaptation:
    """The backbone named in `facts` with the adapter of `folder` on it, in evaluation mode.

    Raises ModelError for another backbone than the adapter was made for.
    """
    from regraft.engine.heads.live import model_from
    from regraft.engine.tasks import task_from_spec

    check_files(folder)  # before a backbone is loaded for them
    task = task_from_spec(facts["task"])
    model = model_from(facts, ModelConfig.model_validate(facts["model"]), task)
    task.attach(model)
    found = fingerprint(model)
    if found != facts["backbone"]:
        raise ModelError(
            f"{folder}: the adapter was made for another backbone: weights {facts['backbone'][:12]} were expected, "
            f"{facts['base_model']} holds {found[:12]}"
        )
    method = facts["method"]
    adaptation = Adaptation(method, model, found)
    if method in ("qlora", "int8"):
        from regraft.engine.methods.quantise import quantise_backbone

        quantise_backbone(model, method, QuantiseSettings.model_validate(facts["quantise"]))
    put_adapter(adaptation, folder)
    model.eval()
    return adaptation


def _weight_names(weights: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if not weights.is_file():
        raise ModelError(f"{weights}: no such file; an adapter's weights were expected there")
    try:
        with safe_open(weights, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{weights}: not a whole safetensors file ({error}); was its copy interrupted?") from None


def _check_all_taken(peft: Any, folder: Path) -> None:
    # peft passes over weights that its configuration, perhaps of defaults alone, makes no place for.
    from peft import get_peft_model_state_dict

    taken = get_peft_model_state_dict(peft, save_embedding_layers=False)
    left = [name for name in _weight_names(folder / WEIGHTS) if name not in taken]
    if left:
        raise ModelError(
            f"{folder / CONFIG}: describes another adapter than {WEIGHTS} holds, which has {left[0]}"
            + (f" and {len(left) - 1} more" if left[1:] else "")
        )


def check_files(folder: Path) -> None:
    """Raise ModelError where a file of an adapter folder is missing, or not what its name says; its weights are not read."""
    weights = folder / WEIGHTS
    names = _weight_names(weights)
    if not names:
        raise ModelError(f"{weights}: holds no weights")
    config = folder / CONFIG
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config}: cannot be read: {error}") from None
    if not isinstance(values, dict) or "peft_type" not in values:
        raise ModelError(f"{config}: expected the description of an adapter with a key peft_type, found none")


def put_adapter(adaptation: Adaptation, folder: Path) -> None:
    """Put the adapter of `folder` on the model. Raises ModelError when a file is damaged or the weights do not fit."""
    check_files(folder)
    if adaptation.method != "adapter":
        from peft import PeftModel

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                adaptation.peft = PeftModel.from_pretrained(adaptation.model, str(folder))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ModelError(
                f"{folder}: the adapter does not fit, or {CONFIG} is damaged: {' '.join(lines[:2])[:300]}"
            ) from None
        _check_all_taken(adaptation.peft, folder)
        if adaptation.method in VIRTUAL:
            from regraft.engine.methods.virtual import put_virtual_tokens

            put_virtual_tokens(adaptation.model, adaptation.peft)
        return
    from regraft.engine.methods.own import read_own

    adaptation.spec = read_own(folder, adaptation.model)
    adaptation.load(folder)
