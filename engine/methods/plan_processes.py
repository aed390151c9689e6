"""What one of several processes holds of a planned run's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from regraft.engine.config import RunConfig

if TYPE_CHECKING:
    from regraft.engine.methods.plan import Memory


def of_one_process(memory: Memory, model: Any, config: RunConfig, processes: int) -> Memory:
    """`memory` is of a run in one process, with the activations of this process's share of a step.

    Shards: parts are divided evenly, and what a layer's forward and backward need whole is added. `hybrid` is divided within
    a machine: `processes` are those of one. DeepSpeed's own buffers are not counted.
    """
    sharding = config.training.sharding
    if processes == 1:
        return memory
    if sharding == "none":
        # DistributedDataParallel keeps a second place for the gradients; on a CPU it is never touched, and so takes nothing.
        return replace(memory, gradients=memory.gradients * (2 if torch.cuda.is_available() else 1))
    stage = 3 if sharding in ("full", "hybrid") else int(sharding[-1])
    divided = ["optimizer"] + (["gradients"] if stage >= 2 else []) + (["weights", "averages"] if stage == 3 else [])
    parts = {name: -(-getattr(memory, name) // processes) for name in divided}
    if stage == 3:
        parts["weights"] += _whole_at_a_time(model, sharding)
    return replace(memory, **parts)


def _whole_at_a_time(model: Any, sharding: str) -> int:
    """Bytes of weights that are whole at once: FSDP's the largest layer and what is in none (embeddings, head), ZeRO's the
    largest weight."""
    from regraft.engine.training.sharding import _layers

    if sharding == "zero3":
        return max(p.numel() * p.element_size() for p in model.parameters())
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in _layers(model)]
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    return everything - sum(layers) + max(layers, default=0)
