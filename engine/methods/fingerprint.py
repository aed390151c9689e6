"""Which weights an adapter was made for: told by their values, whatever file or format they come from."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def fingerprint(model: Any) -> str:
    """Hash of the backbone's pretrained weights (names, shapes, values), without what was drawn at random."""
    fresh: frozenset[str] = getattr(model, "regraft_fresh", frozenset())
    prefix = f"{model.base_model_prefix}."
    found = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        if name.startswith(prefix) and name not in fresh:
            found.update(f"{name.removeprefix(prefix)}{tuple(weight.shape)}".encode())
            found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
