"""Several adapters over one backbone: its weights are in memory once, and each adapter is ready to answer at any time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.engine.errors import ModelError, nearest
from regraft.engine.methods.settings import ADAPTERS
from regraft.engine.trained import Trained, find_trained, load_trained, name_of, read_facts

# What a method puts between a layer's path and the weights it leaves alone.
_WRAPPED = re.compile(r"\.(base_layer|table)(?=\.|$)")


def load_adapters(
    runs: Sequence[str | Path], *, packing: str = "auto", device: str | None = None
) -> dict[str, Trained]:
    """Trained adapters by the names of their run folders, unmerged, on one copy of their backbone's weights.

    To switch is to take another: `load_adapters(runs)["support"]`. Methods, ranks and tasks may differ.
    Raises ModelError for a run that is no adapter, for two of one name, and for another backbone.
    """
    check_adapters(runs)
    found: dict[str, Trained] = {}
    for run in runs:
        trained = load_trained(run, packing=packing, device=device, merge=False)
        for first in found.values():
            share_weights(first.running.model, trained.running.model)
            break
        found[name_of(run)] = trained
    return found


def check_adapters(runs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What is known of each run, without loading a model. Raises as `load_adapters`."""
    names = [name_of(run) for run in runs]
    if len(set(names)) < len(names):
        raise ModelError(f"{', '.join(names)}: adapters are named by their run folders, which must differ")
    folders = [find_trained(run) for run in runs]
    facts = [read_facts(folder) for folder in folders]
    for folder, about in zip(folders, facts, strict=True):
        if about.get("method") not in ADAPTERS:
            raise ModelError(
                f"{folder}: method {about.get('method')!r} leaves a whole model; only adapters "
                f"({', '.join(sorted(ADAPTERS))}) can share a backbone"
            )
        if about["backbone"] != facts[0]["backbone"]:
            raise ModelError(
                f"{folder}: made for another backbone (weights {about['backbone'][:12]}, {about['base_model']}) than "
                f"{folders[0]} ({facts[0]['backbone'][:12]}, {facts[0]['base_model']})"
            )
    return facts


def find_adapters(folder: str | Path, names: Sequence[str]) -> list[Path]:
    """Run folders of those names in `folder`. Raises ModelError naming the ones that are there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; --adapter takes a folder that holds run folders")
    there = sorted(p.name for p in folder.iterdir() if (p / "best" / "adapter_config.json").is_file())
    for name in names:
        if name not in there:
            raise ModelError(
                f"--adapter {name}: {folder} has no run of that name with an adapter{nearest(name, there)}; "
                f"there are {', '.join(there) or 'none'}"
            )
    return [folder / name for name in names]


@torch.no_grad()
def share_weights(first: nn.Module, other: nn.Module) -> int:
    """Let `other` hold the very tensors of `first` wherever both have the same numbers under the same name; bytes that
    are held once now instead of twice."""
    own = {_plain(name): value for name, value, _, _ in _tensors(first)}
    saved = 0
    for name, value, holder, key in list(_tensors(other)):
        same = own.get(_plain(name))
        if same is None or same is value or same.shape != value.shape or same.dtype != value.dtype:
            continue
        if same.device == value.device and type(same) is type(value) and torch.equal(same, value):
            holder[key] = same
            saved += value.numel() * value.element_size()
    return saved


def _tensors(model: nn.Module) -> list[tuple[str, Any, dict[str, Any], str]]:
    """Name, tensor, and where it is held, of every parameter and buffer."""
    return [
        (f"{path}.{key}", value, holder, key)
        for path, module in model.named_modules()
        for holder in (module._parameters, module._buffers)
        for key, value in holder.items()
        if value is not None
    ]


def _plain(name: str) -> str:
    return _WRAPPED.sub("", name)
