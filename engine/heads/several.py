"""Several frozen models over the same encoder as one model that runs the encoder once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from regraft.engine.errors import ExportError
from regraft.engine.features.encoder import GraftedEncoder, load_backbone
from regraft.engine.features.spec import weights_hash
from regraft.engine.heads.model import HEAD_FILE, load_head
from regraft.engine.models import ready_to_answer
from regraft.engine.trained import Trained, find_trained, name_of, read_facts


class ManyHeads(GraftedEncoder):
    """Every head over its own layers and pooling of one pass. Shape: logits [B, sum of all C]."""

    def __init__(self, backbone: nn.Module, heads: Sequence[nn.Module], about: Sequence[dict[str, Any]]) -> None:
        layers = sorted({n for one in about for n in one["layers"]})
        super().__init__(backbone, layers, "none")
        self.heads = nn.ModuleList(heads)
        self.about = list(about)
        self.places = [[layers.index(n) for n in one["layers"]] for one in about]

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        hidden, mask = self.hidden(inputs), inputs.get("attention_mask")
        logits = []
        for head, one, places in zip(self.heads, self.about, self.places, strict=True):
            index = torch.tensor(places, device=hidden.device)
            logits.append(self.headed(head, hidden.index_select(2, index), mask, one["pooling"], one["normalise"]))
        return SequenceClassifierOutput(logits=torch.cat(logits, dim=1))


def load_several(models: Sequence[str | Path]) -> Trained:
    """The models as one. Raises ExportError where they do not share an encoder, tokenizer and length limit."""
    from regraft.engine.config import DataConfig
    from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
    from regraft.engine.methods.adapt import Adaptation
    from regraft.engine.methods.settings import ADAPTERS
    from regraft.engine.tasks import task_from_spec
    from regraft.engine.tasks.base import FIRST
    from regraft.engine.tasks.several import Several

    folders = [find_trained(model) for model in models]
    facts = [read_facts(folder) for folder in folders]
    for folder, about in zip(folders, facts, strict=True):
        if "head" not in about or "features" not in about or about.get("method") in ADAPTERS:
            raise ExportError(
                f"{folder}: method {about.get('method')!r}; only heads on a frozen encoder can share one (method: frozen)"
            )
    names = [name_of(model) for model in models]
    if len(set(names)) < len(names):
        raise ExportError(f"{', '.join(names)}: heads are named by their run folders, which must differ")
    first, tokenizer = folders[0], load_fast_tokenizer(str(folders[0]))
    for folder, about in zip(folders[1:], facts[1:], strict=True):
        differs = [
            what
            for what, a, b in (
                ("encoder", encoder_hash(first), encoder_hash(folder)),
                ("tokenizer", tokenizer.fingerprint, load_fast_tokenizer(str(folder)).fingerprint),
                ("max_length", facts[0]["max_length"], about["max_length"]),
            )
            if a != b
        ]
        if differs:
            raise ExportError(
                f"{folder}: not the same {' and '.join(differs)} as {first}; export it to a bundle of its own"
            )
    tasks = {name: task_from_spec(about["task"]) for name, about in zip(names, facts, strict=True)}
    for name, task in tasks.items():
        if task.reads != FIRST:
            raise ExportError(
                f"{name}: a {task.type} head answers each token, and one bundle of several heads gives one answer a text each; "
                "export it to a bundle of its own"
            )
    heads = [load_head(folder / HEAD_FILE, about["head"]) for folder, about in zip(folders, facts, strict=True)]
    model = ManyHeads(load_backbone(first), heads, [about["features"] for about in facts])
    running = ready_to_answer(model, tokenizer.pad_token_id, packing="auto", kernels="auto")
    task = Several(tasks)
    data = DataConfig.model_validate(facts[0]["data"])
    whole = {**facts[0], "method": "frozen", "heads": names}
    whole["tasks"] = {name: about["data"] for name, about in zip(names, facts, strict=True)}
    whole["folders"] = {name: str(folder) for name, folder in zip(names, folders, strict=True)}
    return Trained(first, task, tokenizer, facts[0]["max_length"], data, whole, running, Adaptation("frozen", model))


def encoder_hash(folder: Path) -> str:
    """Of the encoder's weights in a model folder, the head left out."""
    return weights_hash(folder, leave_out=HEAD_FILE)
