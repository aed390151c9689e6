"""A head of ours on the live encoder: trained end to end with it, by `method: full` or through an adapter.

`head.type: linear` stays transformers' own head; mlp, attention, bilstm and cnn are those of stored features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regraft.engine.features.encoder import GraftedEncoder
from regraft.engine.features.spec import chosen_layers
from regraft.engine.heads.fits import check_head, on_live_encoder
from regraft.engine.heads.head import Head, HeadShape, build_head
from regraft.engine.heads.model import HEAD_FILE
from regraft.engine.pretrained import load_classifier, load_encoder
from regraft.engine.tasks import Task
from regraft.engine.tasks.base import TOKENS

if TYPE_CHECKING:
    from regraft.engine.config import ModelConfig, RunConfig
    from regraft.engine.new_words import NewWords


class LiveModel(GraftedEncoder):
    """Encoder and head with what the methods ask of a transformers model.

    `facts`: what regraft.json says of the head. Saved as a Hugging Face folder of the encoder with head.safetensors.
    """

    def __init__(self, backbone: Any, head: nn.Module, about: Mapping[str, Any], shape: HeadShape) -> None:
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # nothing reads it, and no method is to adapt it
        super().__init__(backbone, about["layers"], about["pooling"], normalise=about["normalise"], head=head)
        self.facts = {"head": shape.spec(), "features": dict(about)}
        fresh = getattr(backbone, "regraft_fresh", ())
        self.regraft_fresh = frozenset(f"backbone.{n}" for n in fresh if not n.startswith("pooler."))
        self.name_or_path = str(backbone.name_or_path)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        return None

    def gradient_checkpointing_enable(self, options: dict[str, Any] | None = None) -> None:
        self.backbone.gradient_checkpointing_enable(options)

    def save_pretrained(self, folder: Path) -> None:
        """The encoder's own files, and head.safetensors."""
        from safetensors.torch import save_file

        self.backbone.save_pretrained(folder)
        values = {k: v.contiguous() for k, v in self.head.state_dict().items()}  # type: ignore[union-attr]
        crf = getattr(self, "crf", None)
        if crf is not None:
            values |= {f"crf.{k}": v.contiguous() for k, v in crf.state_dict().items()}
        save_file(values, folder / HEAD_FILE)

    def findings(self) -> dict[str, Any]:
        """What the head learned besides its weights, for the report."""
        head: Any = self.head
        return head.findings(self.layers)


def model_of(config: RunConfig, task: Task, new_words: NewWords | None = None) -> Any:
    """The model that a run trains: transformers' own with its head, or the bare encoder with one of ours.

    Raises ModelError and ConfigError.
    """
    if not on_live_encoder(config):
        return load_classifier(config.model, task, new_words)
    check_head(config.head.type, config.task.type, task.reads)
    backbone = load_encoder(config.model, new_words)
    depth, hidden = int(backbone.config.num_hidden_layers), int(backbone.config.hidden_size)
    layers = chosen_layers(config.features.layers, depth, config.model.name)
    tokens = task.reads == TOKENS
    pooling = config.features.pooling
    if pooling == "auto":
        pooling = "none" if tokens or config.head.reads_tokens else "mean"
    head = build_head(config.head, len(layers), hidden, task.outputs, tokens=tokens)
    about = {"layers": list(layers), "pooling": pooling, "normalise": config.features.normalise}
    return LiveModel(backbone, head, about, head.shape)


def model_from(facts: Mapping[str, Any], config: ModelConfig, task: Task) -> Any:
    """The model that an adapter is put on again, as `model_of` made it; its head comes with the adapter."""
    if "head" not in facts:
        return load_classifier(config, task)
    head = Head(HeadShape(**facts["head"]))
    return LiveModel(load_encoder(config), head, facts["features"], head.shape)


def saved_weights(model: Any, folder: Path) -> dict[str, Tensor]:
    """Weights of a whole saved model by their names in `model`."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    if not isinstance(model, LiveModel):
        return weights
    head = {k if k.startswith("crf.") else f"head.{k}": v for k, v in load_file(folder / HEAD_FILE).items()}
    return {f"backbone.{k}": v for k, v in weights.items()} | head
