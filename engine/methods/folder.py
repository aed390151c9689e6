"""Load an adapter folder: its backbone, checked to be the one it was made for, and the adapter on it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from regraft.engine.config import ModelConfig
from regraft.engine.errors import ModelError
from regraft.engine.methods.adapt import Adaptation
from regraft.engine.methods.fingerprint import fingerprint
from regraft.engine.methods.settings import VIRTUAL, QuantiseSettings


def is_adapter_folder(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def load_adapter(folder: Path, facts: dict[str, Any]) -> Adaptation:
    """The backbone named in `facts` with the adapter of `folder` on it, in evaluation mode.

    Raises ModelError for another backbone than the adapter was made for.
    """
    from regraft.engine.heads.live import model_from
    from regraft.engine.tasks import task_from_spec

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


def put_adapter(adaptation: Adaptation, folder: Path) -> None:
    """Put the adapter of `folder` on the model. Raises ModelError when its weights do not fit."""
    if adaptation.method != "adapter":
        from peft import PeftModel

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                adaptation.peft = PeftModel.from_pretrained(adaptation.model, str(folder))
        except (RuntimeError, ValueError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ModelError(f"{folder}: the adapter does not fit: {' '.join(lines[:2])[:300]}") from None
        if adaptation.method in VIRTUAL:
            from regraft.engine.methods.virtual import put_virtual_tokens

            put_virtual_tokens(adaptation.model, adaptation.peft)
        return
    from regraft.engine.methods.own import read_own

    adaptation.spec = read_own(folder, adaptation.model)
    adaptation.load(folder)
