"""Checkpoints: everything a run needs to go on bit for bit, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regraft.engine.errors import TrainingError
from regraft.engine.files import new_folder, remove_leftovers
from regraft.engine.training.optimizer import AveragedWeights

if TYPE_CHECKING:
    from regraft.engine.training.sharding import Shards


@dataclass
class Progress:
    """Where a run stands. `step`: optimizer steps done; `history_bytes`: length of metrics.jsonl at that moment."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0
    best_step: int = -1
    best_value: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    history_bytes: int = 0
    evaluated_at: int = -1
    extra: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, progress: Progress, trained: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write `folder/step-N` from what `content_of` gives, and delete older ones."""
    from safetensors.torch import save_file

    with new_folder(folder / f"step-{progress.step:08d}") as beside:
        save_file(trained, beside / "model.safetensors")
        with (beside / "optimizer.pt").open("wb") as file:  # a file of ours: its errors keep their errno
            torch.save(state, file)
        (beside / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    for old in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def content_of(
    model: nn.Module,
    optimizer: Any,
    scaler: Any = None,
    averaged: AveragedWeights | None = None,
    shards: Shards | None = None,
    *,
    held: bool = True,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a checkpoint holds: trained weights, and the rest. Frozen weights are not written again: they are in the backbone.

    `shards`: weights that are shared out; every process has to call, and one that `held` gets what all put together.
    """
    trained: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
    if averaged:
        state["averaged"] = averaged.shadow
    if shards is not None:
        trained, state = shards.whole_state(trained, state, optimizer, held=held)
    trained |= {f"buffer:{n}": b for n, b in _own_buffers(model)}
    return {n: t.detach().contiguous() for n, t in trained.items()}, state


def _own_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    # Only what training changes: position tables and the like are made anew with the model.
    kept = set(model.state_dict())
    return [(n, b) for n, b in model.named_buffers() if n in kept]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; leftovers of a killed write are removed."""
    if not folder.is_dir():
        return None
    remove_leftovers(folder)
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any = None,
    averaged: AveragedWeights | None = None,
    *,
    shards: Shards | None = None,
) -> Progress:
    """Put a checkpoint's state into model, optimizer, scaler and average. Raises TrainingError if it does not fit."""
    from safetensors.torch import load_file

    try:
        saved = load_file(path / "model.safetensors")
        state = torch.load(path / "optimizer.pt", weights_only=True)
        progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
    except Exception as error:
        raise TrainingError(f"{path}: cannot be read ({error}); delete the folder to start the run anew") from None
    own = dict(model.named_parameters()) | {f"buffer:{n}": b for n, b in _own_buffers(model)}
    with torch.no_grad():
        for name, value in saved.items():
            if name not in own or getattr(own[name], "ds_shape", own[name].shape) != value.shape:
                raise TrainingError(f"{path}: {name} {tuple(value.shape)} does not fit the model; start with --restart")
            if shards is None:
                own[name].copy_(value)
    if shards is not None:
        state = shards.own_state(saved, state, own, optimizer)
    optimizer.load_state_dict(state["optimizer"])
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    if averaged:
        for target, value in zip(averaged.shadow, state["averaged"], strict=True):
            target.copy_(value)
    return progress
