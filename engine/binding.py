"""Other forwards bound on instances of modules, by their form, and kept only where the logits stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel

PROOF_TOLERANCE = 1e-4
Kinds = dict[str, tuple[Callable[[Any], bool], Callable[..., Tensor]]]


def bind_kinds(running: RunningModel, kinds: Kinds) -> dict[str, int]:
    """Bind each kind's forward where a module is built alike and the logits stay the same; how many of each were."""
    from regraft.engine.fast import _logits, _small_batch

    batch = _small_batch(running)
    before = _logits(running, batch)
    bound = {}
    for name, (built_alike, forward) in kinds.items():
        found = [m for m in running.model.modules() if "forward" not in vars(m) and built_alike(m)]
        for module in found:
            module.forward = forward.__get__(module)
        try:
            kept = not found or same(_logits(running, batch), before)
        except Exception:  # a module of like parts that is called in another way
            kept = False
        if not kept:
            for module in found:
                del module.forward
        bound[name] = len(found) if kept else 0
    return bound


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found.float(), wanted.float(), rtol=PROOF_TOLERANCE, atol=PROOF_TOLERANCE)


def is_output(module: Any) -> bool:
    # BertSelfOutput, BertOutput and their kin: LayerNorm(dropout(dense(x)) + residual)
    parts = [type(getattr(module, name, None)) for name in ("LayerNorm", "dropout")]
    return parts == [nn.LayerNorm, nn.Dropout] and isinstance(getattr(module, "dense", None), nn.Module) and not any(
        hasattr(module, name) for name in ("query", "word_embeddings")
    )  # fmt: skip


def is_intermediate(module: Any) -> bool:
    # The exact GELU alone: its class in transformers, or torch's without approximation
    act = getattr(module, "intermediate_act_fn", None)
    exact = type(act).__name__ == "GELUActivation" or (type(act) is nn.GELU and act.approximate == "none")
    return exact and type(getattr(module, "dense", None)) is nn.Linear
