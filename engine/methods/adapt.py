"""Apply a method to a model in place: what trains, what is saved, how it is loaded and merged again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.errors import ModelError
from regraft.engine.methods.settings import ADAPTERS, VIRTUAL, LoraSettings
from regraft.engine.methods.walk import (
    check_patterns,
    chosen_linears,
    feed_forward_ends,
    head_modules,
    head_parameters,
    keys_and_values,
)

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig

WEIGHTS = "adapter_model.safetensors"
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass
class Adaptation:
    """A model with a method applied to it.

    `peft`: peft's model around it where peft does the method; `spec`: the own adapters' description; `fingerprint`:
    of the backbone that an adapter is made for.
    """

    method: str
    model: Any
    fingerprint: str | None = None
    peft: Any = None
    spec: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether what is saved is a small folder that needs the backbone."""
        return self.method in ADAPTERS

    @property
    def mergeable(self) -> bool:
        return self.peft is not None and self.method not in VIRTUAL

    def save(self, folder: Path) -> None:
        """Write the trained part: an adapter folder, or the whole model."""
        if not self.is_adapter:
            self.model.save_pretrained(folder)
        elif self.peft is not None:
            self.peft.save_pretrained(folder, save_embedding_layers=False)
        else:
            from safetensors.torch import save_file

            from regraft.engine.methods.own import write_own

            write_own(folder, self)
            save_file(trained_weights(self.model), folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Put saved weights into the model in memory."""
        from safetensors.torch import load_file

        if not self.is_adapter:
            self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
            return
        weights = load_file(folder / WEIGHTS)
        if self.peft is not None:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.peft, weights)
            return
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                if name not in own or own[name].shape != value.shape:
                    raise ModelError(f"{folder}: {name} {tuple(value.shape)} does not fit {type(self.model).__name__}")
                own[name].copy_(value)

    def merge(self) -> Any:
        """The plain model with the adapter worked into its weights. Raises ModelError where that cannot be done."""
        if not self.is_adapter:
            return self.model
        if self.method in VIRTUAL:
            raise ModelError(
                f"method: {self.method} cannot be merged: virtual tokens are no change of a weight; `regraft export` takes "
                "them as they are"
            )
        if self.peft is None:
            from regraft.engine.methods.own import merge_own

            return merge_own(self)
        if self.method in ("qlora", "int8"):
            merge_quantised(self.model)
        unload_merged(self.model)
        self.peft = None
        return self.model


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def adapt(model: Any, config: RunConfig, precision: str = "fp32") -> Adaptation:
    """Apply `config.method` to a freshly loaded model. Raises ModelError where the two do not fit."""
    method = config.method
    if method in ADAPTERS and model.get_output_embeddings() is not None:
        raise ModelError(
            f"method: {method}: the head's weights are the word embedding's; use method: full for this task"
        )
    print_of_backbone = None
    if method in ADAPTERS:
        from regraft.engine.methods.fingerprint import fingerprint

        print_of_backbone = fingerprint(model)
    adaptation = Adaptation(method, model, print_of_backbone)
    if method in ("full", "bitfit"):
        _choose_weights(model, config)
    elif method in ("lora", "qlora", "int8"):
        if method != "lora":
            from regraft.engine.methods.quantise import quantise_backbone

            quantise_backbone(model, method, config.quantise, precision)
        adaptation.peft = with_lora(model, config.lora)
    elif method == "ia3":
        adaptation.peft = _with_ia3(model)
    elif method in VIRTUAL:
        from regraft.engine.methods.virtual import with_virtual_tokens

        adaptation.peft = with_virtual_tokens(model, method, config.prompt)
        _check_trained(model, [])
    else:
        from regraft.engine.methods.own import add_own

        adaptation.spec = add_own(model, config)
    return adaptation


def _choose_weights(model: Any, config: RunConfig) -> None:
    from regraft.engine.methods.unfreeze import trainable_from_start
    from regraft.engine.training.optimizer import head_names

    head = head_names(model)
    wanted = trainable_from_start(model, config.unfreeze)
    if config.method == "bitfit":
        biases = {n for n in wanted if n.rpartition(".")[2] == "bias" and n not in head}
        if not biases:
            raise ModelError(f"method: bitfit: {type(model).__name__} has no biases to train; use method: lora")
        wanted = biases | head
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in wanted)


def peft_options(model: Any) -> dict[str, Any]:
    """What every configuration of peft says of this model."""
    name = type(model).__name__
    kind = next((v for end, v in TASK_TYPES.items() if name.endswith(end)), None)
    return {"task_type": kind, "modules_to_save": head_modules(model) or None}


def with_lora(model: Any, settings: LoraSettings) -> Any:
    """peft's model around `model`, with LoRA on the chosen linear layers of the backbone."""
    from peft import LoraConfig

    names = chosen_linears(model, settings.targets)
    check_patterns("lora.rank_pattern", settings.rank_pattern, names)
    check_patterns("lora.alpha_pattern", settings.alpha_pattern, names)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides by the rank; any number will do
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        target_modules=names,
        **peft_options(model),
    )
    wrapped = wrap(model, config)
    _check_trained(model, names)
    return wrapped


def wrap(model: Any, config: Any) -> Any:
    """peft's model around `model`."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute that was renamed
        return get_peft_model(model, config)


def _with_ia3(model: Any) -> Any:
    """(IA)^3 (Liu et al. 2022): keys, values and the inner feed-forward activations are scaled by trained vectors."""
    from peft import IA3Config

    inner, names = feed_forward_ends(model), keys_and_values(model)
    if not names or not inner:
        raise ModelError(
            f"method: ia3: keys, values and feed-forward layers of {type(model).__name__} were not found; use method: lora"
        )
    wrapped = wrap(model, IA3Config(target_modules=names + inner, feedforward_modules=inner, **peft_options(model)))
    _check_trained(model, names + inner)
    return wrapped


def _check_trained(model: Any, targets: list[str]) -> None:
    # A head that stays frozen, or a target that peft's matching passed over, shows here and not after hours.
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for part in (*targets, *head_modules(model)):
        if not any(n.startswith(f"{part}.") for n in trained):
            raise ModelError(f"{type(model).__name__}: {part} was to be trained and is not")


def unload_merged(model: Any) -> None:
    """Merge peft's layers into their base layers and take peft's wrappers away. peft's own `merge_and_unload` fails for
    (IA)^3 under a head of several layers (0.21)."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            try:
                module.merge(safe_merge=True)
            except ValueError as error:  # peft's, for weights that are not finite
                raise ModelError(f"the adapter's weights of {name} cannot be merged: {error}") from None
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save[module.active_adapter]
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    if hasattr(model, "peft_config"):
        del model.peft_config


def merge_quantised(model: Any) -> None:
    """Replace quantised layers under LoRA by fp32 layers of the same weights, so that merging rounds nothing."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    from regraft.engine.methods.quantise import whole_weight

    for name, old in list(model.named_modules()):
        if not isinstance(old, BaseTunerLayer) or not hasattr(old, "lora_A"):
            continue
        base: Any = old.get_base_layer()
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        plain.weight.data.copy_(whole_weight(base))
        if base.bias is not None:
            plain.bias.data.copy_(base.bias.data)
        old.base_layer = plain  # type: ignore[attr-defined]
        old.__class__ = LoraLinear
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, old)


__all__ = ["Adaptation", "adapt", "head_parameters", "with_lora"]
