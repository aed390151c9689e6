"""Checkpoints: everything a run needs to go on bit for bit, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.engine.errors import TrainingError
from regraft.engine.files import new_folder, remove_leftovers
from regraft.engine.training.optimizer import AveragedWeights


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


def save_checkpoint(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any = None,
    averaged: AveragedWeights | None = None,
) -> None:
    """Write `folder/step-N` and delete older ones. Frozen weights are not written again: they are in the backbone."""
    from safetensors.torch import save_file

    with new_folder(folder / f"step-{progress.step:08d}") as beside:
        trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        trained |= {f"buffer:{n}": b.detach().contiguous() for n, b in _own_buffers(model)}
        save_file(trained, beside / "model.safetensors")
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        if averaged:
            state["averaged"] = averaged.shadow
        torch.save(state, beside / "optimizer.pt")
        (beside / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    for old in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(old, ignore_errors=True)


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
            if name not in own or own[name].shape != value.shape:
                raise TrainingError(f"{path}: {name} {tuple(value.shape)} does not fit the model; start with --restart")
            own[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    if averaged:
        for target, value in zip(averaged.shadow, state["averaged"], strict=True):
            target.copy_(value)
    return progress
