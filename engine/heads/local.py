"""One process on one device, with the few members of accelerate's Accelerator that a training step uses.

Importing accelerate takes longer than training a head does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class LocalProcess:
    """Stands in for an Accelerator where there is one process, no tracker and no mixed precision."""

    num_processes, process_index, is_main_process = 1, 0, True
    scaler: Any = None
    log_with: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.to(self.device)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager:
        return nullcontext()

    def wait_for_everyone(self) -> None:
        """Nobody else is there."""
