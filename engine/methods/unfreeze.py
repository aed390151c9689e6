"""Which layers of a backbone train, and from which step (Howard and Ruder 2018)."""

from __future__ import annotations

from typing import Any

from torch import nn

from regraft.engine.errors import ConfigError
from regraft.engine.methods.settings import UnfreezeSettings


def depths(model: Any) -> dict[str, int]:
    """Depth of every parameter: 0 for embeddings, 1 .. L for the layers, L + 1 for the head and what follows."""
    from regraft.engine.training.optimizer import depth_of, head_names

    head = head_names(model)
    layers = getattr(model.config, "num_hidden_layers", 0)
    return {n: depth_of(n, layers, n in head) for n, _ in model.named_parameters()}


def trainable_from_start(model: Any, settings: UnfreezeSettings) -> set[str]:
    """Names of the parameters that train at some time in the run. Raises ConfigError for more layers than there are."""
    found = depths(model)
    layers = getattr(model.config, "num_hidden_layers", 0)
    if settings.last_layers is None:
        return set(found)
    if settings.last_layers > layers:
        raise ConfigError(f"unfreeze.last_layers: {settings.last_layers}; the model has {layers}")
    if settings.last_layers and max(d for d in found.values() if d <= layers) < layers:
        raise ConfigError(
            f"unfreeze.last_layers: the layers of {type(model).__name__} share their weights; leave it out"
        )
    return {n for n, d in found.items() if d > layers - settings.last_layers}


class GradualUnfreezing:
    """Turns the trained weights' gradients on from the top, one depth a period, by the step number alone: a resumed run
    stands where it stood."""

    def __init__(self, model: Any, period: int) -> None:
        named: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.period = period
        self.weights = [(d, named[n]) for n, d in depths(model).items() if named[n].requires_grad]
        self.top = max(d for d, _ in self.weights)
        self.lowest = -1

    def at(self, step: int) -> None:
        """Set what trains in optimizer step `step` (from 0)."""
        lowest = max(0, self.top - step // self.period)
        if lowest == self.lowest:
            return
        self.lowest = lowest
        for depth, weight in self.weights:
            weight.requires_grad_(depth >= lowest)
            if depth < lowest:
                weight.grad = None
