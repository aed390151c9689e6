"""The adapters that peft lacks, or that it has in a form no packed row can take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.engine.errors import ModelError

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.methods.adapt import Adaptation


def add_own(model: Any, config: RunConfig) -> Any:
    """Apply an own method; the specification that is saved with it. The head and the adapter train, nothing else."""
    from regraft.engine.methods.bottleneck import add_bottlenecks, bottleneck_spec

    spec = bottleneck_spec(model, config.adapter)
    add_bottlenecks(model, spec)
    train_adapters(model)
    return spec


def train_adapters(model: Any) -> None:
    from regraft.engine.methods.walk import head_parameters

    head = head_parameters(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in head or ".adapter." in name)


def write_own(folder: Path, adaptation: Adaptation) -> None:
    from regraft.engine.methods.bottleneck import write_spec

    write_spec(folder, adaptation.spec, adaptation.model.name_or_path)


def read_own(folder: Path, model: Any) -> Any:
    """Make the model ready to take the weights of an own adapter folder."""
    from regraft.engine.methods.bottleneck import add_bottlenecks, read_spec

    spec = read_spec(folder)
    add_bottlenecks(model, spec)
    train_adapters(model)
    return spec


def merge_own(adaptation: Adaptation) -> Any:
    raise ModelError(
        f"method: {adaptation.method} cannot be merged: a bottleneck with a non-linearity is no change of a weight"
    )
