"""Fused kernels in C bound on instances of BERT-like modules on CPU. State dict, PEFT and export never notice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from regraft.engine.binding import Kinds, bind_kinds, is_output
from regraft.kernels import native
from regraft.kernels.norm_native import dropout_add_layer_norm, runs_here

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel


def bind_native(running: RunningModel) -> dict[str, int]:
    """Dropout, residual sum and LayerNorm in one pass where modules are built like BERT's and the logits stay the same
    on random sequences; returns how many modules of each kind were bound. (GELU alone is as fast in torch.)"""
    return bind_kinds(running, KINDS) if native.available() else {}


def _output_forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    x = self.dense(hidden_states)
    norm = self.LayerNorm
    if not runs_here(x, input_tensor, norm.weight):
        return norm(self.dropout(x) + input_tensor)
    p = self.dropout.p if self.dropout.training else 0.0
    return dropout_add_layer_norm(x, input_tensor, norm.weight, norm.bias, eps=norm.eps, p=p)


KINDS: Kinds = {"dropout + residual + LayerNorm": (is_output, _output_forward)}
