"""The layer over the vocabulary, held back in training: it is applied inside the loss, a chunk of rows at a time.

Logits of a step's hidden tokens are tokens times vocabulary, far more than all else that the step holds. The model hands
over the rows that the layer would be applied to, and `regraft.kernels.cross_entropy` makes loss and gradients from them
while one chunk's logits are there. Evaluation, prediction and export see logits as always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.products import linear_forward
from regraft.kernels.cross_entropy import CHUNK_VALUES, masked_cross_entropy

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel

PROOF_TOLERANCE = 1e-4


@dataclass(frozen=True)
class HeldBack:
    """M rows of logits that were not computed: hidden weight^T + bias.

    Shape: hidden [M, H], in the dtype that the products are made in; weight [V, H]; bias [V] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def cross_entropy(self, targets: Tensor) -> Tensor:
        """Summed loss of targets [M] int64, a scalar in fp32."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if hidden.device.type == "cpu" and len(self) * len(weight) <= CHUNK_VALUES["cpu"]:
            # Logits of one chunk: made and thrown away as such they take less time than gradients scaled afterwards.
            bias = None if bias is None else bias.to(hidden.dtype)
            logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
            return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return masked_cross_entropy(hidden, weight, bias, targets)


class VocabularyHead:
    """The last linear layer of `linear`'s model, which gives back what it was given while it is held back."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.held = False

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within the block the layer is not applied."""
        self.held = True
        try:
            yield
        finally:
            self.held = False

    def rows(self, hidden: Tensor) -> HeldBack:
        """What the layer was given [M, H], with the layer."""
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):  # as the layer itself would: the loss is computed outside autocast
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        return HeldBack(hidden, self.linear.weight, self.linear.bias)


def bind_vocabulary_head(running: RunningModel) -> VocabularyHead | None:
    """Make the model's layer over the vocabulary one that can be held back; None where there is no such layer, or the
    model does more with its output than to return it."""
    linear = running.model.get_output_embeddings() if running.reads == "marked" else None
    if type(linear) is not nn.Linear:
        return None
    head = VocabularyHead(linear)
    batch = _marked_batch(running)
    expected = _tokens(running, batch)
    before = vars(linear).get("forward")
    linear.regraft_head = head  # type: ignore[assignment]
    linear.forward = _forward.__get__(linear)  # type: ignore[method-assign]
    try:
        with head.holding(), torch.no_grad():
            rows = head.rows(_tokens(running, batch))
            found = torch.nn.functional.linear(rows.hidden, rows.weight, rows.bias)
        same = found.shape == expected.shape and torch.allclose(
            found, expected, rtol=PROOF_TOLERANCE, atol=PROOF_TOLERANCE
        )
    except RuntimeError:  # shapes that do not fit: something is added to the logits or multiplied with them
        same = False
    if same:
        return head
    del linear.forward
    if before is not None:
        linear.forward = before  # type: ignore[method-assign]
    return None


def _forward(self: Any, x: Tensor) -> Tensor:
    return x if self.regraft_head.held else linear_forward(self, x)


def _marked_batch(running: RunningModel) -> Any:
    from regraft.engine.binding import small_batch

    batch = small_batch(running)
    return replace(batch, marks=torch.arange(0, batch.tokens, 3, device=batch.input_ids.device))


@torch.no_grad()
def _tokens(running: RunningModel, batch: Any) -> Tensor:
    """What the model gives for the marked tokens, dropout off."""
    was_training = running.training
    running.eval()
    try:
        found: Any = running(batch)
    finally:
        running.train(was_training)
    return found[0] if isinstance(found, tuple) else found
